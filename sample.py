"""Draws pictures. The task follows from what is given:

    python sample.py --ref dog.png --label dog --prompt "a dog on the beach"     this dog, in a new scene
    python sample.py --ref dog.png --label dog                                   the dog, cut out, on black
    python sample.py --ref dog.png                                               the picture itself, redrawn
    python sample.py --prompt "a dog on the beach"                               text alone
    python sample.py --prompt "a small cat in space" -n 8 -o cats.png            eight pictures, as one grid
"""
import argparse
import contextlib
import math
import os
import textwrap
import time

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import data
from data import BadInput
from mentor import GUIDANCE, Config, Mentor, fill_prompt, generate, load_checkpoint
from tokenizer import Tokenizer, to_arrays, to_images

SHIPPED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights", "cpu.pt")


def load_models(path, device):
    """A checkpoint -> (transformer, tokenizer), ready to draw. Raises BadInput."""
    try:
        checkpoint = load_checkpoint(path)
        if checkpoint["stage"] == 0:
            raise ValueError(f"{path} holds the tokenizer alone: give a stage1.pt or stage2.pt")
        config = Config(**checkpoint["config"])
        model = Mentor(config)
        tokenizer = Tokenizer(config.downsample, config.codebook_size, config.code_dim, config.channels)
        model.load_state_dict(checkpoint["model"])
        tokenizer.load_state_dict(checkpoint["tokenizer"])
    except RuntimeError:
        raise BadInput(f"--ckpt {path}: its weights do not fit its own configuration") from None
    except ValueError as error:
        raise BadInput(f"--ckpt {error}") from error
    return model.to(device).eval(), tokenizer.to(device).eval()


def which_task(ref, label, prompt):
    if label and not ref:
        raise BadInput(f"--label {label}: says what to look for in a reference; give --ref IMAGE too, or name it in --prompt")
    if not ref and not prompt:
        raise BadInput("nothing to draw: give --prompt, --ref, or both (--help shows the tasks)")
    if not ref:
        return "text-to-image"
    return "reconstruction" if not label else "subject-driven" if prompt else "segmentation"


@torch.no_grad()
def draw(model, tokenizer, task, ref=None, label="", prompt="", **how):
    """-> uint8 (n, H, W, 3). ref: RGB image of the model's size. how: as mentor.generate takes it.
    Raises BadInput where the text does not fit the block."""
    device, references = model.embedding.weight.device, []
    if ref is not None:
        references = list(tokenizer.encode(to_images([np.asarray(ref)], device)).cpu())
    try:
        codes = generate(model, [(fill_prompt(task, label, prompt), references)], **how)
    except ValueError as error:
        raise BadInput(f"--prompt: {error}") from error
    return to_arrays(tokenizer.decode(codes))


@contextlib.contextmanager
def whole_file(path):
    """Gives a temporary name to write to, then moves it to `path`: a file is there whole or not at all."""
    temporary = f"{path}.{os.getpid()}.tmp"
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


def main():
    parser = data.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ref", metavar="IMAGE", help="any image file; its centred square is used")
    parser.add_argument("--label", default="", help="what to look for in the reference")
    parser.add_argument("--prompt", default="", help="the picture to draw, in words")
    parser.add_argument("-n", type=data.whole(1), default=1, help="how many pictures")
    parser.add_argument("-o", "--output", default="sample.png", help="a .png, several pictures as a grid, or a folder, one PNG each (default: sample.png)")
    parser.add_argument("--seed", type=data.whole(0), default=0, help="picture i is drawn with seed + i")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 takes the likeliest code each time (default: 0.6)")
    parser.add_argument("--top-k", type=data.whole(0), default=0, help="draw from the k likeliest codes (0: from all)")
    parser.add_argument("--cfg", type=float, help="guidance, image and text alike (default: what suits the task)")
    parser.add_argument("--cfg-image", type=float, help="how closely to follow the reference (1: no guidance)")
    parser.add_argument("--cfg-text", type=float, help="how closely to follow the text (1: no guidance)")
    parser.add_argument("--ckpt", help="a trained model (default: out/stage2.pt if it is there, else the shipped weights/cpu.pt)")
    parser.add_argument("--device", choices=("cpu", "cuda")[:1 + torch.cuda.is_available()],
                        default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    task = which_task(args.ref, args.label, args.prompt)
    for name in ("temperature", "cfg", "cfg_image", "cfg_text"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be a number from 0 up")
    path = args.ckpt or next((p for p in (os.path.join("out", "stage2.pt"), SHIPPED) if os.path.exists(p)), None)
    if path is None:
        raise BadInput("no trained model: neither out/stage2.pt nor weights/cpu.pt is there (python train.py --stage 1, then 2)")
    model, tokenizer = load_models(path, torch.device(args.device))
    ref = data.open_square(args.ref, model.config.image_size) if args.ref else None
    image, text = (args.cfg if args.cfg is not None else preset for preset in GUIDANCE[task])
    started = time.time()
    pictures = draw(model, tokenizer, task, ref, args.label, args.prompt, n=args.n, seed=args.seed,
                    temperature=args.temperature, top_k=args.top_k,
                    cfg_image=image if args.cfg_image is None else args.cfg_image,
                    cfg_text=text if args.cfg_text is None else args.cfg_text)
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
    data.run(main)
