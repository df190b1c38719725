"""What a model is taught with, composed on the fly. From one emoji to one training row, in order of calls:

    emoji_subjects -> Subjects -> TaskDataset.__getitem__ -> the task's method (open_cutout, vary, scene)
    -> Sample -> train.collate and lay_out (fill_prompt, mentor.build_sequence) -> Batch -> train.fill_codes

    subject      a thing with a label. A Subject is one picture of it; others are its views
    cut-out      an RGBA image of a subject alone, cropped to its mask; on black: in its place, on black
    background   what is behind the subjects. It has words if a caption can name it. A ground has none
    placement    where a cut-out stands. A scene is one or more cut-outs on a background
    reference    a picture in the prompt. The target is the picture to draw
    copy         of a reference: copy 0 shows it as it is, copy 1 at two thirds. A task uses one or both
    paint, draw  code paints a picture with Pillow; the model draws one, patch by patch
"""
import functools
import json
import os
import re
import sys
import unicodedata
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFont, ImageOps

from mentor import WORD, BadInput, words_of

say_once = functools.cache(lambda text: print(text, file=sys.stderr))

# ---- Picture files ----------------------------------------------------------------------------------------

warnings.simplefilter("error", Image.DecompressionBombWarning)  # more than 89 megapixels
IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
BLACK, WHITE = (0, 0, 0, 255), (255, 255, 255, 255)


def read_image(path, least=None):
    """Any image file, turned as its EXIF says -> an RGBA image if it is a cut-out, else RGB, on white.
    least: pixels that each side must keep; a larger JPEG is then decoded at a half, a quarter or an eighth,
    which is faster. Raises BadInput, which names the file."""
    try:
        with Image.open(path) as image:
            if least:
                image.draft(None, (least, least))
            if image.mode[0] in "IF":  # I;16, I, F: convert() would clip them
                image = to_8_bits(image)
            if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
                image = ImageChops.invert(image)  # pillow inverts all; only Adobe's are inverted
            has_alpha = image.has_transparency_data
            image = ImageOps.exif_transpose(image).convert("RGBA" if has_alpha else "RGB")
            return image if not has_alpha or has_free_border(image.getchannel("A")) else over(image, WHITE)
    except Exception as error:  # a damaged file can fail anywhere inside pillow
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{path}: not a readable image ({reason})") from error


def to_8_bits(image):
    """16 or 32 bits a pixel -> L. White is the first of 1, 255 and 65,535 that no pixel exceeds."""
    pixels = np.asarray(image, np.float64)
    least, most = pixels.min(), pixels.max()
    white = next((white for white in (1, 255, 65535) if most <= white), 0)
    if not white or not least >= 0:
        raise ValueError(f"its mode {image.mode} has pixels from {least:g} to {most:g}: save it with 8 bits")
    return Image.fromarray((pixels * (255 / white)).round().astype(np.uint8))


def has_free_border(alpha):
    """Whether a quarter of the border is transparent, as in cut-outs (round corners and holes leave less)."""
    opaque = np.asarray(alpha) > 127
    if not opaque.any():
        raise ValueError("nothing in it is opaque")
    border = np.concatenate((opaque[0], opaque[-1], opaque[:, 0], opaque[:, -1]))
    return border.mean() < 0.75


def is_cutout(path):
    """Whether read_image gives RGBA. (Of a file without alpha it reads the header only.)"""
    with Image.open(path) as image:
        return image.has_transparency_data and read_image(path).mode == "RGBA"


def over(image, colour):
    """An RGB or RGBA image -> RGB image; `colour` (RGBA) shows where it is transparent."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, colour), image)
    return image.convert("RGB")


def square_of(image, size, share=1, x=0.5, y=0.5):
    """A square part of an image -> size x size. Its side is a share of the shorter side; x, y are shares of
    the space that is left."""
    side = share * min(image.size)
    left, top = (at * (n - side) for at, n in zip((x, y), image.size))
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box, reducing_gap=3)


def open_square(path, size, rng=None):
    """Any image file -> RGB, size x size: its central square, or with rng a random part. Raises BadInput."""
    where = () if rng is None else rng.uniform((0.4, 0, 0), 1)
    return over(square_of(read_image(path, least=2 * size), size, *where), WHITE)


def widened(picture, margin):
    """uint8 (H, W, 3) -> an image with `margin` pixels more on each side, which repeat its edges"""
    return Image.fromarray(np.pad(picture, ((margin, margin), (margin, margin), (0, 0)), mode="edge"))


# ---- Painted by code: emoji, shapes, backgrounds, grounds -------------------------------------------------

N_BACKGROUNDS, N_GROUNDS = 60, 2000  # of each background, and of grounds: each is painted once a worker
EMOJI_FONTS = {  # file: the one pixel size that its bitmaps have (Debian, Arch, Fedora, macOS, Windows)
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf": 109, "/usr/share/fonts/noto/NotoColorEmoji.ttf": 109,
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf": 109,
    "/System/Library/Fonts/Apple Color Emoji.ttc": 160, "C:/Windows/Fonts/seguiemj.ttf": 128}


@functools.cache
def emoji_font():
    found = (ImageFont.truetype(path, size) for path, size in EMOJI_FONTS.items() if os.path.exists(path))
    return next(found, None)


def paint_emoji(char):
    font = emoji_font()
    image = Image.new("RGBA", (2 * font.size, 2 * font.size))
    ImageDraw.Draw(image).text((font.size // 4, font.size // 4), char, font=font, embedded_color=True)
    return image


# Points around the middle; how far out every second one is.
SHAPES = {"circle": (64, 1), "triangle": (3, 1), "square": (4, 1), "pentagon": (5, 1), "hexagon": (6, 1),
          "star": (10, 0.45), "sun": (16, 0.45), "cross": (8, 0.45)}
COLOURS = {"red": (220, 40, 40), "green": (50, 170, 70), "blue": (50, 90, 220), "yellow": (240, 210, 50),
           "purple": (150, 60, 190), "orange": (245, 140, 40), "white": (240, 240, 240),
           "grey": (120, 120, 120)}


def paint_shape(recipe):
    """"star red blue" -> an RGBA image: a red star with a blue one inside"""
    shape, outer, inner = recipe.split()
    image, (n, inward) = Image.new("RGBA", (128, 128)), SHAPES[shape]
    turns = np.linspace(0, 2 * np.pi, n, endpoint=False)
    around = np.stack((np.sin(turns), -np.cos(turns)), 1)  # (n, 2)
    around[1::2] *= inward
    for radius, colour in ((60, outer), (30, inner)):
        ImageDraw.Draw(image).polygon((64 + radius * around).flatten().tolist(), fill=COLOURS[colour])
    return image


# Words: the colours of the sky at the top and at the horizon, of the ground at the horizon and at the bottom.
BACKGROUNDS = {
    "on the grass": ((90, 170, 240), (205, 232, 250), (125, 195, 80), (60, 140, 50)),
    "on the beach": ((110, 190, 245), (210, 235, 250), (240, 220, 160), (225, 195, 130)),
    "in the snow": ((150, 185, 220), (225, 235, 245), (250, 250, 255), (210, 222, 240)),
    "in the desert": ((240, 180, 100), (252, 228, 175), (228, 175, 100), (190, 130, 70)),
    "in the city at night": ((12, 14, 45), (55, 45, 95), (48, 48, 58), (28, 28, 34)),
    "in the forest": ((150, 200, 190), (200, 225, 190), (85, 115, 55), (50, 80, 30)),
    "under water": ((90, 190, 225), (40, 130, 195), (30, 100, 170), (12, 45, 100)),
    "in space": ((6, 6, 22), (14, 10, 40), (14, 10, 40), (30, 12, 55)),
    "at sunset": ((95, 55, 125), (250, 150, 80), (120, 60, 80), (55, 30, 60)),
    "on the road": ((140, 195, 240), (220, 235, 245), (105, 105, 110), (75, 75, 80)),
    "in a room": ((238, 218, 190), (228, 205, 172), (165, 110, 68), (120, 75, 45)),
    **{f"on {'an' if name == 'orange' else 'a'} {name} background": (c,) * 4 for name, c in COLOURS.items()}}


@functools.lru_cache(maxsize=1500)
def paint_background(words, size, variant):
    """The background of these words -> RGB, size x size. Each variant has its own light and details."""
    rng = np.random.default_rng([variant, list(BACKGROUNDS).index(words)])
    big = 2 * size  # painted twice as large and averaged: smooth edges
    light = rng.uniform(0.9, 1.1) if words.endswith("background") else rng.uniform(0.9, 1.1, 2).repeat(2)
    colours = np.clip(np.array(BACKGROUNDS[words]) * np.reshape(light, (-1, 1)), 0, 255)  # (4, 3)
    sky, sky_low, ground, ground_low = colours
    # The horizon, the place of a thing, dots: in 64ths of the canvas, like all details.
    h, x, dots = rng.uniform(33, 38), rng.uniform(8, 56), rng.uniform(0, 64, (12, 2))
    up, down = (np.linspace(0, 1, n)[:, None] for n in (int(h * big / 64), big - int(h * big / 64)))
    column = np.concatenate([sky + (sky_low - sky) * up, ground + (ground_low - ground) * down])  # (big, 3)
    image = Image.fromarray(np.broadcast_to(column[:, None], (big, big, 3)).astype(np.uint8))

    def disc(x, y, r, colour):
        return "ellipse", (x - r, y - r, x + r, y + r), colour
    def box(left, top, right, bottom, colour):
        return "rectangle", (left, top, right, bottom), colour
    def peak(x, top, width, bottom, colour):
        return "polygon", (x - width / 2, bottom, x, top, x + width / 2, bottom), colour

    towers = [(i * 11 - x / 5, h - 6 * (2 + int(dot) % 3)) for i, dot in enumerate(dots[:7, 1])]
    details = {
        "on the grass": [disc(x + dx, 10, r, (250, 250, 252)) for dx, r in ((-5, 3), (0, 4.5), (5, 3.5))],
        "on the beach": [box(0, h - 10, 64, h, (45, 130, 195)), box(0, h - 1.5, 64, h, (235, 245, 250))],
        "in the snow": [peak(x + dx, 10, 40, h, (175, 195, 218)) for dx in (-26, 4, 34)],
        "in the desert": [disc(x, 14, 6, (255, 240, 190))],
        "in the city at night":
            [box(left, top, left + 9, h, (32, 32, 52)) for left, top in towers]
            + [box(left + 2, y, left + 7, y + 2, (250, 220, 120)) for left, top in towers
               for y in np.arange(top + 2, h - 2, 6)],
        "in the forest": [peak(tree, 6, 16, h + 2, (35, 95, 50)) for tree in np.arange(5) * 16 - x / 4],
        "under water": [disc(*dot, 1.6, (150, 215, 240)) for dot in dots],
        "in space": [disc(*dot, 0.8, (255, 255, 230)) for dot in dots],
        "at sunset": [disc(x, 14, 6, (255, 240, 190))],
        "on the road": [box(0, h, 64, h + 3, (120, 160, 90)), box(0, 57, 64, 59, (240, 240, 225))],
        "in a room": [box(x - 7, 6, x + 7, 18, (110, 70, 40)), box(x - 5, 8, x + 5, 16, (250, 250, 245))]}
    pen = ImageDraw.Draw(image)
    for kind, corners, colour in details.get(words, []):
        getattr(pen, kind)([c * big / 64 for c in corners], fill=colour)
    return image.resize((size, size), Image.Resampling.BOX)


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


# ---- Subjects: records of cut-outs and pictures -----------------------------------------------------------

MAX_LABEL, MAX_BACKGROUND, MAX_CAPTION = 5, 8, 20  # words


def clean_text(text, limit=None):
    """A text as the model knows it, in training and in sample.py alike: its first line in lowercase, without
    full stop or <image>, at most `limit` words."""
    text = " ".join(text.strip().split("\n")[0].lower().replace("<image>", " ").split())
    starts = [word.start() for word in WORD.finditer(text)] + [None]
    return text[:starts[limit] if limit and limit < len(starts) else None].rstrip("., ")


def clean_label(text):
    """The name of a thing without its article, and its place among several: ("cat", " on the left" or "")"""
    text = clean_text(re.sub(r"^\s*(an?|the)\s+", "", text, flags=re.I))
    name, place = re.fullmatch(f"(.*?)((?: (?:{'|'.join([*SIDES, *QUARTERS])}))?)", text).groups()
    return clean_text(name, MAX_LABEL), place


class Subject(NamedTuple):
    """One picture, and the subject that it shows."""
    name: str                # pictures of one name show the same subject
    label: str               # what prompts call it
    source: str              # "emoji", "shapes" or "file": how `open_cutout` reads it
    path: str                # the character, the shape's recipe, or the image file
    mask: str = ""           # an image file, where alpha does not cut the subject out
    has_cutout: bool = True  # False: a plain picture, for tasks that need no cut-out, and for backgrounds
    caption: str = ""        # of a plain picture
    split: str = ""          # "train" or "test", where a metadata.jsonl says so


NO_EMOJI = "no colour emoji font found (apt-get install fonts-noto-color-emoji brings one)"
# Signs, not things: letters in boxes, arrows, clock faces, skin tones, flags of letters.
NOT_A_THING = re.compile(
    r"REGIONAL|FITZPATRICK|COMPONENT|SQUARED|CIRCLED|IDEOGRAPH|ARROW|KEYCAP|CLOCK FACE|TRIANGLE|SIGN\b|SYMBOL"
    r"|MARK\b|SQUARE$|CIRCLE$|DIAMOND|INPUT|BUTTON|HEAVY|CURLY|DIGIT|NUMBER|LARGE|VARIATION")
EMOJI = [*range(0x2300, 0x2C00), *range(0x1F300, 0x1FB00)]  # code points of Unicode's pictures
is_emoji_set = functools.cache(lambda folder: any(folder.glob("*1f[3-9a][0-9a-f][0-9a-f].*")))


def emoji_label(char):
    """Its Unicode name; "" if it names no thing or is too long."""
    name = unicodedata.name(char, "").lower()
    return name if len(words_of(name)) <= MAX_LABEL and not NOT_A_THING.search(name.upper()) else ""


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


# What people have in their folders. A record is a line of JSON, as in metadata.jsonl; other folders get one
# record for each image.

def folder_records(root):
    """The records of a folder: the lines of its metadata.jsonl, or else one for each image file."""
    if (root / "metadata.jsonl").is_file():
        with open(root / "metadata.jsonl", encoding="utf-8-sig", errors="replace") as lines:
            yield from lines
        return
    for folder, _, files in sorted(os.walk(root)):  # (follows no links to folders: they may lead in circles)
        for file in sorted(files):
            if os.path.splitext(file)[1].lower() in IMAGE_ENDINGS:
                yield json.dumps({"file_name": os.path.relpath(os.path.join(folder, file), root)})


def code_point_label(path):
    """The label of a file of an emoji set, 1f436.png, emoji_u1f436.png or 2600-fe0f.png; of others "".
    Raises ValueError if it is not a single thing."""
    match = re.fullmatch("(?:(?:emoji_)?u)?([0-9a-f]{2,5})((?:[-_][0-9a-f]{2,5})*)", path.stem.lower())
    if not match or not is_emoji_set(path.parent):
        return ""
    number = int(match[1], 16)
    if number in EMOJI and match[2][1:] in ("", "fe0f") and (label := emoji_label(chr(number))):
        return label
    raise ValueError("an emoji of several characters, or not a thing")


def file_subject(root, line):
    """A record -> Subject. Its words are the first that there is of: text, the .txt beside the file, label,
    code point, name of the file or of its class folder. Raises whatever is wrong with it."""
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
    json.dumps(subject, ensure_ascii=False).encode()  # raises if its name is not Unicode
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
def open_cutout(subject, size=256):
    """The subject's pixels, cropped to its mask -> RGBA image, at most `size` px a side. Raises BadInput."""
    image = {"emoji": paint_emoji, "shapes": paint_shape, "file": read_image}[subject.source](subject.path)
    if subject.mask:
        mask = over(read_image(subject.mask), BLACK).convert("L")
        half = mask.getextrema()[1] / 2  # never at > 0: no halo of the old background
        image.putalpha(mask.resize(image.size, Image.Resampling.NEAREST).point(lambda v: 255 * (v > half)))
    if image.mode != "RGBA":
        raise BadInput(f"{subject.path}: no longer a cut-out (has the file changed?)")
    alpha = image.getchannel("A").point(lambda v: 255 * (v > 127))
    if len(alpha.getcolors()) < 2:
        where = "mask" if subject.mask else "alpha"
        raise BadInput(f"{subject.path}: its {where} is empty, or hides nothing: this is no cut-out")
    image = image.crop(alpha.getbbox())
    image.thumbnail((size, size), reducing_gap=3)
    return image


def is_held_out(subject, by_label=True):
    """One subject in ten is never trained on. If no split says which, a hash of its label decides, so that
    no source shows a held-out thing; where labels are few, a hash of its name."""
    one_in_ten = zlib.crc32((subject.label if by_label else subject.name).encode()) % 10 == 0
    return subject.split == "test" if subject.split else one_in_ten


# subject: an id that its pictures share; start, end: of its line. (Unaligned, searchsorted would copy.)
FIELDS = np.dtype([("subject", "i8"), ("start", "i8"), ("end", "i8"), ("held_out", "?"), ("has_cutout", "?")],
                  align=True)


class Subjects:
    """All pictures of a run, a sequence of Subject. A folder may have a million, and every worker process
    needs them. As Python objects each worker would copy them, some gigabytes. So they are a few arrays, which
    forked workers share: records as lines of JSON in one array of bytes, and FIELDS of each, sorted so that
    the pictures of a subject are neighbours. report: what was found, in words."""
    def __init__(self, lines, table, report):
        self.lines, self.table, self.report = lines, table, report

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
        print(f"{NO_EMOJI}: using --data shapes", file=sys.stderr)
        sources = "shapes"
    sources = [source for source in (sources or "emoji").split(",") if source]
    if len({Path(source).resolve().name for source in sources}) < len(sources):
        raise BadInput(f"{','.join(sources)}: two sources of one name: rename one folder")
    ids, labels, rows, skipped, lines = {}, set(), [], [], bytearray()  # ids: of subjects, by name
    for source in sources:
        before, builtin = len(rows), {"emoji": emoji_subjects, "shapes": shape_subjects}.get(source)
        for subject in builtin() if builtin else folder_subjects(source, skipped):
            start, subject_id = len(lines), ids.setdefault(subject.name, len(ids))
            lines += json.dumps(subject).encode()
            rows.append((subject_id, start, len(lines), is_held_out(subject), subject.has_cutout))
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
    report = (f"{len(table)} images, {n_cutouts} of them cut-outs; {len(ids)} subjects, {len(labels)} "
              f"labels, {(views * (views - 1)).sum()} pairs of views; skipped {len(skipped)} files"
              + "".join(f"\n  {why}" for why in skipped[:3]))
    return Subjects(lines, table, report)


# ---- Scenes: cut-outs on a background ---------------------------------------------------------------------

SIZES = {"": 0.75, "small": 0.5}  # word: side of the subject's box, as a share of the canvas
PLACES = {"on the left": 0.0, "": 0.5, "on the right": 1.0}


class Placement(NamedTuple):
    side: float  # of the square box that the cut-out fills, as a share of the canvas
    x: float     # share of the free space that is left of the box: 0 left, 1 right
    y: float     # and above it


def named_placement(size, place):
    """What the words of a caption mean. Boxes are whole patches: what only moves keeps its codes."""
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


def turn_hue(image, turn):
    """An RGB or RGBA image with its hue turned; 256 is a full turn."""
    hue, saturation, value = image.convert("RGB").convert("HSV").split()
    hue = hue.point([(v + turn) % 256 for v in range(256)])
    turned = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    if image.mode == "RGBA":
        turned.putalpha(image.getchannel("A"))
    return turned


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
# To add one, colourisation say: a row in TASKS; a method of the same name (with _ for -) in TaskDataset,
# whose samples have as many references as the prompt has <image>; a share in train.py's MIXES. (To ask for it
# on the command line, see which_task in sample.py.)

class Task(NamedTuple):
    prompt: str                 # a reference stands at each <image>
    cfg_image: float            # guidance towards the references
    cfg_text: float             # and towards the text: copying wants little, composing more
    needs_cutout: bool = True   # False: a plain picture will do
    copies: tuple = (0, 1)      # which copies of a reference the prompt has: the sizes of its targets
    coarse: float = 1.0         # weight of a patch's coarsest code in the loss; the others have 1
    hide_picture: float = 0.15  # how often training hides the target's earlier patches


# The prompt alone tells the model its task. (So recovery and subject-driven are one task to it.)
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


def reference_copies(config, task, picture):
    """A reference, uint8 (H, W, 3) -> the copies that the task uses: shrunk, in the middle, edges repeated"""
    pictures = []
    for size in (config.reference_sizes[index] for index in TASKS[task].copies):
        wider = widened(picture, round(len(picture) * (1 / size - 1) / 2))  # at size 1 the picture itself
        pictures.append(np.asarray(wider.resize(picture.shape[:2], Image.Resampling.BICUBIC)))
    return pictures


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
            say_once("too few subjects to hold one in ten out: held-out figures are of training subjects")
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
            i = pool[rng.integers(len(pool))]
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
        return Sample((asked,), scene.caption, [scene.picture], scene.on_black[0], scene.masks[0])

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
            other = self.subjects[self.cutouts[rng.integers(len(self.cutouts))]]
            cutout = fill_outline(cutout, open_cutout(other, self.size))
        return vary(cutout, rng)

    def different(self, i, n, rng):
        """Picture i and up to n - 1 more cut-outs, all with different labels -> list of indices"""
        chosen = {self.subjects[i].label: i}
        for j in rng.choice(self.cutouts, 20):  # (there may be fewer labels)
            if len(chosen) < n:
                chosen.setdefault(self.subjects[j].label, j)
        return list(chosen.values())

    def background(self, rng, other_than=(), any_ground=False):
        """A Background, with none of these names: half of them photographs of --backgrounds, else painted.
        any_ground, if no caption names it: also a part of a plain picture, or two in three times a ground."""
        if len(self.backgrounds) and rng.uniform() < 0.5:
            photograph = self.backgrounds[rng.integers(len(self.backgrounds))]
            if photograph.path not in other_than:
                image = open_square(photograph.path, self.size, rng if any_ground else None)
                return Background(image, clean_text(photograph.caption, MAX_BACKGROUND), photograph.path)
        # Few plain pictures are taken seldom: they would soon be everywhere. Their words name other things.
        if any_ground and len(self.plain) and rng.uniform() < min(0.5, len(self.plain) / 40):
            picture = self.subjects[self.plain[rng.integers(len(self.plain))]]
            if picture.path not in other_than:
                return Background(open_square(picture.path, self.size, rng), "", picture.path)
        if any_ground and rng.uniform() < 0.65:
            variant = int(rng.integers(N_GROUNDS))
            subject = self.subjects[self.cutouts[zlib.crc32(b"%d" % variant) % len(self.cutouts)]]
            image = paint_ground(self.size, variant, subject).transpose(int(rng.integers(7)))
            return Background(image, "", "")
        words = str(rng.choice([words for words in BACKGROUNDS if words not in other_than]))
        image = paint_background(words, self.size, int(rng.integers(N_BACKGROUNDS)))
        return Background(ImageOps.mirror(image) if rng.uniform() < 0.5 else image, words, words)

    def scene(self, indices, cutouts, rng, anywhere=0.0, other_than=(), any_ground=False, mark=""):
        """Cut-outs of these pictures -> Scene. Other arguments: see choose_placements, background and
        write_caption."""
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


def known_text(subjects, backgrounds):
    """What the captions of training say -> dict(words: all of them, in one string; backgrounds: a list)"""
    named = [clean_text(picture.caption, MAX_BACKGROUND) for picture in backgrounds]
    scenes = list(dict.fromkeys([*BACKGROUNDS, *filter(None, named)]))
    fixed = ["a big thing and, in the middle", *SIZES, *PLACES, *QUARTERS, *scenes]
    words = set(words_of(" ".join([*fixed, *(task.prompt for task in TASKS.values())])))
    for i in np.flatnonzero(~subjects.table["held_out"]):
        words.update(words_of(f"{subjects[i].label} {'' if subjects[i].has_cutout else subjects[i].caption}"))
    return {"words": " ".join(sorted(words)), "backgrounds": scenes}
