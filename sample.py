"""Draws pictures. The task follows from what is given:

    python sample.py --ref dog.png --label dog --prompt "a dog on the beach"     this dog, in a new scene
    python sample.py --ref dog.png --label dog                                   the dog, cut out, on black
    python sample.py --ref dog.png                                               the picture itself, redrawn (--prompt may describe it)
    python sample.py --prompt "a dog on the beach"                               text alone
    python sample.py --prompt "a small cat in space" -n 8 -o cats.png            eight pictures, as one grid
"""
import argparse
import contextlib
import math
import os
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import data
from data import BadInput
from mentor import GUIDANCE, TEMPERATURE, Config, Mentor, fill_prompt, generate, load_checkpoint
from tokenizer import Tokenizer, to_arrays, to_images


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message} (--help lists everything)")


def add_data_flags(parser):
    parser.add_argument("--data", help="emoji, shapes or a folder of images; several with commas between (default: emoji)")
    parser.add_argument("--backgrounds", metavar="DIR", help="photographs to place subjects on, each named by a .txt beside it, its file name or its folder")


def at_least(least):
    def number(text):  # an argparse type
        if not text.isdecimal() or not least <= int(text) <= 10**12:  # torch takes no seed beyond 64 bits
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} up (to 10^12)")
        return int(text)
    return number


def run(main):
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (BadInput, OSError, torch.cuda.OutOfMemoryError) as error:  # (a worker wraps its error into a traceback: the last line counts)
        print(f"{Path(sys.argv[0]).name}: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        sys.exit(2)


SHIPPED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights", "cpu.pt")


def open_checkpoint(path):
    """load_checkpoint for scripts: what is wrong with the file is for the user to mend."""
    try:
        return load_checkpoint(path)
    except ValueError as error:
        raise BadInput(str(error)) from error


def load_models(path, device):
    """A checkpoint -> (transformer, tokenizer), ready to draw. Raises BadInput."""
    checkpoint = open_checkpoint(path)
    if checkpoint["stage"] == 0:
        raise BadInput(f"--ckpt {path} holds the tokenizer alone: give a stage1.pt or stage2.pt")
    config = Config(**checkpoint["config"])
    model = Mentor(config)
    tokenizer = Tokenizer(config.downsample, config.codebook_size, config.code_dim, config.channels)
    try:
        model.load_state_dict(checkpoint["model"])
        tokenizer.load_state_dict(checkpoint["tokenizer"])
    except RuntimeError:
        raise BadInput(f"--ckpt {path}: its weights do not fit its own configuration") from None
    return model.to(device).eval(), tokenizer.to(device).eval()


def which_task(ref, label, prompt):
    if label and not ref:
        raise BadInput(f"--label {label}: says what to look for in a reference; give --ref IMAGE too, or leave --label out")
    if not ref and not prompt:
        raise BadInput("nothing to draw: give --prompt, --ref, or both (--help shows the tasks)")
    if not ref:
        return "text-to-image"
    return "reconstruction" if not label else "subject-driven" if prompt else "segmentation"


@torch.no_grad()
def draw(model, tokenizer, prompts, **how):
    """prompts: list of (pieces, references), the texts around the references and the references, uint8 (H, W, 3).
    how: as mentor.generate takes it -> uint8 (len(prompts) * n, H, W, 3). Raises ValueError where a text does not fit the block."""
    device = model.embedding.weight.device
    encoded = [(pieces, tokenizer.encode(to_images(references, device)).cpu() if references else []) for pieces, references in prompts]
    return to_arrays(tokenizer.decode(generate(model, encoded, **how)))


@contextlib.contextmanager
def whole_file(path):
    """Gives a temporary name to write to, then moves it to `path`: a file is there whole or not at all."""
    temporary = f"{path}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise BadInput(f"{path}: cannot be written (is the disk full? {error}); what was there before is untouched") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def save_sheet(rows, path):
    """rows: list of (title, cells), a cell being (caption, list of uint8 (H, W, 3) images) -> one labelled PNG."""
    big = max(96, rows[0][1][0][1][0].shape[0])  # small pictures are enlarged
    columns = max(len(cells) for _, cells in rows)
    wide = max(len(images) for _, cells in rows for _, images in cells) * (big + 2) + 10
    high = big + 24 + (30 if any(caption for _, cells in rows for caption, _ in cells) else 0)
    sheet = Image.new("RGB", (columns * wide + 10, len(rows) * high + 6), "white")
    pen = ImageDraw.Draw(sheet)
    for r, (title, cells) in enumerate(rows):
        pen.text((10, r * high + 4), title, fill="black", font=ImageFont.load_default(14))
        for c, (caption, images) in enumerate(cells):
            x, y = 10 + c * wide, r * high + 24
            for i, image in enumerate(images):
                sheet.paste(Image.fromarray(image).resize((big, big), Image.Resampling.LANCZOS), (x + i * (big + 2), y))
            lines = textwrap.wrap(caption, max(10, (wide - 10) // 6))[:2]
            pen.text((x, y + big), "\n".join(lines), fill=(90, 90, 90), font=ImageFont.load_default(12))
    with whole_file(path) as temporary:
        sheet.save(temporary, "PNG")


def show_data():
    """python data.py"""
    parser = Parser(description=data.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_flags(parser)
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("-o", "--output", default="data.png", help="the PNG to write (default: data.png)")
    args = parser.parse_args()
    subjects = data.load_subjects(args.data)
    backgrounds = data.load_subjects(args.backgrounds) if args.backgrounds else ()
    samples = {task: [data.Tasks(subjects, {task: 1.0}, 64, args.seed, True, backgrounds)[i] for i in range(6)]
               for task in data.TASKS[:5 if subjects.table["has_cutout"].any() else 2]}
    save_sheet([(f"{task}: {'reference, ' if row[0]['refs'] else ''}target",
                 [("<image>".join(fill_prompt(task, s["label"], s["caption"])), [*s["refs"], s["target"]]) for s in row])
                for task, row in samples.items()], args.output)
    print(f"wrote {args.output}: {subjects.said}; {subjects.table['held_out'].sum()} images are held out")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ref", metavar="IMAGE", help="any image file; its centred square is used")
    parser.add_argument("--label", default="", help="what to look for in the reference")
    parser.add_argument("--prompt", default="", help="the picture to draw, in words")
    parser.add_argument("-n", type=at_least(1), default=1, help="how many pictures")
    parser.add_argument("-o", "--output", default="sample.png", help="a .png, several pictures as a grid, or a folder, one PNG each (default: sample.png)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="picture i is drawn with seed + i")
    parser.add_argument("--temperature", type=float, default=TEMPERATURE, help="0 takes the likeliest code each time (default: %(default)s)")
    parser.add_argument("--top-k", type=at_least(0), default=0, help="draw from the k likeliest codes (0: from all)")
    parser.add_argument("--cfg", type=float, help="guidance, image and text alike (default: what suits the task)")
    parser.add_argument("--cfg-image", type=float, help="how closely to follow the reference (1: no guidance)")
    parser.add_argument("--cfg-text", type=float, help="how closely to follow the text (1: no guidance)")
    parser.add_argument("--ckpt", help="a trained model (default: out/stage2.pt if it is there, else the shipped weights/cpu.pt)")
    parser.add_argument("--device", choices=("cpu", "cuda")[:1 + torch.cuda.is_available()],
                        default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if os.path.splitext(args.output)[1].lower() in data.IMAGE_ENDINGS - {".png"}:
        raise BadInput(f"-o {args.output}: pictures are written as PNG: give a name that ends in .png, or a folder")
    task = which_task(args.ref, args.label, args.prompt)
    if task == "reconstruction" and args.prompt:
        print("a reference without --label is copied: name its subject with --label to draw it as --prompt says", file=sys.stderr)
    for name in ("temperature", "cfg", "cfg_image", "cfg_text"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be a number from 0 up")
    path = args.ckpt or next((p for p in (os.path.join("out", "stage2.pt"), SHIPPED) if os.path.exists(p)), None)
    if path is None:
        raise BadInput("no trained model: neither out/stage2.pt nor weights/cpu.pt is there (python train.py --stage 1, then 2)")
    model, tokenizer = load_models(path, torch.device(args.device))
    references = [np.asarray(data.open_square(args.ref, model.config.image_size))] if args.ref else []
    image, text = (args.cfg if args.cfg is not None else preset for preset in GUIDANCE[task])
    started = time.time()
    try:
        prompt = fill_prompt(task, args.label.lower(), args.prompt.lower())  # as all words were in training
        pictures = draw(model, tokenizer, [(prompt, references)], n=args.n, seed=args.seed, temperature=args.temperature, top_k=args.top_k,
                        cfg_image=image if args.cfg_image is None else args.cfg_image,
                        cfg_text=text if args.cfg_text is None else args.cfg_text)
    except ValueError as error:
        raise BadInput(f"--prompt: {error}") from error
    seconds = (time.time() - started) / args.n

    paths = [os.path.join(args.output, f"{args.seed + i}.png") for i in range(args.n)]
    if args.output.lower().endswith(".png"):
        paths = [args.output]
    if len(pictures) > len(paths):
        cells = [(f"seed {args.seed + i}", [picture]) for i, picture in enumerate(pictures)]
        save_sheet([(args.prompt or args.label if i == 0 else "", cells[i:i + 4]) for i in range(0, args.n, 4)], args.output)
    else:
        for name, picture in zip(paths, pictures):
            with whole_file(name) as temporary:
                Image.fromarray(picture).save(temporary, "PNG")
    print(f"{task} with {path}: wrote {', '.join(paths)} ({seconds:.2f} s a picture)")


if __name__ == "__main__":
    run(main)
