"""Subjects, backgrounds, scenes and tasks: all that the model is taught with, composed on the fly.

    Subject (a cut-out, a label) + background (a picture, its words) + Placement -> scene, cut-out, caption
"""
import functools
import json
import os
import re
import sys
import unicodedata
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mentor import MAX_BACKGROUND, MAX_CAPTION, MAX_LABEL, TASKS, clean_label, clean_text, words_of
from tokenizer import (BACKGROUNDS, BLACK, COLOURS, HUE_TURNS, OPERATIONS, SHAPES, BadInput, draw_background,
                       draw_emoji, draw_ground, draw_shape, emoji_font, fill_outline, is_cutout, open_square,
                       operate, over, read_image, turn_hue)

# ---- Subjects: where the cut-outs come from ---------------------------------------------------------------

class Subject(NamedTuple):
    name: str                # pictures of one name show the same subject
    label: str               # what the prompts call it
    source: str              # "emoji", "shapes" or "file": how `cutout` reads it
    path: str                # the character, the shape's recipe, or the image file
    mask: str = ""           # a mask image beside the file, where the alpha channel does not say it
    has_cutout: bool = True  # False: a plain picture, for tasks that need no cut-out, and for backgrounds
    caption: str = ""        # a plain picture's words
    split: str = ""          # "train" or "test", where a metadata.jsonl says so


say_once = functools.cache(lambda text: print(text, file=sys.stderr))
NO_EMOJI = "no colour emoji font found (apt-get install fonts-noto-color-emoji brings one)"
# Signs rather than things: letters in boxes, arrows, clock faces, skin tones, flags of letters.
NOT_A_THING = re.compile(
    r"REGIONAL|FITZPATRICK|COMPONENT|SQUARED|CIRCLED|IDEOGRAPH|ARROW|KEYCAP|CLOCK FACE|TRIANGLE|SIGN\b|SYMBOL"
    r"|MARK\b|SQUARE$|CIRCLE$|DIAMOND|INPUT|BUTTON|HEAVY|CURLY|DIGIT|NUMBER|LARGE|VARIATION")
EMOJI = [*range(0x2300, 0x2C00), *range(0x1F300, 0x1FB00)]  # code points of Unicode's pictures
is_emoji_set = functools.cache(lambda folder: any(folder.glob("*1f[3-9a][0-9a-f][0-9a-f].*")))
IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


def emoji_label(char):
    """Its name in Unicode; "" where that is no thing's, or too long."""
    name = unicodedata.name(char, "").lower()
    return name if len(words_of(name)) <= MAX_LABEL and not NOT_A_THING.search(name.upper()) else ""


def emoji_subjects():
    """Every drawn thing of the machine's colour emoji font, by its Unicode name. Raises BadInput."""
    if emoji_font() is None:
        raise BadInput(f"emoji: {NO_EMOJI}")
    for char in map(chr, EMOJI):
        if (name := emoji_label(char)) and draw_emoji(char).getbbox():
            yield Subject("emoji/" + name, name, "emoji", char)


def code_point_label(path):
    """What a file shows that is named as in emoji sets: 1f436.png, emoji_u1f436.png, 2600-fe0f.png; in other
    folders, and for other names, "". Raises ValueError where that is no one thing."""
    match = re.fullmatch("(?:(?:emoji_)?u)?([0-9a-f]{2,5})((?:[-_][0-9a-f]{2,5})*)", path.stem.lower())
    if not match or not is_emoji_set(path.parent):
        return ""
    number = int(match[1], 16)
    if number in EMOJI and match[2][1:] in ("", "fe0f") and (label := emoji_label(chr(number))):
        return label
    raise ValueError("an emoji of several characters, or one that is no thing")


def shape_subjects():
    """Two-coloured shapes: drawn by code, for tests and for machines without an emoji font."""
    return [Subject(f"shapes/{a} {b} {shape}", f"{a} {b} {shape}", "shapes", f"{shape} {a} {b}")
            for shape in SHAPES for a in COLOURS for b in COLOURS if a != b]


def folder_records(root):
    """What a folder says of its images, as lines of JSON: its metadata.jsonl, or else a line a file."""
    if (root / "metadata.jsonl").is_file():
        with open(root / "metadata.jsonl", encoding="utf-8-sig", errors="replace") as lines:
            yield from lines
        return
    for folder, _, files in sorted(os.walk(root)):  # (follows no links to folders: they may lead in circles)
        for file in sorted(files):
            if os.path.splitext(file)[1].lower() in IMAGE_ENDINGS:
                yield json.dumps({"file_name": os.path.relpath(os.path.join(folder, file), root)})


def file_subject(root, line):
    """A line of folder_records -> Subject. Raises whatever is wrong with it."""
    record = {name: value for name, value in json.loads(line).items() if value not in (None, "")}
    path, mask = root / record["file_name"], root / record.get("mask", record["file_name"])
    if any(os.path.relpath(file, root).split(os.sep)[0] == ".." for file in (path, mask)):
        raise ValueError("leads out of the folder")
    mirrored = path.with_name(path.name.replace("_mirror", ""))  # owl_mirror.png is a view of owl.png
    original = mirrored if mirrored.is_file() else path
    sidecar = original.with_suffix(".txt")
    beside = sidecar.read_text("utf-8", "replace") if sidecar.is_file() else ""
    text = str(record.get("text", beside)) or str(record.get("label", "")) or code_point_label(original)
    file_or_class = original.stem if path.parent == root else path.parent.name
    text = clean_text(text, MAX_CAPTION) or clean_text(file_or_class, MAX_CAPTION)
    subject_id = record.get("subject_id")
    name = original.relative_to(root).as_posix() if subject_id is None else f"subject_id {subject_id}"
    has_mask, label = mask != path, clean_label(str(record.get("label", text)))[0] or clean_label(text)[0]
    subject = Subject(f"{root.resolve().name}/{name}", label, "file", str(path), str(mask) * has_mask,
                      is_cutout(path) or has_mask, text, record.get("split", ""))
    json.dumps(subject, ensure_ascii=False).encode()  # raises where its name is not Unicode
    return subject


def folder_subjects(folder, skipped):
    """A user's own images. Adds to `skipped` what is unusable, and why. Raises BadInput without a folder."""
    root = Path(folder)
    if not root.is_dir():
        raise BadInput(f"{folder}: no such folder (give emoji, shapes or a folder of images)")
    for number, line in enumerate(folder_records(root), 1):
        if not line.strip():
            continue
        try:
            subject = file_subject(root, line)
        except Exception as error:  # a damaged file can fail anywhere inside pillow
            skipped.append(f"{line.strip()[:80]} ({type(error).__name__}: {error})")
            continue
        if subject.split not in ("", "train", "test"):
            raise BadInput(f"{root / 'metadata.jsonl'}, line {number}: \"split\" is "
                           f'{json.dumps(subject.split)}: write "train" or "test", or leave it out')
        yield subject


@functools.lru_cache(maxsize=4000)  # at 64 px, as the cpu preset has it, 65 MB at most
def cutout(subject, size=256):
    """The subject's pixels, cropped to its mask -> RGBA image, at most `size` a side. Raises BadInput."""
    image = {"emoji": draw_emoji, "shapes": draw_shape, "file": read_image}[subject.source](subject.path)
    if subject.mask:
        mask = over(read_image(subject.mask), BLACK).convert("L")
        half = mask.getextrema()[1] / 2  # never at > 0: no halo of the old background
        image.putalpha(mask.resize(image.size, Image.Resampling.NEAREST).point(lambda v: 255 * (v > half)))
    if image.mode != "RGBA":
        raise BadInput(f"{subject.path}: no cut-out any more (has the file changed?)")
    alpha = image.getchannel("A").point(lambda v: 255 * (v > 127))
    if len(alpha.getcolors()) < 2:
        where = "mask" if subject.mask else "alpha"
        raise BadInput(f"{subject.path}: its {where} is empty, or hides nothing: this is no cut-out")
    image = image.crop(alpha.getbbox())
    image.thumbnail((size, size), reducing_gap=3)
    return image


# ---- All subjects of a run, found once and kept in an index -----------------------------------------------

def is_held_out(subject, by_label=True):
    """One subject in ten is never trained on: where no split says, by a hash of its label, so that no other
    hand's drawing of that thing is seen either, in any source; or of its name, where labels are few."""
    one_in_ten = zlib.crc32((subject.label if by_label else subject.name).encode()) % 10 == 0
    return subject.split == "test" if subject.split else one_in_ten


# subject: a number that its pictures share; start, end: of its line. (Unaligned, searchsorted would copy.)
FIELDS = np.dtype([("subject", "i8"), ("start", "i8"), ("end", "i8"), ("held_out", "?"), ("has_cutout", "?")],
                  align=True)


class Subjects:
    """All pictures of a run, a sequence of Subject. Kept as lines of text in one array and a few numbers each
    (FIELDS), pictures of one subject side by side: a million are a few big arrays, which forked workers
    share, and not ten million objects. report: what there is, in words."""
    def __init__(self, lines, table, report):
        self.lines, self.table, self.report = lines, table, report

    def __len__(self):
        return len(self.table)

    @functools.lru_cache(maxsize=4000)
    def __getitem__(self, i):
        return Subject(*json.loads(self.lines[self.table["start"][i]:self.table["end"][i]].tobytes()))

    def other_views(self, i):
        """Indices of all other cut-outs that show the subject of picture i."""
        numbers, has_cutout = self.table["subject"], self.table["has_cutout"]
        views = range(*np.searchsorted(numbers, [numbers[i], numbers[i] + 1]))
        return [view for view in views if view != i and has_cutout[view]]


def load_subjects(sources=None):
    """`emoji`, `shapes`, a folder, or several with commas -> Subjects. None: emoji, or else shapes. Raises
    BadInput."""
    if sources is None and emoji_font() is None:
        print(f"{NO_EMOJI}: using --data shapes", file=sys.stderr)
        sources = "shapes"
    sources = [source for source in (sources or "emoji").split(",") if source]
    if len({Path(source).resolve().name for source in sources}) < len(sources):
        raise BadInput(f"{','.join(sources)}: two sources of one name: rename one folder")
    numbers, labels, rows, skipped, lines = {}, set(), [], [], bytearray()
    for source in sources:
        before, builtin = len(rows), {"emoji": emoji_subjects, "shapes": shape_subjects}.get(source)
        for subject in builtin() if builtin else folder_subjects(source, skipped):
            start, number = len(lines), numbers.setdefault(subject.name, len(numbers))
            lines += json.dumps(subject).encode()
            rows.append((number, start, len(lines), is_held_out(subject), subject.has_cutout))
            labels.add(subject.label)
        if len(rows) == before:
            endings, why = ", ".join(sorted(IMAGE_ENDINGS)), "".join(skipped[:1])
            raise BadInput(f"{source}: not one usable image in it (looked for {endings}) {why}")
    lines, table = np.frombuffer(lines, np.uint8), np.array(rows, FIELDS)
    if len(labels) < 100:
        table["held_out"] = [is_held_out(subject, by_label=False) for subject in Subjects(lines, table, "")]
    table["held_out"] = np.bincount(table["subject"], table["held_out"])[table["subject"]] > 0  # all views
    table = table[table["subject"].argsort(kind="stable")]
    views, n_cutouts = np.bincount(table["subject"]), table["has_cutout"].sum()
    report = (f"{len(table)} images, {n_cutouts} of them cut-outs; {len(numbers)} subjects, {len(labels)} "
              f"labels, {(views * (views - 1)).sum()} pairs of views; skipped {len(skipped)} files"
              + "".join(f"\n  {why}" for why in skipped[:3]))
    return Subjects(lines, table, report)


# ---- Scenes: subjects somewhere on a background -----------------------------------------------------------

SIZES = {"": 0.75, "small": 0.5}  # word: side of the subject's box, as a share of the canvas
PLACES = {"on the left": 0.0, "": 0.5, "on the right": 1.0}
N_BACKGROUNDS, N_GROUNDS = 60, 2000  # drawings of each background, and grounds: each drawn once a worker


class Placement(NamedTuple):
    side: float  # of the square box that the subject fills, as a share of the canvas
    x: float     # share of the free space that lies left of the box: 0 left, 1 right
    y: float     # and above it


def named_placement(size, place):
    """The placement of a caption's words: in whole patches, so that what is only moved keeps its codes."""
    return Placement(SIZES[size], PLACES[place], 0.5 if size == "" else 0.75)


AS_GIVEN = named_placement("", "")  # how a reference is best given: the subject large, in the middle
# Where several subjects stand: two side by side, or up to four in the quarters, each in whole patches.
SIDES = {place: named_placement("small", place) for place in ("on the left", "on the right")}
QUARTERS = {f"at the {row} {column}": Placement(0.5, x, y)
            for row, y in (("top", 0.0), ("bottom", 1.0)) for column, x in (("left", 0.0), ("right", 1.0))}


def free_placement(rng):
    return Placement(rng.uniform(0.5, 0.9), rng.uniform(), rng.uniform())


def choose_looks(rng, n, anywhere=0.0):
    """Where n subjects stand -> (placement, size, place) each, the last two in words; None: unsaid. A single
    one may, with probability `anywhere`, stand where no words say."""
    if n > 1:
        slots = SIDES if n == 2 and rng.uniform() < 0.5 else QUARTERS
        return [(slots[place], None, str(place)) for place in rng.permutation(list(slots))[:n]]
    if rng.uniform() < anywhere:
        return [(free_placement(rng), None, None)]
    size, place = str(rng.choice(list(SIZES))), str(rng.choice(list(PLACES)))
    return [(named_placement(size, place), size, place)]


def write_caption(rng, things, background, mark=""):
    """A wording of things, (label, size, place) each; "": big, in the middle; None: unsaid; mark: <image>."""
    phrases = []
    for label, size, place in things:
        size = rng.choice(["", "big"]) if size == "" else size or ""
        place = rng.choice(["", "in the middle"]) if place == "" else place or ""
        thing = f"{size} {label}{mark}".strip()
        thing = f"{'an' if thing[:1] in 'aeiou' else 'a'} {thing}"
        phrases.append(f"{thing} {place}".strip())
    named = " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))
    wordings = [f"{background}, {named}", f"{named}, {background}"]
    if len(things) == 1:  # then it is the thing, and this is its place
        wordings.insert(0, f"{thing} {background}, {place}")
    return wordings[rng.integers(len(wordings))].strip(" ,")


def compose(sprite, background, placement):
    """Pastes an RGBA sprite into its box, at the bottom centre -> scene, sprite alone on black, its mask."""
    side, canvas = placement.side * background.width, background.width
    w, h = (max(1, round(n * side / max(sprite.size))) for n in sprite.size)
    x = round(placement.x * (canvas - side) + (side - w) / 2)
    y = round(placement.y * (canvas - side) + side - h)
    sprite = sprite.resize((w, h), Image.Resampling.BICUBIC)
    scene, alone, mask = background.copy(), *(Image.new(mode, background.size) for mode in ("RGB", "L"))
    scene.paste(sprite, (x, y), sprite)
    alone.paste(sprite, (x, y), sprite)
    mask.paste(sprite.getchannel("A"), (x, y))
    return scene, alone, mask


@functools.lru_cache(maxsize=N_GROUNDS)
def ground(size, number, other):
    return draw_ground(size, np.random.default_rng(number), cutout(other, size))


def vary(sprite, rng):
    """Another look and angle at random: no label tells the look, the reference must be looked at."""
    if rng.uniform() < 0.5:
        sprite = ImageOps.mirror(sprite)
    if rng.uniform() < 0.6:
        sprite = turn_hue(sprite, int(rng.integers(256)))
    if rng.uniform() < 0.3:
        for change in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
            sprite = change(sprite).enhance(rng.uniform(0.5, 1.3))
    if rng.uniform() < 0.2:
        sprite = sprite.rotate(rng.uniform(-25, 25), Image.Resampling.BILINEAR, expand=True)
        sprite = sprite.crop(sprite.getbbox())
    return sprite


def distort(sprite, rng):
    """Recovery's damage (official code): with p .5 stretch, shear, rotation, corners jittered by 20%."""
    if rng.uniform() < 0.5:
        return sprite
    angle = np.radians(rng.uniform(-20, 20))
    turn = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    shear, stretch = np.array([(1, rng.uniform(-0.3, 0.3)), (0, 1)]), np.diag([rng.uniform(0.7, 1.3), 1])
    corners = np.array([(-1, -1), (-1, 1), (1, 1), (1, -1)]) * rng.uniform(1.0, 1.2, (4, 2))
    # QUAD asks which point of the sprite each corner of the result shows; beyond the sprite all is clear.
    quad = ((corners @ stretch @ shear.T @ turn.T) + 1) / 2 * sprite.size
    return sprite.transform(sprite.size, Image.Transform.QUAD, quad.flatten(), Image.Resampling.BICUBIC)


# ---- Tasks ------------------------------------------------------------------------------------------------

class Sample(NamedTuple):
    labels: tuple         # what the prompt calls its references, and asks for
    caption: str
    references: list      # uint8 (H, W, 3) each
    target: np.ndarray    # uint8 (H, W, 3): the picture to draw
    mask: np.ndarray      # uint8 (H, W): how much of each pixel the subject covers; 0 in a plain picture
    task: str = ""
    hide: str = ""        # from the model: "text", "all" (mentor.hide_condition), or the "picture" so far


class Tasks:
    """A map-style dataset of Sample: item `index` is a pure function of (seed, index), whatever the workers.
    mix: task -> its share. seed: a list of numbers. With `train`, a subject that a reference shows is
    varied, unless it has other views; without, the dataset holds the held-out subjects alone."""
    def __init__(self, subjects, mix, size, seed, train=True, backgrounds=()):
        self.subjects, self.mix, self.size, self.seed, self.train = subjects, mix, size, seed, train
        self.backgrounds = backgrounds
        has_cutout, wanted = subjects.table["has_cutout"], subjects.table["held_out"] != train
        if not (wanted & (has_cutout | ~has_cutout.any())).any():
            say_once("too few subjects to hold one in ten out: held-out figures are of training subjects")
            wanted = wanted | True
        self.all, self.cutouts = np.flatnonzero(wanted), np.flatnonzero(wanted & has_cutout)  # indices
        self.plain = np.flatnonzero(wanted & ~has_cutout)
        if not len(self.cutouts) and any(TASKS[task].needs_cutout for task in mix):
            raise BadInput("none of these images has alpha or a mask: "
                           "train with --mix text-to-image=.8,reconstruction=.2")

    def __getitem__(self, index):
        rng = np.random.default_rng([*self.seed, index])
        task = str(rng.choice(list(self.mix), p=list(self.mix.values())))
        make = getattr(self, task.replace("-", "_"))
        pool = self.cutouts if TASKS[task].needs_cutout else self.all
        for _ in range(100):
            i = pool[rng.integers(len(pool))]
            try:
                sample = make(i, self.subjects[i], rng)
            except BadInput as error:  # a broken file: another subject takes its place
                say_once(f"skipped: {error}")
                continue
            # Where words alone decide, what is drawn so far would tell it sooner: mostly hide it.
            hidden = {"text-to-image": 0.65, "segmentation": 0.3}.get(task, 0.15)
            hide = ["all", "text", "picture", ""][rng.choice(4, p=[0.1, 0.05, hidden, 0.85 - hidden])]
            return sample._replace(task=task, hide=hide)
        raise BadInput("a hundred images in a row could not be read")

    # One method a task: picture i, which shows the subject -> Sample
    def text_to_image(self, i, subject, rng):
        if not subject.has_cutout:
            return self.plain_picture(subject)
        return self.scene([i], [cutout(subject, self.size)], rng)[0]

    def reconstruction(self, i, subject, rng):
        """The target is the reference. Where its ground has no words, and once in ten, nor has the prompt."""
        if not subject.has_cutout:
            scene = self.plain_picture(subject)
        else:
            scene = self.scene([i], [self.sprite(i, rng)], rng, 0.7, any_ground=rng.uniform() < 0.5)[0]
        return scene._replace(references=[scene.target], caption=scene.caption if rng.uniform() < 0.9 else "")

    def segmentation(self, i, subject, rng):
        """The target is the subject's own pixels, in place, on black: the only one, or one of several, asked
        for by label, place or both. Where labels tell them apart they look as they do."""
        numbers = self.different(i, rng.choice([1, 2, 3, 4], p=[0.15, 0.2, 0.25, 0.4]), rng)
        asked_by = str(rng.choice(["label", "place", "both"], p=[0.75, 0.17, 0.08])) * (len(numbers) > 1)
        sprites = [self.sprite(number, rng, change=asked_by != "label") for number in numbers]
        scene, parts, _ = self.scene(numbers, sprites, rng, anywhere=0.7, any_ground=True)
        alone, mask, place = parts[0]
        asked = {"place": f"thing {place}", "both": f"{subject.label} {place}"}.get(asked_by, subject.label)
        return scene._replace(labels=(asked,), references=[scene.target], target=np.asarray(alone), mask=mask)

    def recovery(self, i, subject, rng):
        """The reference is the subject distorted, anywhere on another background."""
        sprite = self.sprite(i, rng)
        scene, _, background = self.scene([i], [sprite], rng)
        where = Placement(rng.uniform(0.4, 1.0), rng.uniform(), rng.uniform())
        return scene._replace(references=[self.elsewhere(distort(sprite, rng), where, background, rng)])

    def subject_driven(self, i, subject, rng):
        """The reference is the subject on another background."""
        return self.redrawn([i], rng)

    def multi_image(self, i, subject, rng):
        """The references are several subjects, each on another background, in the order in which the caption
        names them, each behind its name; the target shows all of them."""
        return self.redrawn(rng.permutation(self.different(i, rng.integers(2, 5), rng)), rng, " <image>")

    def in_context(self, i, subject, rng):
        """The references are an example, before and after, and a query; the target is what comes after it."""
        operation = str(rng.choice(list(OPERATIONS), p=list(OPERATIONS.values())))
        turn, pictures = int(rng.choice(HUE_TURNS)), []
        behind, _, *names = self.background(rng)
        for j in (self.different(i, 2, rng)[-1], i):  # the example's picture, then the query
            scene, parts, name = self.scene([j], [self.sprite(j, rng)], rng, 0.0, names, any_ground=True)
            (alone, mask, _), = parts
            names.append(name)
            after = operate(operation, scene.target, np.asarray(alone), mask, np.asarray(behind), turn)
            pictures += [scene.target, after]
        *references, target = pictures
        mask = mask[:, ::-1] if operation == "mirror" else mask
        return scene._replace(references=references, target=target, mask=mask)

    def plain_picture(self, subject):
        target = np.asarray(open_square(subject.path, self.size))
        return Sample((subject.label,), subject.caption, [], target, np.zeros_like(target[..., 0]))

    def sprite(self, i, rng, change=True):
        """Picture i's cut-out; in training varied, two in five with another's pixels, unless views do it."""
        sprite = cutout(self.subjects[i], self.size)
        if not self.train or not change or self.subjects.other_views(i):
            return sprite
        if rng.uniform() < 0.4:
            other = self.subjects[self.cutouts[rng.integers(len(self.cutouts))]]
            sprite = fill_outline(sprite, cutout(other, self.size))
        return vary(sprite, rng)

    def different(self, i, n, rng):
        """Picture i and up to n - 1 more cut-outs, all of different labels -> list of numbers"""
        chosen = {self.subjects[i].label: i}
        for number in rng.choice(self.cutouts, 20):  # (there may be fewer labels)
            if len(chosen) < n:
                chosen.setdefault(self.subjects[number].label, number)
        return list(chosen.values())

    def background(self, rng, other_than=(), any_ground=False):
        """A photograph of --backgrounds, or one drawn by code; any_ground, where no caption names it: a part
        of a picture, too, or any look -> RGB image, its words or "", its name, which is none of other_than"""
        pools = [(self.backgrounds, range(len(self.backgrounds)), 0.5)]
        if any_ground:  # few pictures are taken seldom: they would soon be everywhere
            pools.append((self.subjects, self.plain, min(0.5, len(self.plain) / 40)))
        for pictures, indices, share in pools:
            if len(indices) and rng.uniform() < share:
                picture = pictures[indices[rng.integers(len(indices))]]
                if picture.path not in other_than:
                    image = open_square(picture.path, self.size, rng if any_ground else None)
                    words = picture.caption if pictures is self.backgrounds else ""  # (others name things)
                    return image, clean_text(words, MAX_BACKGROUND), picture.path
        if any_ground and rng.uniform() < 0.65:
            number = int(rng.integers(N_GROUNDS))
            other = self.subjects[self.cutouts[zlib.crc32(b"%d" % number) % len(self.cutouts)]]
            image = ground(self.size, number, other).transpose(int(rng.integers(7)))
            return image, "", ""
        words = str(rng.choice([words for words in BACKGROUNDS if words not in other_than]))
        image = draw_background(words, self.size, int(rng.integers(N_BACKGROUNDS)))
        return ImageOps.mirror(image) if rng.uniform() < 0.5 else image, words, words

    def scene(self, numbers, sprites, rng, anywhere=0.0, other_than=(), any_ground=False, mark=""):
        """Sprites of these pictures, as the caption says, if the background has words -> Sample without
        references; of each its image alone on black, its mask, its place in words; the background's name."""
        looks, parts = choose_looks(rng, len(sprites), anywhere), []
        image, words, name = self.background(rng, other_than, any_ground)
        for sprite, (placement, _, place) in zip(sprites, looks):
            image, alone, mask = compose(sprite, image, placement)
            parts.append((alone, np.asarray(mask), place))
        labels = tuple(self.subjects[number].label for number in numbers)
        things = [(label, *look[1:]) for label, look in zip(labels, looks)]
        caption = write_caption(rng, things, words, mark) if words else ""
        mask = np.maximum.reduce([mask for _, mask, _ in parts])
        return Sample(labels, caption, [], np.asarray(image), mask), parts, name

    def elsewhere(self, sprite, placement, other_than, rng):
        """A reference: the sprite on another background than the target's."""
        image, _, _ = self.background(rng, [other_than], any_ground=True)
        return np.asarray(compose(sprite, image, placement)[0])

    def redrawn(self, numbers, rng, mark=""):
        """A scene of these pictures' subjects. The references show them elsewhere, in another view if any."""
        sprites = [self.sprite(number, rng) for number in numbers]
        scene, _, background = self.scene(numbers, sprites, rng, mark=mark)
        for number, sprite in zip(numbers, sprites):
            if views := self.subjects.other_views(number):
                sprite = cutout(self.subjects[views[rng.integers(len(views))]], self.size)
            where = AS_GIVEN if rng.uniform() < 0.65 else free_placement(rng)
            scene.references.append(self.elsewhere(sprite, where, background, rng))
        return scene
