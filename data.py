"""What a model is taught with, composed on the fly. From one emoji to one training row, in order of calls:

    emoji_subjects or folder_subjects -> Subjects -> TaskDataset.__getitem__ -> the task's method (with
    open_cutout, vary, scene) -> Sample -> train.collate, lay_out -> Batch -> train.fill_codes

    subject      a thing with a label. A Subject is one picture of it; others are its views
    cut-out      an RGBA image of a subject alone, cropped to its mask; on black: in its place, on black
    background   what is behind the subjects. It has words if a caption can name it. A ground has none
    placement    where a cut-out stands. A scene is one or more cut-outs on a background
    reference    a picture in the prompt. The target is the picture to draw
    copy         of a reference: copy 0 shows it as it is, copy 1 at two thirds. A task uses one or both
    paint, draw  code paints a picture with Pillow; the model draws one, patch by patch
"""
import csv
import functools
import io
import json
import os
import re
import sys
import unicodedata
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mentor import WORD, BadInput
from tokenizer import (BACKGROUNDS, COLOURS, EMOJI, IMAGE_ENDINGS, SHAPES, code_point_label,
                       emoji_font, emoji_label, is_black_and_white, is_cutout, open_mask, open_square, over,
                       paint_background, paint_emoji, paint_shape, printable, read_image, read_once,
                       read_text, square_of, turn_hue)

say_once = functools.cache(lambda text: print(printable(text), file=sys.stderr))

# ---- Subjects: records of cut-outs and pictures -----------------------------------------------------------

MAX_LABEL, MAX_BACKGROUND, MAX_CAPTION = 5, 8, 20  # words


def clean_text(text, limit=None):
    """A text as the model knows it, in training and in sample.py alike: its first line in lowercase, without
    full stop, <image> or _, at most `limit` words, its accents composed (NFC)."""
    line = unicodedata.normalize("NFC", text.strip().split("\n")[0].lower())
    text = " ".join(line.replace("<image>", " ").replace("_", " ").split())
    starts = [word.start() for word in WORD.finditer(text)] + [None]
    return text[:starts[limit] if limit and limit < len(starts) else None].rstrip("., ")


def clean_label(text):
    """A thing's name without article, up to a stop or comma, and its place: ("cat", " on the left" or "")"""
    text = clean_text(re.sub(r"^\s*(an?|the)\s+", "", text, flags=re.I))
    name, place = re.fullmatch(f"(.*?)((?: (?:{'|'.join([*SIDES, *QUARTERS])}))?)", text).groups()
    return clean_text(re.split(r"[.,;](?:\s|$)", name)[0], MAX_LABEL), place


class Subject(NamedTuple):
    """One picture, and the subject that it shows."""
    name: str                # pictures of one name show the same subject
    label: str               # what prompts call it
    source: str              # "emoji", "shapes" or "file": how `open_cutout` reads it
    path: str                # the character, the shape's recipe, or the image file
    mask: str = ""           # an image file, where alpha does not cut the subject out
    has_cutout: bool = True  # False: a plain picture, for tasks that need no cut-out, and for backgrounds
    caption: str = ""        # of a plain picture
    split: str = ""          # "train" or "test", where metadata or a folder says so
    mask_value: int | str | None = None  # the level of the mask that means the subject
    outline: str = ""        # instead of a mask: what tokenizer.draw_outline takes, as JSON


NO_EMOJI = "no colour emoji font found (apt-get install fonts-noto-color-emoji brings one)"


def emoji_subjects():
    """Every thing in the machine's colour emoji font, by its Unicode name. Raises BadInput."""
    if emoji_font() is None:
        raise BadInput(f"emoji: {NO_EMOJI}")
    for char in map(chr, EMOJI):
        if (name := emoji_label(char)) and paint_emoji(char).getbbox():
            yield Subject("emoji/" + name, name, "emoji", char)


def shape_subjects():
    """Two-coloured shapes, for tests and for machines without an emoji font."""
    return [Subject(f"shapes/{a} {b} {shape}", f"{a} {b} {shape}", "shapes", f"{shape} {a} {b}")
            for shape in SHAPES for a in COLOURS for b in COLOURS if a != b]


# ---- Folders, as people publish pictures ------------------------------------------------------------------
# Each convention makes records: dicts with the keys of KEYS (and "outline" from COCO). Paths in them are
# relative to the folder; "mask" is a list. `notes` counts what to say: notes["not read"][".heic"] += 1.
#
#     metadata.jsonl, .json, .csv: the nearest at or above a picture describes it     metadata_records
#     COCO instances, with photographs beside, in images/, in the subset's folder     coco_records
#     dog_mask.png beside dog.jpg; masks/dog.png and images/dog.jpg                   find_masks
#     the label: dog.txt, dog.png.txt, dog.caption beside; a class folder, kohya's    words_for
#     10_dog, CUB's 001.dog, wordnet's n02084071-dog; the name of the file
#     1f436.png, emoji_u1f436.png: emoji sets                                         code_point_label
#     train/, test/, val2017/: splits                                                 split_of
#     dog_mirror.png: another view of dog.png                                         file_subject

KEYS = {"file_name": ("file_name", "filename", "image", "file"), "text": ("text", "caption"),
        "mask": ("mask", "mask_file_name"), "mask_value": ("mask_value",), "label": ("label",),
        "subject_id": ("subject_id",), "split": ("split",)}  # of a record: as metadata calls them
SPLIT = re.compile("(train|test|eval|val|dev|holdout)(?:ing|uation|val|id|idation)?(?:[-_]?set)?[0-9]*", re.I)
PICTURE_FOLDERS = {"images", "image", "imgs", "img", "jpegimages", "data", ""}  # never labels
ONLY_MASKS = "annotations?|trimaps?|segmentation(?:s|class|object)?|gt(?:fine|coarse)|ground[-_]?truth"
MASK_FOLDER = re.compile(f"(?:.*[-_. ])?(?:masks?|gt|mattes?|{ONLY_MASKS})(?:[-_. ].*)?", re.I)
MASK_BESIDE = re.compile("(.+?)(?:-masklabel|[-_.](?:mask|seg|trimap|matte|parts_[0-9]+))", re.I)
CLASS_PREFIX = re.compile(r"(?:\d+_|\d{3}\.|n\d{8}-)(?=.)")
TEXT_ENDINGS, OF_USE = (".txt", ".caption"), (".heic", ".heif", ".jxl", ".svg", ".xml", ".json", ".csv")
HIDDEN = (".", "__")  # .ipynb_checkpoints, ._1.png, __MACOSX


def stem_of(path):
    return os.path.splitext(path)[0]


def list_files(root, notes):
    """Relative paths of all files below a folder, except hidden ones"""
    for folder, folders, files in os.walk(root):  # (follows no links to folders: they may lead in circles)
        notes["not read"]["links to folders"] += sum(os.path.islink(f"{folder}/{name}") for name in folders)
        folders[:] = sorted(name for name in folders if not name.startswith(HIDDEN))
        inside = "" if folder == str(root) else os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        yield from (inside + name for name in sorted(files) if not name.startswith(HIDDEN))


def find_masks(pictures):
    """-> {stem of a picture: its masks}, the set of all masks"""
    in_folders = {path for path in pictures if any(map(MASK_FOLDER.fullmatch, path.split("/")[:-1]))}
    stems = {stem_of(path) for path in pictures if path not in in_folders}
    by_path, masks, found = defaultdict(set), defaultdict(list), set()
    for stem in stems if in_folders else ():  # by its path, and by its path without one of its folders
        *folders, name = stem.split("/")
        for i in range(len(folders) + 1):
            by_path["/".join((*folders[:i], *folders[i + 1:], name))].add(stem)
    for path in pictures:
        match = MASK_BESIDE.fullmatch(stem_of(path))
        of = {match[1]} & stems if match else set()
        if path in in_folders:
            of = pictures_of_mask(stem_of(path), by_path)
        if len(of) == 1:
            found.add(path)
            if "SegmentationObject/" not in path and "_parts_" not in path:  # parts of another mask
                masks[of.pop()].append(path)
    folders = {os.path.dirname(path) for path in found & in_folders}
    return masks, found | {path for path in in_folders if os.path.dirname(path) in folders
                           or re.search(f"(?:^|/)(?:{ONLY_MASKS})/", path, re.I)}


def pictures_of_mask(stem, by_path):
    """masks/dog_0 -> the stems of pictures whose path is otherwise dog_0, or else dog"""
    *folders, name = stem.split("/")
    names = [name] + [name[:i] for i in range(len(name) - 1, 0, -1) if name[i] in "-_."]
    folders = [folder for folder in folders if not MASK_FOLDER.fullmatch(folder)]
    of = next(filter(None, (by_path.get("/".join((*folders, name))) for name in names)), set())
    if len(of) == 1 and not re.search("(?:^|/)masks?/", stem, re.I):  # (masks/ may be a class)
        return of
    return {found for found in of if found.split("/")[:-1] == folders
            or PICTURE_FOLDERS & {*found.lower().split("/")}}


def metadata_records(root, path, masks, notes):
    """metadata.jsonl, .json (an array) or .csv (commas, tabs or semicolons) -> a record for each line. masks:
    as find_masks finds them. Raises BadInput, which names the line."""
    number, record = 0, None
    try:
        file = io.StringIO(read_text(root / path), newline=None)
        if path.lower().endswith(".csv"):
            separator = max(",\t;", key=file.readline().count)
            rows = csv.DictReader(io.StringIO(file.getvalue()), delimiter=separator, strict=True)
            if len(set(rows.fieldnames or ())) < len(rows.fieldnames or ()):
                raise ValueError("two columns have the same name")
            lines = ((rows.line_num, row) for row in rows)
        elif path.lower().endswith(".jsonl"):
            lines = enumerate(file, 1)
        else:
            lines = enumerate(array, 1) if isinstance(array := json.load(file), list) else [(1, array)]
        for number, line in lines:
            if isinstance(line, str) and not line.strip():
                continue
            row = json.loads(line) if isinstance(line, str) else line
            if not isinstance(row, dict) or None in row:
                what = "more values than columns: put quotes around a text with separators"
                raise ValueError(what if isinstance(row, dict) else f"no record with keys: {str(row)[:40]}")
            row = {key: value for key, value in row.items() if value not in (None, "")}
            record = {name: row[key] for name, keys in KEYS.items() for key in keys[::-1] if key in row}
            notes["not read"].update(f"values of {key!r}" for key in row if key not in sum(KEYS.values(), ()))
            for key, value in row.items():
                if isinstance(value, (bool, list, dict)) and key in sum(KEYS.values(), ()):
                    raise ValueError(f'"{key}" is {value!r}: write a text or a number')
            if not isinstance(record.get("file_name"), str):
                raise ValueError(f"no file name; the keys found are {', '.join(row)}")
            if "split" in record and not split_of(str(record["split"])):
                raise ValueError(f'"split" is {record["split"]!r}: write train or test, or leave it out')
            if str(record.get("mask_value", 0)).removesuffix(".0") not in map(str, range(256)):
                raise ValueError(f'"mask_value" is {record["mask_value"]!r}: write a level from 0 to 255')
            for name in {"file_name", "mask"} & set(record):
                record[name] = os.path.relpath(root / os.path.dirname(path) / str(record[name]), root)
            if "subject_id" in record:  # each file counts its own
                record["subject_id"] = f"{path} {record['subject_id']}"
            own = [record["mask"]] if "mask" in record else masks.get(stem_of(record["file_name"]), [])
            yield record | {"mask": own}
        if record is None:
            raise ValueError("no record in it")
    except (ValueError, TypeError, RecursionError, OSError, csv.Error) as error:
        reason = f"not JSON ({error.msg})" if isinstance(error, json.JSONDecodeError) else error
        wanted = ", ".join(" or ".join(keys) for keys in KEYS.values())
        where = f"{'record' if path.endswith('.json') else 'line'} {number + isinstance(error, csv.Error)}"
        raise BadInput(f"{root / path}, {where}: {reason} (the keys wanted are {wanted})") from error


def coco_records(root, path, taken, notes):
    """COCO instances -> a record for each thing that has an outline. Adds all photographs to `taken`; that of
    instances_train.json may be train/1.jpg, ../1.jpg, images/train/1.jpg and so on. Raises BadInput."""
    subset, number = stem_of(path).rpartition("_")[2], 0
    places = [root / os.path.dirname(path) / up / images / part for up in ("", "..")
              for images in ("images", "data", "") for part in (subset, "")]
    try:
        coco = json.loads(read_text(root / path))
        labels = {category["id"]: category["name"] for category in coco["categories"]}
        photographs = {}  # id: path, size
        for image in coco["images"]:
            found = (os.path.relpath(place / image["file_name"], root) for place in places)
            found = next((file for file in found if os.path.isfile(root / file)), None)
            photographs[image["id"]] = found, (int(image["height"]), int(image["width"]))
            taken.add(found)
        for number, thing in enumerate(coco["annotations"], 1):
            (photograph, size), outline = photographs[thing["image_id"]], thing.get("segmentation") or []
            if isinstance(outline, list):
                polygons = [polygon for polygon in outline if len(polygon) > 5]
                outline = polygons and {"size": size, "polygons": polygons}
            if photograph and outline:
                notes["used although marked"]["iscrowd"] += bool(thing.get("iscrowd"))
                yield {"file_name": photograph, "label": labels[thing["category_id"]], "split": subset,
                       "subject_id": f"{photograph}#{path} {number}", "outline": json.dumps(outline)}
            else:
                notes["not read"][f"things without {'an outline' if photograph else 'a photograph'}"] += 1
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise BadInput(f"{root / path}: no COCO instances (annotation {number}: {error!r})") from error


def folder_records(root, files, notes):
    """The records of a folder with these files. Raises BadInput if a file of metadata cannot be used."""
    pictures = [path for path in files if os.path.splitext(path)[1].lower() in IMAGE_ENDINGS]
    masks, are_masks = find_masks(pictures)
    notes["not read"]["unused masks"] += len(are_masks) - sum(map(len, masks.values()))
    taken, seen, described = set(), set(), ()  # files; things; folders whose pictures metadata has to name
    for path in sorted(files, key=lambda path: -path.count("/")):  # the nearest to a picture describes it
        is_json = path.lower().endswith(".json") and (root / path).is_file()
        content = (root / path).read_bytes() if is_json else b""
        if b'"annotations"' in content and b'"categories"' in content:
            records = coco_records(root, path, taken, notes)
        elif os.path.basename(path).lower() in ("metadata.jsonl", "metadata.json", "metadata.csv"):
            records = metadata_records(root, path, masks, notes)
            described += (os.path.join(os.path.dirname(path), ""),)  # "" at the top
        else:
            continue
        taken.add(path)
        here = set()
        for record in records:
            thing = record["file_name"], record.get("outline")
            notes["not read"]["records of pictures that are described elsewhere"] += thing in seen
            if thing not in seen:
                here.add(thing)
                taken.update((record["file_name"], *record.get("mask", ())))
                yield record
        seen |= here
    pictured = {*pictures, *map(stem_of, pictures)}
    for path in files:
        file, ending = os.path.basename(path), os.path.splitext(path)[1].lower()
        if path in taken or path in are_masks or ending in TEXT_ENDINGS and stem_of(path) in pictured:
            continue
        if ending not in IMAGE_ENDINGS:
            notes["not read"][file if file.startswith("metadata") else ending or file] += 1
        elif path.startswith(described):
            notes["not read"]["pictures that the metadata does not name"] += 1
        else:
            yield {"file_name": path, "mask": masks.get(stem_of(path), [])}


def split_of(folder):
    """"val2017" -> "test"; "" if a folder of this name is no split"""
    match = SPLIT.fullmatch(folder)
    return "" if match is None else "train" if match[1].lower() == "train" else "test"


def words_for(root, path, record, sidecar):
    """Yields possible names of a picture, the best first, each with its origin. Raises ValueError."""
    yield record.get("text", ""), "metadata"
    beside = read_text(root / sidecar) if sidecar else ""
    if re.search(r"(?:[ ,]-?[0-9.]+(?:e-?[0-9]+)?){4}\s*$", beside[:1000].split("\n")[0], re.I):
        raise ValueError("the text file beside it holds boxes, not words")
    yield beside, "text files"
    yield record.get("label", ""), "metadata"
    yield code_point_label(root / path), "code points"
    folders = [name for name in os.path.dirname(path).split("/")
               if name.lower() not in PICTURE_FOLDERS and not split_of(name)]
    yield CLASS_PREFIX.sub("", folders[-1]) if folders else "", "folders"
    yield Path(path).stem, "file names"


def file_subject(root, record, texts):
    """A record -> Subject, and where its label comes from. texts: {picture or stem: text file beside it}"""
    path, masks, outline = record["file_name"], record.get("mask", []), record.get("outline", "")
    if len(masks) > 1:
        raise ValueError("it has several masks: list one for each subject in metadata.jsonl")
    mirrored = re.sub("_mirror(?=[^/]*$)", "", path)  # owl_mirror.png is a view of owl.png
    original = mirrored if mirrored != path and (root / mirrored).is_file() else path
    for text, origin in words_for(root, original, record, texts.get(original, texts.get(stem_of(original)))):
        if text := clean_text(str(text), MAX_CAPTION):
            break
    origin = "COCO" if outline else "metadata" if "label" in record else origin
    label = clean_label(str(record.get("label", text)))[0] or clean_label(text)[0]
    name = f"subject_id {record['subject_id']}" if "subject_id" in record else original
    splits = filter(None, map(split_of, (str(record.get("split", "")), *path.split("/")[:-1])))
    mask = str(root / masks[0]) if masks else ""
    if mask or outline:  # a bad mask is reported now, not in training
        open_mask(root / path, mask, record.get("mask_value"), outline, 512)
    has_cutout = bool(mask or outline) or is_cutout(root / path)
    if not has_cutout and is_black_and_white(root / path):
        raise ValueError("pure black and white, like a mask: name its picture in metadata.jsonl")
    subject = Subject(f"{root.resolve().name}/{name}", label, "file", str(root / path), mask, has_cutout,
                      text, next(splits, ""), record.get("mask_value"), outline)
    json.dumps(subject, ensure_ascii=False).encode()  # raises if its name is not Unicode
    return subject, origin


def folder_subjects(folder, notes):
    """A user's own pictures. Raises BadInput without a folder."""
    root = Path(folder)
    if not os.path.isdir(folder):
        raise BadInput(f"{folder}: no such folder (give emoji, shapes or folders of images, with commas)")
    files = list(list_files(root, notes))
    texts = {stem_of(path): path for path in files if path.lower().endswith(TEXT_ENDINGS)}
    inside, first = os.path.join(os.path.realpath(root), ""), {}
    for record in folder_records(root, files, notes):
        own = [root / file for file in (record["file_name"], *record.get("mask", ()))]
        try:
            if not all(os.path.realpath(path).startswith(inside) for path in own):
                raise ValueError("a link that leads out of the folder (copy the file)")
            subject, origin = file_subject(root, record, texts)
        except Exception as error:  # a damaged file can fail anywhere inside pillow
            reason = str(error).replace(f"{own[0]}: ", "").replace(f"{own[-1]}", f"mask {own[-1].name}")
            kind = re.sub(r"mask .*?: |\S*/\S*|[0-9]+", "", reason)  # without names and numbers
            notes["skipped"][first.setdefault(kind, f"{reason}, first {record['file_name']}")] += 1
            continue
        notes["labels from"][origin] += 1
        yield subject


# ---- Cut-outs, and all pictures of a run ------------------------------------------------------------------

@functools.lru_cache(maxsize=4000)  # at 64 px, as the cpu preset has it, 65 MB at most
def open_cutout(subject, size=256):
    """The subject's pixels, cropped to its mask -> RGBA image, at most `size` px a side. Raises BadInput."""
    if subject.source != "file":
        image = {"emoji": paint_emoji, "shapes": paint_shape}[subject.source](subject.path)
    elif not subject.mask and not subject.outline:
        image = read_image(subject.path)
    else:
        image = read_once(subject.path, 16 * size).convert("RGBA")  # a copy
        mask = open_mask(subject.path, subject.mask, subject.mask_value, subject.outline)
        image.putalpha(mask.resize(image.size, Image.Resampling.NEAREST))
    if image.mode != "RGBA":
        raise BadInput(f"{subject.path}: no longer a cut-out (has the file changed?)")
    alpha = image.getchannel("A").point(lambda v: 255 * (v > 127))
    if len(alpha.getcolors()) < 2:
        raise BadInput(f"{subject.path}: its alpha is empty, or hides nothing: this is no cut-out")
    image = image.crop(alpha.getbbox())
    image.thumbnail((size, size), reducing_gap=3)
    return image


def is_held_out(subject, by_label=True):
    """By its split, else one in ten: by a hash of its label, or of its name up to "#" (its photograph)."""
    one_in_ten = zlib.crc32((subject.label if by_label else subject.name.split("#")[0]).encode()) % 10 == 0
    return subject.split == "test" if subject.split else one_in_ten


# subject: an id that its pictures share; start, end: of its line. (Unaligned, searchsorted would copy.)
FIELDS = np.dtype([("subject", "i8"), ("start", "i8"), ("end", "i8"), ("held_out", "?"), ("has_cutout", "?")],
                  align=True)


class Subjects:
    """All pictures of a run, a sequence of Subject. A folder may have a million, and every worker process
    needs them. As Python objects each worker would copy them, some gigabytes. So they are a few arrays, which
    forked workers share: records as lines of JSON in one array of bytes, and FIELDS of each, sorted so that
    the pictures of a subject are neighbours. report: what was found, in words. starts: the index of each
    source's first picture."""
    def __init__(self, lines, table, report, starts=(0,)):
        self.lines, self.table, self.report, self.starts = lines, table, report, starts

    def __len__(self):
        return len(self.table)

    @functools.lru_cache(maxsize=4000)
    def __getitem__(self, i):
        return Subject(*json.loads(self.lines[self.table["start"][i]:self.table["end"][i]].tobytes()))

    def other_views(self, i):
        """Indices of all other cut-outs that show the subject of picture i."""
        ids, has_cutout = self.table["subject"], self.table["has_cutout"]
        views = range(*np.searchsorted(ids, [ids[i], ids[i] + 1]))
        return [view for view in views if view != i and has_cutout[view]]


def load_subjects(sources=None):
    """`emoji`, `shapes`, folders, with commas -> Subjects. None: emoji, else shapes. Raises BadInput."""
    if sources is None and emoji_font() is None:
        say_once(f"{NO_EMOJI}: using --data shapes")
        sources = "shapes"
    sources = [source for source in (sources or "emoji").split(",") if source]
    if len({Path(source).resolve().name for source in sources}) < len(sources):
        raise BadInput(f"{','.join(sources)}: two sources of one name: rename one, or leave it out")
    rows, lines, notes, starts = [], bytearray(), defaultdict(Counter), []
    first = {}  # name of a subject: its id, and the label of its first picture, which decides for its views
    for source in sources:
        starts.append(len(rows))
        builtin = {"emoji": emoji_subjects, "shapes": shape_subjects}.get(source)
        for subject in builtin() if builtin else folder_subjects(source, notes):
            start = len(lines)
            subject_id, label = first.setdefault(subject.name, (len(first), subject.label))
            lines += json.dumps(subject).encode()
            held_out = is_held_out(subject._replace(label=label))
            rows.append((subject_id, start, len(lines), held_out, subject.has_cutout))
            notes["labels"][f'"{subject.label}"'] += 1
        if len(rows) == starts[-1]:
            raise BadInput(f"{source}: not one usable image in it{describe(notes, '; ')}")
    lines, table = np.frombuffer(lines, np.uint8), np.array(rows, FIELDS)
    if len(notes["labels"]) < 100:
        table["held_out"] = [is_held_out(subject, by_label=False) for subject in Subjects(lines, table, "")]
    table["held_out"] = np.bincount(table["subject"], table["held_out"])[table["subject"]] > 0  # all views
    table = table[table["subject"].argsort(kind="stable")]
    views, n_cutouts = np.bincount(table["subject"]), table["has_cutout"].sum()
    report = (f"{len(table)} images, {n_cutouts} of them cut-outs; {len(first)} subjects, "
              f"{len(notes['labels'])} labels, {(views * (views - 1)).sum()} pairs of views; "
              f"{table['held_out'].sum()} held out; skipped {notes['skipped'].total()} files")
    return Subjects(lines, table, report + describe(notes, "\n  "), starts)


def describe(notes, separator):
    """What a folder holds, in words: the five commonest of each kind"""
    found = {kind: [f"{n} {what}" for what, n in (+counts).most_common()] for kind, counts in notes.items()}
    hint = " (convert pictures to PNG, outlines to COCO)" * any(map(notes["not read"].get, OF_USE))
    return "".join(f"{separator}{kind}: {', '.join(words[:5] + ['...'] * (len(words) > 5))}"
                   f"{hint * (kind == 'not read')}" for kind, words in found.items() if words)


# ---- Scenes: cut-outs on a background ---------------------------------------------------------------------

SIZES = {"": 0.75, "small": 0.5}  # word: side of the subject's box, as a share of the canvas
PLACES = {"on the left": 0.0, "": 0.5, "on the right": 1.0}


class Placement(NamedTuple):
    side: float  # of the square box that the cut-out fills, as a share of the canvas
    x: float     # share of the free space that is left of the box: 0 left, 1 right
    y: float     # and above it


def named_placement(size, place):
    """What the words of a caption mean. Boxes are whole patches (save at 32 px): moved, they keep codes."""
    return Placement(SIZES[size], PLACES[place], 0.5 if size == "" else 0.75)


AS_GIVEN = named_placement("", "")  # the best placement for a reference: the subject large, in the middle
# Where several subjects stand: two side by side, or up to four in the quarters, each in whole patches.
SIDES = {place: named_placement("small", place) for place in ("on the left", "on the right")}
QUARTERS = {f"at the {row} {column}": Placement(0.5, x, y)
            for row, y in (("top", 0.0), ("bottom", 1.0)) for column, x in (("left", 0.0), ("right", 1.0))}


def free_placement(rng):
    return Placement(rng.uniform(0.5, 0.9), rng.uniform(), rng.uniform())


def choose_placements(rng, n, anywhere=0.0):
    """Where n subjects stand -> (placement, size, place) each, the last two in words, None if unsaid. A
    single one stands, with probability `anywhere`, where no words say."""
    if n > 1:
        slots = SIDES if n == 2 and rng.uniform() < 0.5 else QUARTERS
        return [(slots[place], None, str(place)) for place in rng.permutation(list(slots))[:n]]
    if rng.uniform() < anywhere:
        return [(free_placement(rng), None, None)]
    size, place = str(rng.choice(list(SIZES))), str(rng.choice(list(PLACES)))
    return [(named_placement(size, place), size, place)]


def write_caption(rng, things, background, mark=""):
    """A wording of things, (label, size, place) each. Size "" is big, place "" in the middle, or unsaid like
    None. mark: follows each label (<image>, in multi-image)."""
    phrases = []
    for label, size, place in things:
        size = rng.choice(["", "big"]) if size == "" else size or ""
        place = rng.choice(["", "in the middle"]) if place == "" else place or ""
        thing = f"{size} {label}{mark}".strip()
        thing = f"{'an' if thing[:1] in 'aeiou' else 'a'} {thing}"
        phrases.append(f"{thing} {place}".strip())
    named = " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))
    wordings = [f"{background}, {named}", f"{named}, {background}"]
    if len(things) == 1:  # thing and place are those of the only one
        wordings.insert(0, f"{thing} {background}, {place}")
    return wordings[rng.integers(len(wordings))].strip(" ,")


def compose(cutout, background, placement):
    """Pastes a cut-out into its box, at the bottom centre -> images: scene, cut-out on black, its mask"""
    side, canvas = placement.side * background.width, background.width
    w, h = (max(1, round(n * side / max(cutout.size))) for n in cutout.size)
    x = round(placement.x * (canvas - side) + (side - w) / 2)
    y = round(placement.y * (canvas - side) + side - h)
    cutout = cutout.resize((w, h), Image.Resampling.BICUBIC)
    scene, on_black, mask = background.copy(), *(Image.new(mode, background.size) for mode in ("RGB", "L"))
    scene.paste(cutout, (x, y), cutout)
    on_black.paste(cutout, (x, y), cutout)
    mask.paste(cutout.getchannel("A"), (x, y))
    return scene, on_black, mask


def fill_outline(cutout, other):
    """The outline of one cut-out with the pixels of another, or their mean: no outline tells the look."""
    mean = other.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))[:3]  # weighed by its alpha
    filled = over(other.resize(cutout.size, Image.Resampling.NEAREST), (*mean, 255))
    filled.putalpha(cutout.getchannel("A"))
    return filled


def vary(cutout, rng):
    """Another look and angle at random. So no label tells the look: the model has to see the reference."""
    if rng.uniform() < 0.5:
        cutout = ImageOps.mirror(cutout)
    if rng.uniform() < 0.6:
        cutout = turn_hue(cutout, int(rng.integers(256)))
    if rng.uniform() < 0.3:
        for change in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
            cutout = change(cutout).enhance(rng.uniform(0.5, 1.3))
    if rng.uniform() < 0.2:
        cutout = cutout.rotate(rng.uniform(-25, 25), Image.Resampling.BILINEAR, expand=True)
        cutout = cutout.crop(cutout.getbbox())
    return cutout


def distort(cutout, rng):
    """Recovery's damage (official code): with p .5 stretch, shear, rotation, corners jittered by 20%."""
    if rng.uniform() < 0.5:
        return cutout
    angle = np.radians(rng.uniform(-20, 20))
    turn = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    shear, stretch = np.array([(1, rng.uniform(-0.3, 0.3)), (0, 1)]), np.diag([rng.uniform(0.7, 1.3), 1])
    corners = np.array([(-1, -1), (-1, 1), (1, 1), (1, -1)]) * rng.uniform(1.0, 1.2, (4, 2))
    # QUAD asks which point of the cut-out each corner of the result shows; beyond it all is transparent.
    quad = ((corners @ stretch @ shear.T @ turn.T) + 1) / 2 * cutout.size
    return cutout.transform(cutout.size, Image.Transform.QUAD, quad.flatten(), Image.Resampling.BICUBIC)


# What examples show in-context, and how often. Hues turn by a third; by any angle they are hardly learnt.
OPERATIONS = {"cut out": 0.16, "another scene": 0.16, "mirror": 0.16, "grey": 0.16, "hue": 0.36}
HUE_TURNS = (85, 171)  # in 256ths of the circle


def operate(operation, picture, on_black, mask, behind, turn):
    """What an operation makes of a picture, given its subject on black, the mask and another background; all
    uint8 (H, W, 3), the mask (H, W). turn: as turn_hue takes it."""
    if operation == "another scene":
        return (on_black + behind * (1 - mask[..., None] / 255)).round().astype(np.uint8)
    if operation == "hue":
        return np.asarray(turn_hue(Image.fromarray(picture), turn))
    grey = np.asarray(Image.fromarray(picture).convert("L").convert("RGB"))
    return {"cut out": on_black, "mirror": picture[:, ::-1], "grey": grey}[operation]


N_BACKGROUNDS, N_GROUNDS = 60, 2000  # of each background, and of grounds: each is painted once a worker

@functools.lru_cache(maxsize=N_GROUNDS)
def paint_ground(size, variant, subject):
    """A ground of any look -> RGB: plain, a gradient, soft noise, a pattern, or the inside of a subject."""
    rng = np.random.default_rng(variant)
    kind = rng.choice(["gradient", "noise", "pattern", "inside"], p=[0.42, 0.23, 0.1, 0.25])
    colours, angle = rng.uniform(0, 255, (3, 3)), rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:size, :size] / (size - 1) - 0.5
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    if kind == "gradient":
        n, share = rng.integers(1, 4), (along - along.min()) / np.ptp(along)  # of one colour it is plain
        image = np.stack([np.interp(share, np.linspace(0, 1, n), c[:n]) for c in colours.T], -1)
    elif kind == "pattern":
        period, squares = rng.uniform(0.08, 0.4), rng.uniform() < 0.5
        odd = (along / period % 1 < 0.5) ^ (squares & (across / period % 1 < 0.5))
        image = np.where(odd[..., None], colours[0], colours[1])
    elif kind == "noise":
        cells = rng.uniform(-1, 1, (rng.integers(2, 12),) * 2 + (3,)) * rng.uniform(20, 140) + colours[0]
        cells = Image.fromarray(np.clip(cells, 0, 255).astype(np.uint8))
        image = np.asarray(cells.resize((size, size), Image.Resampling.BICUBIC))
    else:
        flat = over(open_cutout(subject, size), (*map(round, colours[0]), 255))
        image = np.asarray(square_of(flat, size, *rng.uniform((0.25, 0, 0), 1)))
    if rng.uniform() < 0.25:
        image = image + rng.normal(0, rng.uniform(2, 14), (size, size, 1))
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))


class Background(NamedTuple):
    image: Image.Image  # RGB
    words: str          # what a caption calls it, or ""
    name: str           # its file or its words; "" for a ground


class Scene(NamedTuple):
    """Subjects on a background. Pictures are uint8 (H, W, 3), masks (H, W)."""
    picture: np.ndarray
    caption: str            # "" if the background has no words
    labels: tuple           # of each subject, like the lists that follow
    on_black: list          # pictures
    masks: list             # how much of each pixel the subject covers
    places: list            # in words, or None
    background_name: str

    def sample(self, *references):
        mask = np.maximum.reduce(self.masks)
        return Sample(self.labels, self.caption, list(references), self.picture, mask)


# ---- Tasks ------------------------------------------------------------------------------------------------
# To add one: a row in TASKS; a method of the same name (with _ for -) in TaskDataset, whose samples have as
# many references as the prompt has <image>; a share in train.MIXES; and for drawing sample.which_task.

class Task(NamedTuple):
    prompt: str                 # a reference stands at each <image>
    cfg_image: float            # guidance towards the references
    cfg_text: float             # and towards the text: copying wants little, composing more
    needs_cutout: bool = True   # False: a plain picture will do
    copies: tuple = (0, 1)      # which copies of a reference the prompt has: the sizes of its targets
    coarse: float = 1.0         # weight of a patch's coarsest code (train.batch_loss); others have 1
    hide_picture: float = 0.15  # how often training hides the target's earlier patches


# The prompt alone tells the model its task. (So recovery and subject-driven are one to it.)
TASKS = {
    # Only words decide here. The patches drawn so far would answer sooner, so they are mostly hidden.
    "text-to-image": Task("{caption}", 3.0, 3.0, needs_cutout=False, hide_picture=0.65),
    "reconstruction": Task("The image is <image>\n{caption}", 1.0, 1.0, needs_cutout=False, copies=(0,)),
    # Which of several things is meant is one bit per patch. The randomness of the fine codes would drown it.
    "segmentation": Task("The {label} in <image>.", 1.0, 1.5, copies=(0,), coarse=8.0, hide_picture=0.3),
    "recovery": Task("The {label} in <image>.\n{caption}", 2.0, 2.0),
    "subject-driven": Task("The {label} in <image>.\n{caption}", 3.0, 2.0),
    # Its caption has the references in it, each behind its label: "a dog <image> and a cat <image>".
    "multi-image": Task("{caption}", 3.0, 2.0, copies=(1,)),
    "in-context": Task("<image> becomes <image>.\n<image> becomes", 2.0, 1.0, copies=(0,)),
}


def fill_prompt(task, labels=(), caption=""):
    """-> the n + 1 texts around n references. The first label fills {label}."""
    return TASKS[task].prompt.format(label="".join(labels[:1]), caption=caption).split("<image>")


class Sample(NamedTuple):
    labels: tuple         # what the prompt calls its references, or asks for
    caption: str
    references: list      # uint8 (H, W, 3) each
    target: np.ndarray    # uint8 (H, W, 3): the picture to draw
    mask: np.ndarray      # uint8 (H, W): how much of each pixel of the target the subject covers
    task: str = ""
    hide: str = ""        # from the model in training: "text", "all" (mentor.hide_condition); or "picture",
                          # the target's earlier patches (train.lay_out)


class TaskDataset:
    """A map-style dataset of Sample. Item `index` is a pure function of (seed, index), whatever the workers.
    mix: task -> its share. seed: a list of numbers. train: subjects that are not held out, whose looks vary
    unless they have other views; without it those held out, as they are."""
    def __init__(self, subjects, mix, size, seed, train=True, backgrounds=()):
        self.subjects, self.mix, self.size, self.seed, self.train = subjects, mix, size, seed, train
        self.backgrounds = backgrounds
        has_cutout, wanted = subjects.table["has_cutout"], subjects.table["held_out"] != train
        if not (wanted & (has_cutout | ~has_cutout.any())).any():
            say_once("every subject is held out: they are trained on all the same" if train else
                     "too few subjects, none is held out: held-out figures are of training subjects")
            wanted = wanted | True
        self.all, self.cutouts = np.flatnonzero(wanted), np.flatnonzero(wanted & has_cutout)  # indices
        self.plain = np.flatnonzero(wanted & ~has_cutout)
        if not len(self.cutouts) and any(TASKS[task].needs_cutout for task in mix):
            raise BadInput("none of these images has alpha or a mask: "
                           "train with --mix text-to-image=.8,reconstruction=.2")

    def __getitem__(self, index):
        rng = np.random.default_rng([*self.seed, index])
        name = str(rng.choice(list(self.mix), p=list(self.mix.values())))
        task, make = TASKS[name], getattr(self, name.replace("-", "_"))
        pool = self.cutouts if task.needs_cutout else self.all
        for _ in range(100):
            i = self.pick(rng, pool)
            try:
                sample = make(i, self.subjects[i], rng)
            except BadInput as error:  # a broken file: another subject takes its place
                say_once(f"skipped: {error}")
                continue
            # Guidance compares with "all" and "text" hidden.
            shares = {"all": 0.1, "text": 0.05, "picture": task.hide_picture, "": 0.85 - task.hide_picture}
            hide = list(shares)[rng.choice(len(shares), p=list(shares.values()))]
            return sample._replace(task=name, hide=hide)
        raise BadInput("a hundred images in a row could not be read")

    def pick(self, rng, pool):
        """An index from self.all, self.cutouts or self.plain. Sources take equal turns, however large."""
        bounds = sorted({*np.searchsorted(pool, [*self.subjects.starts, len(self.subjects)])})
        source = rng.integers(len(bounds) - 1)  # of those that have any
        return pool[rng.integers(*bounds[source:source + 2])]

    # One method for each task: picture i, which shows `subject` -> Sample

    def text_to_image(self, i, subject, rng):
        if not subject.has_cutout:
            return self.plain_picture(subject)
        return self.scene([i], [open_cutout(subject, self.size)], rng).sample()

    def reconstruction(self, i, subject, rng):
        """The target is the reference. A caption describes it nine times in ten, if words can."""
        if not subject.has_cutout:
            sample = self.plain_picture(subject)
        else:
            cutouts = [self.cutout(i, rng)]
            sample = self.scene([i], cutouts, rng, anywhere=0.7, any_ground=rng.uniform() < 0.5).sample()
        caption = sample.caption if rng.uniform() < 0.9 else ""
        return sample._replace(references=[sample.target], caption=caption)

    def segmentation(self, i, subject, rng):
        """The target is a subject's cut-out on black: of the only subject, or of one of several, asked for by
        label, by place or by both. Looks do not vary where labels have to tell them apart."""
        indices = self.different(i, rng.choice([1, 2, 3, 4], p=[0.15, 0.2, 0.25, 0.4]), rng)
        asked_by = rng.choice(["label", "place", "both"], p=[0.75, 0.17, 0.08])
        if len(indices) == 1:
            asked_by = ""
        cutouts = [self.cutout(j, rng, change=asked_by != "label") for j in indices]
        scene = self.scene(indices, cutouts, rng, anywhere=0.7, any_ground=True)
        name, place = "thing" if asked_by == "place" else subject.label, scene.places[0]
        asked = f"{name} {place}" if asked_by in ("place", "both") else name
        return Sample((asked,), "", [scene.picture], scene.on_black[0], scene.masks[0])

    def recovery(self, i, subject, rng):
        """The reference is the subject distorted, anywhere on another background."""
        cutout = self.cutout(i, rng)
        scene = self.scene([i], [cutout], rng)
        where = Placement(rng.uniform(0.4, 1.0), rng.uniform(), rng.uniform())
        return scene.sample(self.elsewhere(distort(cutout, rng), where, scene, rng))

    def subject_driven(self, i, subject, rng):
        """The reference is the subject on another background."""
        return self.redrawn([i], rng)

    def multi_image(self, i, subject, rng):
        """The references are several subjects, in the order of the caption; the target shows all of them."""
        return self.redrawn(rng.permutation(self.different(i, rng.integers(2, 5), rng)), rng, " <image>")

    def in_context(self, i, subject, rng):
        """The references are an example, before and after, and a query. The target is what becomes of it."""
        operation = str(rng.choice(list(OPERATIONS), p=list(OPERATIONS.values())))
        turn, pictures = int(rng.choice(HUE_TURNS)), []
        behind = self.background(rng)
        others = [behind.name]
        for j in (self.different(i, 2, rng)[-1], i):  # the example's picture, then the query
            scene = self.scene([j], [self.cutout(j, rng)], rng, other_than=others, any_ground=True)
            others.append(scene.background_name)
            layers = scene.on_black[0], scene.masks[0], np.asarray(behind.image)
            pictures += [scene.picture, operate(operation, scene.picture, *layers, turn)]
        *references, target = pictures
        mask = scene.masks[0][:, ::-1] if operation == "mirror" else scene.masks[0]
        return scene.sample(*references)._replace(target=target, mask=mask)

    # What these methods share

    def plain_picture(self, subject):
        target = np.asarray(open_square(subject.path, self.size))
        return Sample((subject.label,), subject.caption, [], target, np.zeros_like(target[..., 0]))

    def cutout(self, i, rng, change=True):
        """Picture i's cut-out; in training varied, two in five with another's pixels, unless it has views."""
        cutout = open_cutout(self.subjects[i], self.size)
        if not self.train or not change or self.subjects.other_views(i):
            return cutout
        if rng.uniform() < 0.4:
            other = self.subjects[self.pick(rng, self.cutouts)]
            cutout = fill_outline(cutout, open_cutout(other, self.size))
        return vary(cutout, rng)

    def different(self, i, n, rng):
        """Picture i and up to n - 1 more cut-outs, all with different labels -> list of indices"""
        chosen = {self.subjects[i].label: i}
        for _ in range(20):  # (there may be fewer labels)
            if len(chosen) < n:
                j = self.pick(rng, self.cutouts)
                chosen.setdefault(self.subjects[j].label, j)
        return list(chosen.values())

    def background(self, rng, other_than=(), any_ground=False):
        """A Background with none of these names: half the time a photograph of --backgrounds, if there are
        any, else painted. any_ground, if no caption names it: also part of a plain picture, or a ground."""
        if len(self.backgrounds) and rng.uniform() < 0.5:
            photograph = self.backgrounds[rng.integers(len(self.backgrounds))]
            if photograph.path not in other_than:
                image = open_square(photograph.path, self.size, rng if any_ground else None)
                return Background(image, clean_text(photograph.caption, MAX_BACKGROUND), photograph.path)
        # If there are few plain pictures, take one seldom: else the same few would be behind everything.
        if any_ground and len(self.plain) and rng.uniform() < min(0.5, len(self.plain) / 40):
            picture = self.subjects[self.pick(rng, self.plain)]
            if picture.path not in other_than:
                return Background(open_square(picture.path, self.size, rng), "", picture.path)
        if any_ground and rng.uniform() < 0.65:
            variant = int(rng.integers(N_GROUNDS))
            # The subject follows from the variant, so that the ground is painted once. 7: flips and turns.
            subject = self.subjects[self.pick(np.random.default_rng(variant), self.cutouts)]
            image = paint_ground(self.size, variant, subject).transpose(int(rng.integers(7)))
            return Background(image, "", "")
        words = str(rng.choice([words for words in BACKGROUNDS if words not in other_than]))
        image = paint_background(words, self.size, int(rng.integers(N_BACKGROUNDS)))
        return Background(ImageOps.mirror(image) if rng.uniform() < 0.5 else image, words, words)

    def scene(self, indices, cutouts, rng, anywhere=0.0, other_than=(), any_ground=False, mark=""):
        """Cut-outs of these pictures -> Scene. The rest: see choose_placements, background, write_caption."""
        chosen, on_black, masks = choose_placements(rng, len(cutouts), anywhere), [], []
        background = self.background(rng, other_than, any_ground)
        image = background.image
        for cutout, (placement, _, _) in zip(cutouts, chosen):
            image, alone, mask = compose(cutout, image, placement)
            on_black.append(np.asarray(alone))
            masks.append(np.asarray(mask))
        labels = tuple(self.subjects[i].label for i in indices)
        things = [(label, size, place) for label, (_, size, place) in zip(labels, chosen)]
        caption = write_caption(rng, things, background.words, mark) if background.words else ""
        places = [place for _, _, place in chosen]
        return Scene(np.asarray(image), caption, labels, on_black, masks, places, background.name)

    def elsewhere(self, cutout, placement, scene, rng):
        """A reference: the cut-out on another background than the scene's -> uint8 (H, W, 3)"""
        background = self.background(rng, [scene.background_name], any_ground=True)
        return np.asarray(compose(cutout, background.image, placement)[0])

    def redrawn(self, indices, rng, mark=""):
        """A scene of these pictures' subjects; the references show each elsewhere, in another view if any."""
        cutouts, references = [self.cutout(i, rng) for i in indices], []
        scene = self.scene(indices, cutouts, rng, mark=mark)
        for i, cutout in zip(indices, cutouts):
            if views := self.subjects.other_views(i):
                cutout = open_cutout(self.subjects[views[rng.integers(len(views))]], self.size)
            where = AS_GIVEN if rng.uniform() < 0.65 else free_placement(rng)
            references.append(self.elsewhere(cutout, where, scene, rng))
        return scene.sample(*references)
