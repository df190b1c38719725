"""Draws pictures. The task follows from what is given:

    python sample.py --ref dog.png --label dog --prompt "a dog on the beach"    this dog in a new scene
    python sample.py --ref dog.png --label dog --ref cat.png --label cat \\
        --prompt "a dog on the left and a cat on the right, on the beach"       both; up to four
    python sample.py --ref scene.png --label "cat on the left"                  that cat, cut out, on black
    python sample.py --example before.png after.png --ref query.png             what the example does
    python sample.py --ref dog.png                      the picture itself, redrawn (--prompt may describe it)
    python sample.py --prompt "a dog on the beach" -n 8 -o dogs.png             text alone; eight, as a grid
"""
import argparse
import contextlib
import errno
import math
import os
import re
import sys
import textwrap
import time
import uuid

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from data import (AS_GIVEN, PLACES, QUARTERS, TASKS, Subject, clean_label, clean_text, compose, fill_prompt,
                  open_cutout)
from mentor import TEMPERATURES, BadInput, Config, Mentor, generate, words_of
from tokenizer import (IMAGE_ENDINGS, Tokenizer, hides_something, is_cutout, open_square, printable,
                       reference_copies, to_arrays, to_images, widened)

# ---- Checkpoints ------------------------------------------------------------------------------------------

VERSION = 5  # of the checkpoints; raised whenever older ones no longer fit
SHIPPED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights", "cpu.pt")


def load_checkpoint(path):
    """-> dict(config, stage, model, tokenizer, ...): tensors and plain values. Nothing in the file is
    executed. Raises BadInput if the file is missing, damaged, or of another version."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["config"], checkpoint["model"], checkpoint["tokenizer"], checkpoint["stage"]  # are there
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except IsADirectoryError:
        raise BadInput(f"{path}: is a folder: name a checkpoint in it") from None
    except Exception as error:  # a damaged file can fail anywhere inside torch.load
        what = f"not a checkpoint of this program, or damaged ({type(error).__name__})"
        raise BadInput(f"{path}: {what}") from error
    version = checkpoint.get("version")
    if version != VERSION:
        raise BadInput(f"{path}: written by another version of this program ({version}, here {VERSION}): "
                       "train it again")
    if not {"words", "backgrounds"} <= set(checkpoint.get("known", ())):
        raise BadInput(f"{path}: not a checkpoint of this program, or damaged (no words in it)")
    return checkpoint


def load_weights(checkpoint, path, tokenizer, model=None):
    """Fills the tokenizer, and the transformer if there is one, from a checkpoint. Raises BadInput."""
    try:
        tokenizer.load_state_dict(checkpoint["tokenizer"])
        if model is not None:
            model.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise BadInput(f"{path}: its weights do not fit its own configuration") from error
    weights = [*checkpoint["tokenizer"].values(), *(checkpoint["model"].values() if model else ())]
    if not all(weight.isfinite().all() for weight in weights):
        raise BadInput(f"{path}: some of its weights are not finite numbers: give another model")


def load_models(path, device):
    """-> the transformer and the tokenizer of a checkpoint, ready to draw; what its captions said
    (train.known_text). Raises BadInput."""
    checkpoint = load_checkpoint(path)
    if checkpoint["stage"] == 0:
        raise BadInput(f"--ckpt {path} holds the tokenizer alone: give a stage1.pt or stage2.pt")
    try:
        config = Config(**checkpoint["config"])
        model, tokenizer = Mentor(config), Tokenizer(config)
    except (RuntimeError, TypeError):
        raise BadInput(f"--ckpt {path}: not a checkpoint of this program, or damaged (config)") from None
    load_weights(checkpoint, path, tokenizer, model)
    return model.to(device).eval(), tokenizer.to(device).eval(), checkpoint["known"]


# ---- Files that are written -------------------------------------------------------------------------------

@contextlib.contextmanager
def whole_file(path):
    """Gives a temporary name to write to, then moves it to `path`: the file is there whole or not at all."""
    temporary = os.path.join(os.path.dirname(path), f"{uuid.uuid4().hex}.tmp")  # nobody has such a file
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        what = f"cannot be written (is the disk full? {error}); what was there before is untouched"
        raise BadInput(f"{path}: {what}") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def save_sheet(rows, path):
    """rows: (title, cells), a cell being (caption, list of uint8 (H, W, 3) pictures) -> one labelled PNG"""
    cells = [cell for _, row in rows for cell in row]
    shown = max(96, *(len(picture) for _, pictures in cells for picture in pictures))  # pixels per side
    cell_width = max(len(pictures) for _, pictures in cells) * (shown + 2) + 10
    row_height = shown + 24 + (30 if any(caption for caption, _ in cells) else 0)
    columns = max(len(row) for _, row in rows)
    sheet = Image.new("RGB", (columns * cell_width + 10, len(rows) * row_height + 6), "white")
    pen, large, small = ImageDraw.Draw(sheet), ImageFont.load_default(14), ImageFont.load_default(12)
    for r, (title, row) in enumerate(rows):
        pen.text((10, r * row_height + 4), title, fill="black", font=large)
        for c, (caption, pictures) in enumerate(row):
            x, y = 10 + c * cell_width, r * row_height + 24
            for i, picture in enumerate(pictures):
                enlarged = Image.fromarray(picture).resize((shown, shown), Image.Resampling.LANCZOS)
                sheet.paste(enlarged, (x + i * (shown + 2), y))
            lines = textwrap.wrap(caption, max(10, (cell_width - 10) // 6))[:2]
            pen.text((x, y + shown), "\n".join(lines), fill=(90, 90, 90), font=small)
    with whole_file(path) as temporary:
        sheet.save(temporary, "PNG")


PLOT_COLOURS = ("#3264c8", "#329632", "#d23232", "#c88c14", "#7832b4", "#1e9696", "#787878")


def save_plot(panels, path):
    """panels: (title, what x is, lines), a line being name -> list of (x, y) or (x, y, standard error) -> one
    PNG, the panels side by side"""
    image = Image.new("RGB", (640 * len(panels), 460), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    for i, (title, x_title, lines) in enumerate(panels):
        points = [(x, y - sum(error), y + sum(error)) for line in lines.values() for x, y, *error in line]
        if not points:
            continue
        x_ticks, y_ticks = ticks([x for x, _, _ in points]), ticks([y for _, *ends in points for y in ends])

        def place(x, y, left=640 * i + 60, x_ticks=x_ticks, y_ticks=y_ticks):
            return (left + 400 * (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]),
                    390 - 330 * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]))

        pen.text((640 * i + 60, 20), title, fill="black", font=font)
        for y in y_ticks:
            pen.line([place(x_ticks[0], y), place(x_ticks[-1], y)], fill="#e1e1e1")
            pen.text((640 * i + 52, place(0, y)[1]), f"{y:g}", fill="black", font=font, anchor="rm")
        for x in x_ticks:
            pen.text((place(x, 0)[0], 400), f"{x:,g}", fill="black", font=font, anchor="ma")
        pen.text((640 * i + 260, 426), x_title, fill="black", font=font, anchor="ma")
        height = 0
        for name, line in sorted(lines.items(), key=lambda item: place(*item[1][-1][:2])[1]):
            colour = PLOT_COLOURS[list(lines).index(name) % len(PLOT_COLOURS)]
            pen.line([place(x, y) for x, y, *_ in line], fill=colour, width=3)
            for x, y, *error in line:
                pen.line([place(x, y - sum(error)), place(x, y + sum(error))], fill=colour, width=2)
                pen.ellipse([n + r for r in (-3, 3) for n in place(x, y)], fill=colour)
            height = max(height + 18, place(*line[-1][:2])[1])  # names keep their distance
            pen.text((640 * i + 470, height), name, fill=colour, font=font, anchor="lm")
    with whole_file(path) as temporary:
        image.save(temporary, "PNG")


def ticks(values):
    """Round numbers, evenly spaced, from the least of the values or below to the greatest or above."""
    low, high = min(values), max(values)
    span = max(high - low, 1e-3 * abs(high), 1e-9)
    step = min(base * 10.0 ** e for e in range(-10, 15) for base in (1, 2, 5) if base * 10.0 ** e >= span / 6)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return [round(i * step, 10) for i in range(first, last + 1)]


# ---- From a prompt to pictures ----------------------------------------------------------------------------

@torch.no_grad()
def draw(model, tokenizer, task, prompts, **how):
    """prompts: list of (pieces, references): the texts around the references, and these, uint8 (H, W, 3).
    how: as mentor.generate takes it; guidance is the task's unless given -> uint8 (len(prompts) * n, H, W,
    3). Raises BadInput if a prompt is too long."""
    def encode(reference):  # -> codes (copies, N, n_codebooks)
        copies = reference_copies(model.config, TASKS[task].copies, reference)
        return tokenizer.encode(to_images(copies, model.head_gain.device))

    encoded = [(pieces, [encode(reference) for reference in references]) for pieces, references in prompts]
    how = {"cfg_image": TASKS[task].cfg_image, "cfg_text": TASKS[task].cfg_text, **how}
    codes = generate(model, encoded, TASKS[task].copies, **how)
    # One by one: convolutions of a batch differ in the last bits from those of a single picture.
    return np.concatenate([to_arrays(tokenizer.decode(picture[None])) for picture in codes])


def frame_subjects(model, tokenizer, labels, pictures):
    """Brings what the labels name, in square pictures, uint8 (H, W, 3), to where most references of training
    show it (data.AS_GIVEN): on whole patches, whose codes the model then copies. The model itself says where
    it is, by cutting it out -> list of uint8 (image_size, image_size, 3)"""
    size = model.config.image_size
    framed = [np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BOX))
              for picture in pictures]
    prompts = [(fill_prompt("segmentation", [label]), [picture]) for label, picture in zip(labels, framed)]
    for i, on_black in enumerate(draw(model, tokenizer, "segmentation", prompts)):
        box = box_to_frame(on_black)
        if box is None:
            say(f"--ref: no {labels[i]} was found in it: it is shown as it is")
            continue
        side = len(pictures[i])
        wide = widened(pictures[i], side)
        framed[i] = np.asarray(wide.resize((size, size), Image.Resampling.BICUBIC, side + side * box))
    return framed


def box_to_frame(on_black):
    """A cut-out on black, uint8 (H, W, 3) -> the square that shows it as data.AS_GIVEN does: left, top,
    right, bottom as shares of the picture. None if nothing is seen."""
    shown = on_black.max(2) > 60  # black after the tokenizer is not quite 0
    columns, rows = (np.flatnonzero(shown.sum(axis) > 1) for axis in (0, 1))  # (not where one pixel stands)
    if len(columns) == 0 or len(rows) == 0:
        return None
    left, top, right, bottom = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / len(on_black)
    side = max(right - left, bottom - top) / AS_GIVEN.side
    left, top = (left + right - side) / 2, bottom - side * (1 + AS_GIVEN.side) / 2
    if max(abs(left), abs(top), abs(side - 1)) < 1 / 16:  # it stands so already: no need to blur it
        return np.array([0, 0, 1, 1])
    return np.array([left, top, left + side, top + side])


def show_cutout(cutout, size):
    """A cut-out as a reference: framed like most references of training -> uint8 (size, size, 3)"""
    # On mid-grey the model keeps more of the subject than on white: hard CP .93 instead of .78.
    ground = Image.new("RGB", (size, size), (128, 128, 128))
    return np.asarray(compose(cutout, ground, AS_GIVEN)[0])


def open_references(files, task, model, tokenizer):
    """files: (path, label) each -> as the task shows them: list of uint8 (image_size, image_size, 3). Raises
    BadInput."""
    size, pictures = model.config.image_size, {}
    if task not in ("subject-driven", "multi-image"):
        return [np.asarray(open_square(path, size)) for path, _ in files]
    unframed = [i for i, (path, _) in enumerate(files) if not is_cutout(path)]
    for path in (files[i][0] for i in unframed if hides_something(files[i][0])):
        say(f"--ref {path}: its transparent parts are shown white, since most of its border is opaque "
            "(a cut-out needs a transparent margin)")
    if unframed:
        wide = [np.asarray(open_square(files[i][0], 4 * size)) for i in unframed]
        framed = frame_subjects(model, tokenizer, [files[i][1] for i in unframed], wide)
        pictures = dict(zip(unframed, framed))
    for i, (path, label) in enumerate(files):
        if i not in pictures:  # a cut-out: its alpha says where the subject is
            pictures[i] = show_cutout(open_cutout(Subject(path, label, "file", path)), size)
    return [pictures[i] for i in range(len(files))]


# ---- What both command lines share ------------------------------------------------------------------------

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message} (--help lists everything)")

    def parse_args(self):
        args = super().parse_args()
        for name, value in vars(args).items():
            if value == "" != self.get_default(name):  # as from a variable of the shell that is not set
                raise BadInput(f"--{name} is empty: give a value, or leave it out")
        return args


def at_least(least, kind=int):
    def number(text):  # an argparse type
        with contextlib.suppress(ValueError):
            if least <= kind(text) <= 10**12:  # torch takes no seed beyond 64 bits; nan is in no range
                return kind(text)
        what = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {what} from {least} up (to 10^12)")
    return number


def add_device_flag(parser):
    found = {"cuda": torch.cuda.is_available(), "cpu": True, "mps": torch.backends.mps.is_available()}
    devices = [name for name, is_there in found.items() if is_there]
    parser.add_argument("--device", choices=devices, default=devices[0])


def run_script(main):
    """Calls a script's main. What the user can mend ends in one line and exit code 2; bugs do not."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (BadInput, OSError, torch.cuda.OutOfMemoryError) as error:
        mendable = errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EISDIR
        if isinstance(error, OSError) and error.errno not in mendable:
            raise
        message = str(error).strip().splitlines()[-1]  # (a worker wraps its error into a traceback)
        print(f"{os.path.basename(sys.argv[0])}: {printable(message)}", file=sys.stderr)
        sys.exit(2)


def say(text):
    if RANK == 0:
        print(printable(text), file=sys.stderr)


# ---- The command line -------------------------------------------------------------------------------------

def which_task(refs, labels, prompt, example):
    """Raises BadInput if what is given makes no task."""
    if example:
        if len(refs) != 1 or labels or prompt:
            raise BadInput("--example: give one --ref to do the same to, and no --label or --prompt")
        return "in-context"
    if not refs and not prompt and not labels:
        raise BadInput("nothing to draw: give --prompt, --ref, or both (--help shows the tasks)")
    if len(refs) > 4:
        raise BadInput(f"--ref {len(refs)} times: four at most fit one picture")
    if len(refs) != len(labels) and (labels or len(refs) > 1):
        raise BadInput(f"--ref {len(refs)} times and --label {len(labels)} times: give a --label for each "
                       "--ref, in their order: what to look for in it")
    if len(refs) > 1 and not prompt:
        raise BadInput(f"--ref {len(refs)} times: say with --prompt where each of them stands")
    if len(refs) != 1:
        return "multi-image" if refs else "text-to-image"
    return "reconstruction" if not labels else "subject-driven" if prompt else "segmentation"


def name_references(labels, prompt):
    """-> the prompt with <image> behind each label, where training has its reference, and the labels' numbers
    in that order. Raises BadInput if it does not name one."""
    spans = {}  # of each label, by its index; none overlaps another
    for i in sorted(range(len(labels)), key=lambda i: -len(labels[i])):  # "dog face" before "dog"
        for match in re.finditer(rf"(?<![\w-]){re.escape(labels[i])}(?![\w-])", prompt):
            if all(match.end() <= start or end <= match.start() for start, end in spans.values()):
                spans[i] = match.span()
                break
        else:
            raise BadInput(f"--prompt does not name {labels[i]!r}: say where each --label stands")
    in_prompt = sorted(spans, key=spans.get)
    for i in reversed(in_prompt):
        end = spans[i][1]
        prompt = f"{prompt[:end]} <image>{prompt[end:]}"
    return prompt, in_prompt


def say_unknown(known, labels, caption):
    """Says which words of --label and --prompt training never saw. known: from train.known_text."""
    places = [*filter(None, PLACES), *(QUARTERS if len(labels) > 1 else ["in the middle"])]
    for phrase in sorted((*labels, *places, *known["backgrounds"]), key=len, reverse=True):
        caption = re.sub(rf"(?<!\w){re.escape(phrase)}(?!\w)", ",", caption)
    new = re.findall(r"\b(?:in|on|at|under|behind|beside|near|over) (?:an?|the) [\w ]*\w", caption)
    words = known["words"].split() + words_of(" ".join(new))  # those of `new` are said already
    new += [word for word in words_of(" ".join((*labels, caption))) if word not in words]
    if new:
        say(f"training never saw {', '.join(map(repr, new))}, which tells the model nothing (places and "
            f"backgrounds that it knows: {', '.join((*places, *known['backgrounds'][:12]))}, ...)")


def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ref", metavar="IMAGE", action="append", default=[],
                        help="an image file, cropped to its central square; up to four times")
    parser.add_argument("--label", action="append", default=[],
                        help='what each --ref shows, in their order; or which of several: "cat on the left"')
    parser.add_argument("--example", metavar=("BEFORE", "AFTER"), nargs=2, default=[],
                        help="two pictures that show what to do to the reference")
    parser.add_argument("--prompt", default="", help="the picture to draw, in words")
    parser.add_argument("-n", type=at_least(1), default=1, help="how many pictures")
    parser.add_argument("-o", "--output", default="sample.png",
                        help="a .png, several pictures as a grid, or a folder (default: sample.png)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="picture i is drawn with seed + i")
    parser.add_argument("--temperature", type=at_least(0, float), nargs="+", default=TEMPERATURES,
                        help="0 takes the likeliest codes; a number, or one for each codebook (default: "
                             f"{' '.join(map(str, TEMPERATURES))})")
    for name, followed in (("--cfg-image", "the references"), ("--cfg-text", "the text")):
        parser.add_argument(name, type=at_least(0, float), default=argparse.SUPPRESS,
                            help=f"how closely to follow {followed} (default: the task's)")
    parser.add_argument("--ckpt", help="a trained model (default: out/stage2.pt, or else weights/cpu.pt)")
    add_device_flag(parser)
    args = parser.parse_args()
    if os.path.splitext(args.output)[1].lower() in IMAGE_ENDINGS - {".png"}:
        raise BadInput(f"-o {args.output}: pictures are written as PNG: give a name that ends in .png, "
                       "or a folder")
    return args


def output_paths(args):
    """Where --output says: a PNG, one or a grid; or one for each picture in a folder. Raises BadInput if that
    would overwrite an input."""
    paths = [args.output]
    if not args.output.lower().endswith(".png"):
        paths = [os.path.join(args.output, f"{args.seed + i}.png") for i in range(args.n)]
    old = [path for path in paths if os.path.exists(path)]
    for name in filter(None, (*args.ref, *args.example, args.ckpt)):
        if os.path.exists(name) and any(os.path.samefile(path, name) for path in old):
            raise BadInput(f"-o {args.output}: it would overwrite the input {name}: give another name")
    if old and args.output not in old:
        say(f"-o {args.output}: {len(old)} of these pictures are there already and will be overwritten "
            f"({os.path.basename(old[0])}, ...)")
    return paths


def save_pictures(pictures, paths, args):
    """Writes uint8 (n, H, W, 3) to these paths; to a single one as a grid."""
    if len(paths) < len(pictures):
        cells = [(f"seed {args.seed + i}", [picture]) for i, picture in enumerate(pictures)]
        titles = [args.prompt or " ".join(args.label)] + [""] * args.n
        return save_sheet([(titles[i // 4], cells[i:i + 4]) for i in range(0, args.n, 4)], args.output)
    for path, picture in zip(paths, pictures):
        with whole_file(path) as temporary:
            Image.fromarray(picture).save(temporary, "PNG")


def main():
    args = parse_args()
    if any("\n" in text.strip() for text in (args.prompt, *args.label)):
        say("--prompt, --label: only the first line of each is used")
    paths = output_paths(args)
    task = which_task(args.ref, args.label, args.prompt, args.example)
    if task == "reconstruction" and args.prompt:
        say("no --label: the reference is copied; add --label to draw its subject as --prompt says")
    trained = os.path.join("out", "stage2.pt")
    path = args.ckpt or (trained if os.path.exists(trained) else SHIPPED)
    model, tokenizer, known = load_models(path, torch.device(args.device))
    levels = model.config.n_codebooks
    temperatures = args.temperature * levels if len(args.temperature) == 1 else args.temperature
    if args.temperature is not TEMPERATURES and len(temperatures) != levels:
        raise BadInput(f"--temperature: give one number, or {levels}, one for each codebook of {path}")
    guidance = {name: scale for name, scale in vars(args).items() if name.startswith("cfg_")}  # if given

    named, caption = [clean_label(label) for label in args.label], clean_text(args.prompt)
    if args.prompt and not caption:
        raise BadInput("--prompt has no words: describe the picture, or leave it out")
    if not all(name for name, _ in named):
        raise BadInput("--label has no words: name what its --ref shows, or leave it out")
    asked = [name + place for name, place in named]  # the place says where to look for the thing in its file
    labels = asked if task == "segmentation" else [name for name, _ in named]
    files = list(zip([*args.example, *args.ref], asked or [""] * 3))
    say_unknown(known, labels, caption)
    if task == "subject-driven" and labels[0] not in caption:
        say(f"--prompt does not name {labels[0]!r}, as it always does in training")
    if task == "multi-image":
        caption, in_prompt = name_references(labels, caption)
        files = [files[i] for i in in_prompt]
    prompt, started = fill_prompt(task, labels, caption), time.time()
    references = open_references(files, task, model, tokenizer)
    pictures = draw(model, tokenizer, task, [(prompt, references)], n=args.n, seed=args.seed,
                    temperatures=temperatures, **guidance)
    seconds = (time.time() - started) / args.n
    save_pictures(pictures, paths, args)
    print(f"{task} with {path}: wrote {', '.join(paths)} ({seconds:.2f} s a picture)")


if __name__ == "__main__":
    run_script(main)
