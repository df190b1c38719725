"""Subjects, backgrounds, scenes and tasks: everything the model is taught with, composed on the fly.

Whoever has cut-outs (an image with alpha, and a label) can make every task of the paper from them:

    Subject (a cut-out, a label) + background (a picture, its words) + Placement -> scene, the cut-out on black, caption

    python data.py          a labelled sheet of every task's samples; --data and --backgrounds as train.py takes them
"""
import contextlib
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
from PIL import Image, ImageDraw, ImageFont, ImageOps

warnings.simplefilter("error", Image.DecompressionBombWarning)  # 90 megapixels are no picture
say_once = functools.cache(lambda text: print(text, file=sys.stderr))


class BadInput(Exception):
    """What the user can mend: ends a script with one line and exit code 2. Any other exception is a bug of ours."""


# ---------------------------------------------------------------------------------------------------------------------
# Subjects: where the cut-outs come from


class Subject(NamedTuple):
    name: str                 # pictures of one name show the same subject; its hash decides whether it is held out
    label: str                # what the prompts call it
    source: str               # "emoji", "shapes" or "file": how `cutout` reads it
    path: str                 # the character, the shape's recipe, or the image file
    mask: str = ""            # a mask image beside the file, where the alpha channel does not say it
    has_cutout: bool = True   # False: a plain picture, for reconstruction, text-to-image and backgrounds alone
    caption: str = ""         # a plain picture's words


EMOJI_FONTS = {  # file: the one pixel size that its bitmaps have (Debian, Arch, Fedora, macOS, Windows)
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf": 109, "/usr/share/fonts/noto/NotoColorEmoji.ttf": 109,
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf": 109,
    "/System/Library/Fonts/Apple Color Emoji.ttc": 160, "C:/Windows/Fonts/seguiemj.ttf": 128}
NO_EMOJI = "no colour emoji font found (apt-get install fonts-noto-color-emoji brings one)"
# Signs rather than things: letters in boxes, arrows, clock faces, skin tones, flags of letters.
NOT_A_THING = re.compile(r"REGIONAL|FITZPATRICK|COMPONENT|SQUARED|CIRCLED|IDEOGRAPH|ARROW|KEYCAP|CLOCK FACE|TRIANGLE|SIGN\b"
                         r"|SYMBOL|MARK\b|SQUARE$|CIRCLE$|DIAMOND|INPUT|BUTTON|HEAVY|CURLY|DIGIT|NUMBER|LARGE|VARIATION")
IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
MAX_LABEL = 24  # bytes; longer names ("face with open mouth and cold sweat") would fill the block


@functools.cache
def emoji_font():
    return next((ImageFont.truetype(path, size) for path, size in EMOJI_FONTS.items() if os.path.exists(path)), None)


def draw_emoji(char):
    font = emoji_font()
    image = Image.new("RGBA", (2 * font.size, 2 * font.size))
    ImageDraw.Draw(image).text((font.size // 4, font.size // 4), char, font=font, embedded_color=True)
    return image


def emoji_subjects():
    """Every drawn thing of the machine's colour emoji font, labelled with its Unicode name. Raises BadInput without one."""
    if emoji_font() is None:
        raise BadInput(f"--data emoji: {NO_EMOJI}")
    for char in map(chr, [*range(0x2300, 0x2C00), *range(0x1F300, 0x1FB00)]):
        name = unicodedata.name(char, "").lower()
        if name and len(name) <= MAX_LABEL and not NOT_A_THING.search(name.upper()) and draw_emoji(char).getbbox():
            yield Subject("emoji/" + name, name, "emoji", char)


SHAPES = {"circle": 0, "triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6, "star": -5, "sun": -8, "cross": -4}
COLOURS = {"red": (220, 40, 40), "green": (50, 170, 70), "blue": (50, 90, 220), "yellow": (240, 210, 50),
           "purple": (150, 60, 190), "orange": (245, 140, 40), "white": (240, 240, 240), "grey": (120, 120, 120)}


def shape_subjects():
    """Two-coloured shapes: drawn by code, for tests and for machines without an emoji font."""
    return [Subject(f"shapes/{a} {b} {shape}", f"{a} {b} {shape}", "shapes", f"{shape} {a} {b}")
            for shape in SHAPES for a in COLOURS for b in COLOURS if a != b]


def draw_shape(recipe):
    shape, outer, inner = recipe.split()
    image, corners = Image.new("RGBA", (128, 128)), SHAPES[shape]
    for radius, colour in ((60, outer), (30, inner)):
        n = 64 if corners == 0 else abs(corners) * (1 if corners > 0 else 2)
        radii = [radius * (0.45 if corners < 0 and i % 2 else 1) for i in range(n)]
        points = [(64 + r * np.sin(2 * np.pi * i / n), 64 - r * np.cos(2 * np.pi * i / n)) for i, r in enumerate(radii)]
        ImageDraw.Draw(image).polygon(points, fill=COLOURS[colour])
    return image


def clean_label(text, limit=MAX_LABEL):
    """The first line of a caption as a label: no article, no full stop, at most `limit` bytes, cut between words."""
    label = re.sub(r"^(an?|the)\s+", "", text.strip().split("\n")[0].strip().rstrip("."), flags=re.I)
    while len(label.encode()) > limit:
        label = label.rsplit(" ", 1)[0] if " " in label else label.encode()[:limit].decode(errors="ignore")
    return label.lower()


def folder_subjects(folder, skipped):
    """A user's own images, by metadata.jsonl, sidecar name.txt or class folders; adds to `skipped` what is unusable, and why."""
    root = Path(folder)
    if not root.is_dir():
        raise BadInput(f"--data {folder}: no such folder (give emoji, shapes or a folder of images)")
    if (root / "metadata.jsonl").is_file():
        records = filter(str.strip, open(root / "metadata.jsonl", encoding="utf-8-sig", errors="replace"))
    else:  # (os.walk does not follow links to folders, which may lead in circles)
        records = (json.dumps({"file_name": os.path.relpath(os.path.join(place, file), root)}) for place, _, files in
                   sorted(os.walk(root)) for file in sorted(files) if os.path.splitext(file)[1].lower() in IMAGE_ENDINGS)
    for record in records:
        try:
            said = json.loads(record)
            path, mask = root / said["file_name"], root / (said.get("mask") or said["file_name"])
            if any(os.path.relpath(file, root).startswith("..") for file in (path, mask)):
                raise ValueError("leads out of the folder")
            twin = path.with_name(path.name.replace("_mirror", ""))  # owl_mirror.png beside owl.png is a view of the same owl
            first = twin if twin != path and twin.is_file() else path
            sidecar = first.with_suffix(".txt")
            text = str(said.get("text") or (sidecar.read_text("utf-8", "replace") if sidecar.is_file() else ""))
            label = clean_label(str(said.get("label") or text)) or clean_label(first.stem if path.parent == root else path.parent.name)
            same = first.relative_to(root).as_posix() if said.get("subject_id") is None else f"subject_id {said['subject_id']}"
            subject = Subject(f"{root.resolve().name}/{same}", label, "file", str(path), str(mask) * (mask != path), True, clean_label(text, 80) or label)
            json.dumps(subject, ensure_ascii=False).encode()  # names that are not Unicode cannot be kept
            with Image.open(path) as image:  # reads the header only; pixels are decoded where they are used
                alpha = "A" in image.getbands() or "transparency" in image.info
        except (OSError, ValueError, KeyError, TypeError, AttributeError, Warning, Image.DecompressionBombError) as error:
            skipped.append(f"{record.strip()[:80]} ({type(error).__name__}: {error})")
            continue
        yield subject._replace(has_cutout=alpha or subject.mask != "")


def is_held_out(subject):
    """One subject in ten, by a hash of its name, is never trained on."""
    return zlib.crc32(subject.name.encode()) % 10 == 0


FIELDS = np.dtype([("name", "i4"), ("start", "i8"), ("end", "i8"), ("held_out", "?"), ("has_cutout", "?")])


class Subjects:
    """All subjects of a run, a sequence of Subject. Kept as lines of text in one array, and a few numbers each (FIELDS), pictures
    of one name side by side: a million of them are a few big arrays, which forked workers share, and not ten million objects."""

    def __init__(self, lines, table, said):
        self.lines, self.table, self.said = lines, table, str(said)

    def __len__(self):
        return len(self.table)

    def __getitem__(self, i):
        return Subject(*json.loads(self.lines[self.table["start"][i]:self.table["end"][i]].tobytes()))

    def views(self, i):
        """Indices of all pictures that show the subject of picture i."""
        name = self.table["name"]
        return range(*np.searchsorted(name, [name[i], name[i] + 1]))


def scan(sources):
    """-> dict(lines, table, said: what there is, in words)"""
    names, labels, rows, skipped, lines = {}, set(), [], [], bytearray()
    for source in sources:
        found = {"emoji": emoji_subjects, "shapes": shape_subjects}.get(source, lambda: folder_subjects(source, skipped))()
        before = len(rows)
        for subject in found:
            start, number = len(lines), names.setdefault(subject.name, len(names))
            lines += json.dumps(subject).encode()
            rows.append((number, start, len(lines), is_held_out(subject), subject.has_cutout))
            labels.add(subject.label)
        if len(rows) == before:
            raise BadInput(f"--data {source}: not one usable image in it (looked for {', '.join(sorted(IMAGE_ENDINGS))}) {''.join(skipped[:1])}")
    table = np.array(rows, FIELDS)
    table = table[table["name"].argsort(kind="stable")]
    views = np.bincount(table["name"])
    said = (f"{len(table)} images, {table['has_cutout'].sum()} of them cut-outs; {len(names)} subjects, {len(labels)} labels,"
            f" {(views * (views - 1)).sum()} pairs of views, for {'all tasks' if table['has_cutout'].any() else 'text-to-image and reconstruction'};"
            f" skipped {len(skipped)} files" + "".join(f"\n  {why}" for why in skipped[:3]))
    return {"lines": np.frombuffer(lines, np.uint8), "table": table, "said": said}


def load_subjects(data=None, index=None):
    """`emoji`, `shapes`, a folder, or several with commas between -> Subjects. None: emoji, else shapes, aloud.
    index: a file that keeps what was found, until a folder changes: opening a million images takes minutes."""
    if data is None and emoji_font() is None:
        print(f"{NO_EMOJI}: using --data shapes", file=sys.stderr)
        data = "shapes"
    sources = (data or "emoji").split(",")
    if len({os.path.basename(os.path.abspath(source)) for source in sources}) < len(sources):
        raise BadInput(f"--data {data}: two sources of one name, whose subjects could be confused: rename one folder")
    if index is None:
        return Subjects(**scan(sources))
    places = [place for source in sources for folder, _, _ in os.walk(source) for place in (folder, f"{folder}/metadata.jsonl")]
    stamp = str((sources, [(place, os.stat(place).st_mtime_ns) for place in places if os.path.exists(place)]))
    kept = {}
    with contextlib.suppress(Exception):  # none yet, or damaged: the folders are looked through again
        kept = dict(np.load(index))
    if kept.get("stamp") != stamp:
        from sample import whole_file  # here, because sample.py imports this file
        kept = scan(sources)
        with whole_file(index) as temporary, open(temporary, "wb") as file:
            np.savez(file, stamp=stamp, **kept)
    return Subjects(kept["lines"], kept["table"], kept["said"])


def read_image(path):
    """Any image file, turned as its EXIF says -> RGBA image. Raises BadInput, naming the file."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits a channel, which convert() would clip
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            return ImageOps.exif_transpose(image).convert("RGBA")
    except Exception as error:  # a damaged file can fail anywhere inside pillow
        raise BadInput(f"{path}: not a readable image ({error})") from error


def open_square(path, size):
    """Any image file as a picture -> RGB image, size x size: alpha on white, the centred square. Raises BadInput."""
    image = read_image(path)
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


@functools.lru_cache(maxsize=1200)  # more than there are emoji; a file's takes 256 kB
def cutout(subject):
    """The subject's pixels, cropped to its mask -> RGBA image, at most 256 px. Raises BadInput on a broken file."""
    at_half = [0] * 128 + [255] * 128  # masks are cut at half, never at > 0: no halo of the old background
    image = {"emoji": draw_emoji, "shapes": draw_shape, "file": read_image}[subject.source](subject.path)
    if subject.mask:
        image.putalpha(read_image(subject.mask).convert("L").resize(image.size, Image.Resampling.NEAREST).point(at_half))
    alpha = image.getchannel("A").point(at_half)
    if len(alpha.getcolors()) < 2:
        raise BadInput(f"{subject.path}: its mask {'is empty' if alpha.getbbox() is None else 'hides nothing: this is no cut-out'}")
    image = image.crop(alpha.getbbox())
    image.thumbnail((256, 256))
    return image


# ---------------------------------------------------------------------------------------------------------------------
# Scenes: a subject somewhere on a background

BACKGROUNDS = {  # drawn by code, so that their words are exactly true: (top of the sky, its lower edge, top of the ground, its lower edge)
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
    **{f"on {'an' if name == 'orange' else 'a'} {name} background": (rgb,) * 4 for name, rgb in COLOURS.items()}}


def draw_background(words, size, rng):
    """The background of these words, with its own light, horizon and details -> RGB image, size x size."""
    big = 2 * size  # drawn twice as large and averaged: smooth edges
    light = rng.uniform(0.9, 1.1, 2).repeat(2) if "background" not in words else rng.uniform(0.9, 1.1)
    sky, sky_low, ground, ground_low = np.clip(np.array(BACKGROUNDS[words]) * np.reshape(light, (-1, 1)), 0, 255)
    h, x, dots = rng.uniform(33, 38), rng.uniform(8, 56), rng.uniform(0, 64, (12, 2))  # in 64ths of the canvas
    up, down = (np.linspace(0, 1, n)[:, None] for n in (int(h * big / 64), big - int(h * big / 64)))
    column = np.concatenate([sky + (sky_low - sky) * up, ground + (ground_low - ground) * down])  # (big, 3)
    image = Image.fromarray(np.broadcast_to(column[:, None], (big, big, 3)).astype(np.uint8))

    def disc(cx, cy, r):
        return "ellipse", (cx - r, cy - r, cx + r, cy + r)
    towers = [(i * 11 - x / 5, h - 6 * (2 + int(cy) % 3)) for i, (_, cy) in enumerate(dots[:7])]
    details = {
        "on the grass": [(*disc(x + dx, 10, r), (250, 250, 252)) for dx, r in ((-5, 3), (0, 4.5), (5, 3.5))],
        "on the beach": [("rectangle", (0, h - 10, 64, h), (45, 130, 195)), ("rectangle", (0, h - 1.5, 64, h), (235, 245, 250))],
        "in the snow": [("polygon", (cx - 20, h, cx, 10, cx + 20, h), (175, 195, 218)) for cx in (x - 26, x + 4, x + 34)],
        "in the desert": [(*disc(x, 14, 6), (255, 240, 190))],
        "in the city at night": [("rectangle", (cx, top, cx + 9, h), (32, 32, 52)) for cx, top in towers]
        + [("rectangle", (cx + 2, y, cx + 7, y + 2), (250, 220, 120)) for cx, top in towers for y in np.arange(top + 2, h - 2, 6)],
        "in the forest": [("polygon", (cx - 8, h + 2, cx, 6, cx + 8, h + 2), (35, 95, 50)) for cx in np.arange(5) * 16 - x / 4],
        "under water": [(*disc(cx, cy, 1.6), (150, 215, 240)) for cx, cy in dots],
        "in space": [(*disc(cx, cy, 0.8), (255, 255, 230)) for cx, cy in dots],
        "at sunset": [(*disc(x, 14, 6), (255, 240, 190))],
        "on the road": [("rectangle", (0, h, 64, h + 3), (120, 160, 90)), ("rectangle", (0, 57, 64, 59), (240, 240, 225))],
        "in a room": [("rectangle", (x - 7, 6, x + 7, 18), (110, 70, 40)), ("rectangle", (x - 5, 8, x + 5, 16), (250, 250, 245))]}
    draw = ImageDraw.Draw(image)
    for kind, corners, colour in details.get(words, []):
        getattr(draw, kind)([c * big / 64 for c in corners], fill=colour)
    return image.resize((size, size), Image.Resampling.BOX)


SIZES = {"": 0.75, "small": 0.5}                 # word: side of the subject's box, as a share of the canvas
PLACES = {"on the left": 0.0, "": 0.5, "on the right": 1.0}


class Placement(NamedTuple):
    side: float  # of the square box that the subject fills, as a share of the canvas
    x: float     # share of the free space that lies left of the box: 0 left, 1 right
    y: float     # and above it


def named_placement(size, place):
    """The placement of a caption's words. On a canvas of 8 x 8 patches these are whole patches: a subject that is only
    moved keeps its codes, and drawing it elsewhere begins as copying."""
    return Placement(SIZES[size], PLACES[place], 0.5 if size == "" else 0.75)


AS_GIVEN = Placement(0.75, 0.5, 0.5)  # how people give a reference: the subject large, in the middle


def free_placement(rng):
    return Placement(rng.uniform(0.5, 0.9), rng.uniform(), rng.uniform())


def write_caption(rng, label, background, size=None, place=None):
    """One of several wordings that name subject, background, size ("": big) and place ("": the middle; None: unsaid)."""
    size = rng.choice(["", "big"]) if size == "" else size or ""
    place = rng.choice(["", "in the middle"]) if place == "" else place or ""
    thing = f"{size} {label}".strip()
    thing = ("an " if thing[:1] in "aeiou" else "a ") + thing
    wordings = (f"{thing} {background}, {place}", f"{background}, {thing} {place}", f"{thing} {place}, {background}")
    return wordings[rng.integers(3)].strip(" ,").replace(" ,", ",")


def compose(sprite, background, placement):
    """Pastes an RGBA sprite into its box (standing at the bottom centre) -> (scene, the sprite alone on black)."""
    canvas = background.width
    side = placement.side * canvas
    w, h = (max(1, round(n * side / max(sprite.size))) for n in sprite.size)
    x, y = round(placement.x * (canvas - side) + (side - w) / 2), round(placement.y * (canvas - side) + side - h)
    layer = Image.new("RGBA", background.size)
    layer.paste(sprite.resize((w, h), Image.Resampling.BICUBIC), (x, y))
    alone = Image.alpha_composite(Image.new("RGBA", background.size, (0, 0, 0, 255)), layer).convert("RGB")
    return Image.alpha_composite(background.convert("RGBA"), layer).convert("RGB"), alone


def recolour(sprite, rng):
    """Turns the hue and mirrors at random: a label alone no longer tells the look, so the reference must be looked at."""
    if rng.uniform() < 0.5:
        sprite = ImageOps.mirror(sprite)
    if rng.uniform() < 0.6:
        alpha, shift = sprite.getchannel("A"), int(rng.integers(256))
        hue, saturation, value = sprite.convert("RGB").convert("HSV").split()
        sprite = Image.merge("HSV", (hue.point(lambda v: (v + shift) % 256), saturation, value)).convert("RGB")
        sprite.putalpha(alpha)
    return sprite


def distort(sprite, rng):
    """Recovery's damage (official code): with p .5 stretch, shear, rotation, and corners jittered by up to 20%."""
    if rng.uniform() < 0.5:
        return sprite
    angle = np.radians(rng.uniform(-20, 20))
    turn = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    shear, stretch = np.array([(1, rng.uniform(-0.3, 0.3)), (0, 1)]), np.diag([rng.uniform(0.7, 1.3), 1])
    corners = np.array([(-1, -1), (-1, 1), (1, 1), (1, -1)]) * rng.uniform(1.0, 1.2, (4, 2))
    # QUAD asks which point of the sprite each corner of the result shows; beyond the sprite all is transparent.
    quad = ((corners @ stretch @ shear.T @ turn.T) + 1) / 2 * sprite.size
    return sprite.transform(sprite.size, Image.Transform.QUAD, quad.flatten(), Image.Resampling.BICUBIC)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks

TASKS = ("text-to-image", "reconstruction", "segmentation", "recovery", "subject-driven")


class Tasks:
    """A map-style dataset: item `index` is a pure function of (seed, index), whatever the number of workers.

    Items: dict(task, label, caption, refs: list of uint8 (H, W, 3), target: uint8 (H, W, 3), hide: what training hides
    from the model, for guidance). With `train`, a subject that a reference shows is recoloured, unless it has other
    views; without, the dataset holds the held-out subjects alone."""

    def __init__(self, subjects, mix, size, seed, train=True, backgrounds=()):
        self.subjects, self.mix, self.size, self.seed, self.train = subjects, mix, size, seed, train
        wanted, has_cutout = subjects.table["held_out"] != train, subjects.table["has_cutout"]
        if not (wanted & (has_cutout | ~has_cutout.any())).any():
            say_once("too few subjects to hold one in ten out: held-out figures are of training subjects")
            wanted = wanted | True
        plain = np.flatnonzero(wanted & ~has_cutout)
        self.photographs = backgrounds, range(len(backgrounds)), 0.5  # pictures, their indices, how often one is taken:
        self.plain = subjects, plain, min(0.5, len(plain) / 40)       # seldom where they are few, else they are everywhere
        self.all, self.cutouts = np.flatnonzero(wanted), np.flatnonzero(wanted & has_cutout)  # indices
        if not len(self.cutouts) and any(mix.get(task) for task in TASKS[2:]):
            raise BadInput("none of these images has alpha or a mask: train with --mix text-to-image=.8,reconstruction=.2")

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, index])
        task = str(rng.choice(list(self.mix), p=list(self.mix.values())))
        for _ in range(100):
            try:
                sample = self.make(task, rng)
            except BadInput as error:  # a broken file: another subject takes its place
                say_once(f"skipped: {error}")
                continue
            hide = str(rng.choice(["all", "images", "text", ""], p=[0.1, 0.05, 0.05, 0.8]))
            return sample | {"task": task, "hide": hide}
        raise BadInput("a hundred images in a row could not be read")

    def background(self, rng, words, *pools):
        """Drawn by code in these words, or a picture of a pool (pictures, indices, share) -> (RGB image, its words)"""
        for pictures, indices, share in pools:
            if len(indices) and rng.uniform() < share:
                picture = pictures[indices[rng.integers(len(indices))]]
                return open_square(picture.path, self.size), clean_label(picture.caption)
        return draw_background(words, self.size, rng), words

    def make(self, task, rng):
        pool = self.all if task in ("text-to-image", "reconstruction") else self.cutouts
        index = pool[rng.integers(len(pool))]
        subject = self.subjects[index]
        if not subject.has_cutout:
            picture = np.asarray(open_square(subject.path, self.size))
            return dict(label=subject.label, caption=subject.caption, refs=[picture] * (task == "reconstruction"), target=picture)
        sprite, has_cutout = cutout(subject), self.subjects.table["has_cutout"]
        views = [i for i in self.subjects.views(index) if i != index and has_cutout[i]]
        if self.train and task != "text-to-image" and not views:  # (views differ by themselves)
            sprite = recolour(sprite, rng)
        here, elsewhere = rng.choice(list(BACKGROUNDS), 2, replace=False)
        size, place = str(rng.choice(list(SIZES))), str(rng.choice(list(PLACES)))
        placement = named_placement(size, place)
        if task in ("reconstruction", "segmentation") and rng.uniform() < 0.7:  # anywhere, and the caption does not say where
            placement, size, place = free_placement(rng), None, None
        background, here = self.background(rng, here, self.photographs)
        image, alone = compose(sprite, background, placement)
        caption = write_caption(rng, subject.label, here, size, place)
        if task == "reconstruction" and rng.uniform() < 0.1:  # a copy needs no words
            caption = ""
        reference = image
        if task in ("recovery", "subject-driven"):
            if task == "recovery":
                where = Placement(rng.uniform(0.4, 1.0), rng.uniform(), rng.uniform())
                sprite = distort(sprite, rng)
            else:
                if views:  # another picture of the same subject
                    sprite = cutout(self.subjects[views[rng.integers(len(views))]])
                where = AS_GIVEN if rng.uniform() < 0.7 else free_placement(rng)
            background, _ = self.background(rng, elsewhere, self.photographs, self.plain)  # unnamed: any picture will do
            reference, _ = compose(sprite, background, where)
        return {"label": subject.label, "caption": caption, "refs": [np.asarray(reference)] * (task != "text-to-image"),
                "target": np.asarray(alone if task == "segmentation" else image)}


if __name__ == "__main__":
    import sample  # which draws sheets, and imports this file
    sample.run(sample.show_data)
