"""Draws pictures. The task follows from what is given:

    python sample.py --ref dog.png --label dog --prompt "a dog on the beach"    this dog, in a new scene
    python sample.py --ref dog.png --label dog --ref cat.png --label cat \\
        --prompt "a dog on the left and a cat on the right, on the beach"       both; up to four
    python sample.py --ref scene.png --label "cat on the left"                  that cat, cut out, on black
    python sample.py --example before.png after.png --ref query.png             what the example does to one
    python sample.py --ref dog.png                      the picture itself, redrawn (--prompt may describe it)
    python sample.py --prompt "a dog on the beach" -n 8 -o dogs.png             text alone; eight, as a grid
"""
import argparse
import contextlib
import dataclasses
import errno
import os
import re
import signal
import sys
import threading
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

from data import AS_GIVEN, IMAGE_ENDINGS, PLACES, QUARTERS, Subject, compose, cutout
from mentor import (CODES, HIDDEN, ID, TASKS, TEMPERATURES, Config, Mentor, build_sequence, clean_label,
                    clean_text, fill_prompt, generate, hide_condition, pad_sequences, reference_patches,
                    words_of)
from tokenizer import (BadInput, Tokenizer, autocast, from_bytes, open_square, quality, read_image,
                       save_sheet, to_arrays, to_images, whole_file)

# ---- From a prompt to pictures ----------------------------------------------------------------------------

VERSION = 5  # of the checkpoints: raised whenever older ones no longer fit
SHIPPED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights", "cpu.pt")


def load_checkpoint(path):
    """-> dict(config, stage, model, tokenizer, ...): tensors and plain values; nothing in the file is
    executed. Raises BadInput on a file that is missing, damaged, or of another version."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["config"], checkpoint["model"], checkpoint["tokenizer"], checkpoint["stage"]
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except Exception as error:  # a damaged file can fail anywhere inside torch.load
        what = f"not a checkpoint of this program, or damaged ({type(error).__name__})"
        raise BadInput(f"{path}: {what}") from error
    version = checkpoint.get("version")
    if version != VERSION:
        raise BadInput(f"{path}: written by another version of this program ({version}, here {VERSION}): "
                       "train it anew")
    return checkpoint


def save_checkpoint(path, **state):
    with whole_file(path) as temporary:
        torch.save({"version": VERSION, **state}, temporary)


def export(source, path):
    """Tokenizer and transformer of a stage 2, in half precision, nothing else: what drawing needs."""
    checkpoint = load_checkpoint(source)
    if "settings" not in checkpoint or os.path.realpath(path) == os.path.realpath(source):
        raise BadInput(f"--export {path}: {source} is exported already, or would be overwritten: "
                       "give another name or --out")
    if checkpoint["step"] < checkpoint["settings"]["steps"]:
        say(f"{source} is not finished (step {checkpoint['step']}): exporting it all the same")
    half = {part: {name: weight.half() for name, weight in checkpoint[part].items()}
            for part in ("model", "tokenizer")}
    kept = {name: checkpoint[name] for name in ("config", "stage", "step", "known")}
    save_checkpoint(path, **kept, **half)
    print(f"wrote {path}, {os.path.getsize(path) / 1e6:.1f} MB")


def load_models(path, device):
    """A checkpoint -> (transformer, tokenizer), ready to draw. Raises BadInput."""
    checkpoint = load_checkpoint(path)
    if checkpoint["stage"] == 0:
        raise BadInput(f"--ckpt {path} holds the tokenizer alone: give a stage1.pt or stage2.pt")
    try:
        config = Config(**checkpoint["config"])
        model, tokenizer = Mentor(config), Tokenizer(config)
        model.load_state_dict(checkpoint["model"])
        model.known = checkpoint["known"]
        tokenizer.load_state_dict(checkpoint["tokenizer"])
    except (RuntimeError, TypeError):
        raise BadInput(f"--ckpt {path}: its weights do not fit its own configuration") from None
    return model.to(device).eval(), tokenizer.to(device).eval()


def widened(picture, margin):
    """uint8 (H, W, 3) -> image, so many pixels wider on each side, where its edges go on"""
    return Image.fromarray(np.pad(picture, ((margin, margin), (margin, margin), (0, 0)), mode="edge"))


def at_sizes(config, task, picture):
    """A reference, uint8 (H, W, 3) -> a picture for each size at which it enters in this task: shrunk towards
    the middle."""
    pictures = []
    for size in (config.reference_sizes[index] for index in TASKS[task].sizes):
        wider = widened(picture, round(len(picture) * (1 / size - 1) / 2))  # at size 1 the picture itself
        pictures.append(np.asarray(wider.resize(picture.shape[:2], Image.Resampling.BICUBIC)))
    return pictures


@torch.no_grad()
def draw(model, tokenizer, task, prompts, **how):
    """prompts: list of (pieces, references): the texts around the references, and these, uint8 (H, W, 3).
    how: as mentor.generate takes it; guidance is the task's where it is not given -> uint8
    (len(prompts) * n, H, W, 3). Raises BadInput: too long."""
    about = TASKS[task]

    def encode(reference):  # -> codes (patches, n_codebooks)
        pictures = to_images(at_sizes(model.config, task, reference), model.head_gain.device)
        codes = tokenizer.encode(pictures)  # (sizes, N, n_codebooks)
        return codes.flatten(0, 1)[reference_patches(model.config, about.sizes)]

    encoded = [(pieces, [encode(reference) for reference in references]) for pieces, references in prompts]
    how = {"cfg_image": about.cfg_image, "cfg_text": about.cfg_text, **how}
    return to_arrays(tokenizer.decode(generate(model, encoded, about.sizes, **how)))


def frame_subjects(model, tokenizer, labels, pictures):
    """Brings what the labels name, in square pictures, uint8 (H, W, 3), to where most references of training
    show it (data.AS_GIVEN): on whole patches, whose codes drawing then copies. Where it is now the model says
    itself, by cutting it out -> list of uint8 (image_size, image_size, 3)"""
    size = model.config.image_size
    framed = [np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BOX))
              for picture in pictures]
    prompts = [(fill_prompt("segmentation", [label]), [picture]) for label, picture in zip(labels, framed)]
    cut_out = draw(model, tokenizer, "segmentation", prompts, exact=True)
    for i, (picture, alone) in enumerate(zip(pictures, cut_out)):
        box = box_to_frame(alone)
        if box is None:
            say(f"--ref: no {labels[i]} was found in it: it is shown as it is")
            continue
        side = len(picture)
        resized = widened(picture, side).resize((size, size), Image.Resampling.BICUBIC, side + side * box)
        framed[i] = np.asarray(resized)
    return framed


def box_to_frame(alone):
    """Something on black, uint8 (H, W, 3) -> the square that shows it as data.AS_GIVEN does: left, top,
    right, bottom as shares of the picture. None: nothing is seen."""
    shown = alone.max(2) > 60  # black after the tokenizer is not quite 0
    columns, rows = (np.flatnonzero(shown.sum(axis) > 1) for axis in (0, 1))  # (not where one pixel stands)
    if len(columns) == 0 or len(rows) == 0:
        return None
    left, top, right, bottom = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / len(alone)
    side = max(right - left, bottom - top) / AS_GIVEN.side
    left, top = (left + right - side) / 2, bottom - side * (1 + AS_GIVEN.side) / 2
    if max(abs(left), abs(top), abs(side - 1)) < 1 / 16:  # it stands so already: no need to blur it
        return np.array([0, 0, 1, 1])
    return np.array([left, top, left + side, top + side])


def open_reference(path, label, task, model, tokenizer):
    """An image file as the task shows it -> uint8 (image_size, image_size, 3). Raises BadInput."""
    size = model.config.image_size
    if task not in ("subject-driven", "multi-image"):
        return np.asarray(open_square(path, size))
    image = read_image(path)
    if image.mode == "RGBA":  # a cut-out: nothing to be found
        sprite = cutout(Subject(path, label, "file", path))
        return np.asarray(compose(sprite, Image.new("RGB", (size, size), "white"), AS_GIVEN)[0])
    return frame_subjects(model, tokenizer, [label], [np.asarray(open_square(path, 4 * size))])[0]


# ---- From samples to batches ------------------------------------------------------------------------------

class Batch(NamedTuple):
    """Sequences without their codes, which only the tokenizer knows: workers lay out, the device encodes."""
    pictures: torch.Tensor  # uint8 (n, H, W, 3): the targets of all rows, then their references
    tokens: torch.Tensor    # (B, T, 5): for its codes, a patch's number among all patches of the pictures
    lengths: torch.Tensor   # (B,)
    coverage: torch.Tensor  # (B, N): how much of each patch of the target the subject covers, 0 to 1
    coarse: torch.Tensor    # (B,): what their coarsest codes weigh in the loss (mentor.Task)


def collate(config, n_rows, samples):
    """Samples, sorted by length and split -> list of Batch, n_rows each: short sequences are not padded
    to the longest, and the mean of the batches' losses is the loss of all samples."""
    rows = []
    for s in samples:
        pieces, references = hide_condition(fill_prompt(s.task, s.labels, s.caption), s.references, s.hide)
        rows.append((pieces, [at_sizes(config, s.task, reference) for reference in references], s))
    rows.sort(key=lambda row: config.n_patches * sum(map(len, row[1])) + len(" ".join(row[0]).split()))
    return [lay_out(config, rows[i:i + n_rows]) for i in range(0, len(rows), n_rows)]


def lay_out(config, rows):
    """rows: list of (pieces, references, sample), a reference being a picture a size, uint8 -> Batch"""
    numbered = dataclasses.replace(config, n_codebooks=1)  # a patch has its number now, its codes later
    N, pictures, sequences = config.n_patches, [sample.target for _, _, sample in rows], []
    for i, (pieces, references, sample) in enumerate(rows):
        numbers, sizes = [], TASKS[sample.task].sizes
        for reference in references:
            numbers.append(N * len(pictures) + reference_patches(config, sizes)[:, None])  # (patches, 1)
            pictures += reference
        target = N * i + torch.arange(N)[:, None]
        tokens = build_sequence(numbered, pieces, numbers, sizes, target)
        if sample.hide == "picture":  # what is drawn so far tells nothing: each patch must ask the prompt
            tokens[1 - N:, ID] = HIDDEN
        sequences.append(tokens)
    masks = torch.from_numpy(np.stack([sample.mask for _, _, sample in rows]))  # (B, H, W)
    coverage = F.avg_pool2d(masks[:, None].float(), config.downsample).flatten(1) / 255
    coarse = torch.tensor([TASKS[sample.task].coarse for _, _, sample in rows])
    pictures = torch.from_numpy(np.stack(pictures))  # (n, H, W, 3)
    return Batch(pictures, *pad_sequences(sequences, multiple=8), coverage, coarse)


@torch.no_grad()
def fill_codes(tokenizer, batch, device):
    """A Batch -> what Mentor.forward takes: tokens (B, T, 4 + n_codebooks), lengths (B,), target codes
    (B, N, n_codebooks)."""
    pictures, tokens, lengths = (x.to(device, non_blocking=True) for x in batch[:3])
    codes = tokenizer.encode(from_bytes(pictures))  # (n, N, n_codebooks)
    numbers = tokens[..., CODES][..., 0]  # (B, T); at a word 0, whose codes are never looked at
    tokens = torch.cat((tokens[..., :4], codes.flatten(0, 1)[numbers]), -1)
    return tokens, lengths, codes[:len(tokens)]


# ---- Looking at what a model has learnt -------------------------------------------------------------------

SUBJECT_PATCH = 0.6  # "on the subject": on the patches of which it covers more than this


@torch.no_grad()
def held_out_losses(model, tokenizer, datasets, n, device):
    """Cross-entropy per task in nats a patch. On subject-driven, in stage 1 on segmentation, two gains: how
    much worse it gets with the next sample's reference, or text. On the subject, by codebook: the loss, and
    the gain of the reference."""
    losses, looked_at = {}, "subject-driven" if "subject-driven" in datasets else "segmentation"

    def mean_losses(samples):  # -> of all patches, the sum over their codes; on the subject (n_codebooks,)
        nats, covered = [], []
        for batch in collate(model.config, 16, [sample._replace(hide="") for sample in samples]):
            with autocast(device):
                nats.append(model(*fill_codes(tokenizer, batch, device)).cpu())  # (B, N, n_codebooks)
            covered.append(batch.coverage > SUBJECT_PATCH)
        nats, covered = torch.cat(nats), torch.cat(covered)
        return nats.sum(-1).mean().item(), nats[covered].mean(0)

    for task, dataset in datasets.items():
        samples = [dataset[i] for i in range(n)]
        losses[task], on_subject = mean_losses(samples)
        if task == looked_at:
            pairs = list(zip(samples, samples[1:] + samples[:1]))
            other_reference, blind = mean_losses([a._replace(references=b.references) for a, b in pairs])
            other_text, _ = mean_losses([a._replace(labels=b.labels, caption=b.caption) for a, b in pairs])
            losses["reference gain"] = other_reference - losses[task]
            losses["prompt gain"] = other_text - losses[task]
            losses["on the subject"] = on_subject.tolist()
            losses["its reference gain"] = (blind - on_subject).tolist()
    return {name: np.round(value, 4).tolist() for name, value in losses.items()}


def evaluate(model, tokenizer, held_out, sheet):
    """held_out: task -> data.Tasks -> figures of the model; sheet: where to draw the first samples."""
    if model is tokenizer:
        dataset, = held_out.values()
        return quality(tokenizer, [dataset[i].target for i in range(256)], sheet)
    device, n = model.head_gain.device, 64 if model.config.n_embd > 64 else 16  # (fewer of --preset test)
    losses = held_out_losses(model, tokenizer, held_out, n, device)
    first = {task: [dataset[i] for i in range(6)] for task, dataset in held_out.items()}
    save_samples(first, sheet, model, tokenizer)
    return losses


def save_samples(samples, path, *models):
    """samples: task -> list of data.Sample -> one labelled PNG: references, target and, given models, what
    they draw."""
    sheet = []
    for task, row in samples.items():
        prompts = [(fill_prompt(task, s.labels, s.caption), s.references) for s in row]
        drawn = [[picture] for picture in draw(*models, task, prompts)] if models else [[]] * len(row)
        columns = ["reference"] * bool(row[0].references) + ["target"] + ["drawn"] * bool(models)
        cells = [("<image>".join(pieces), [*references, sample.target, *its])
                 for (pieces, references), sample, its in zip(prompts, row, drawn)]
        sheet.append((f"{task}: {', '.join(columns)}", cells))
    save_sheet(sheet, path)


# ---- How a script speaks and stops ------------------------------------------------------------------------

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them
STOPS = (signal.SIGINT, signal.SIGTERM)  # training saves, and leaves


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message} (--help lists everything)")


def at_least(least, kind=int):
    def number(text):  # an argparse type
        with contextlib.suppress(ValueError):
            if least <= kind(text) <= 10**12:  # torch takes no seed beyond 64 bits; nan is in no range
                return kind(text)
        what = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {what} from {least} up (to 10^12)")
    return number


def add_device_flag(parser):
    devices = ["cpu", "cuda"][:1 + torch.cuda.is_available()]
    parser.add_argument("--device", choices=devices, default=devices[-1])


def run_script(main):
    """Calls a script's main. What the user can mend ends in one line and exit code 2; bugs do not."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (BadInput, OSError, torch.cuda.OutOfMemoryError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
            raise
        message = str(error).strip().splitlines()[-1]  # (a worker wraps its error into a traceback)
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
        sys.exit(2)


def say(text):
    if RANK == 0:
        print(text, file=sys.stderr)


@contextlib.contextmanager
def stop_signals():
    """Ctrl-C and SIGTERM lengthen the list that this gives, instead of ending the program."""
    stop = []
    handlers = [signal.signal(name, lambda *_: stop.append(True)) for name in STOPS]
    try:
        yield stop
    finally:
        for name, handler in zip(STOPS, handlers):
            signal.signal(name, handler)


def any_process(flag, device):
    """Whether it is up in any process: signals reach them at different steps; they stop together."""
    if WORLD == 1:
        return bool(flag)
    votes = torch.tensor(float(bool(flag)), device=device)
    dist.all_reduce(votes)
    return votes.item() > 0


def follow_main(worker):
    """Ctrl-C and SIGTERM reach the whole group of processes: the main one stops after its step, and needs
    its workers until then. Where it is killed they leave, too."""
    for name in STOPS:
        signal.signal(name, signal.SIG_IGN)

    def watch(main_process=os.getppid()):
        while os.getppid() == main_process:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


# ---- The command line -------------------------------------------------------------------------------------

def which_task(refs, labels, prompt, example):
    """Raises BadInput where what is given makes no task."""
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
    """--prompt with <image> behind each label, where training has its reference, and the labels' numbers in
    that order. Raises BadInput where it does not name one."""
    prompt, ends = " ".join(prompt.replace("<image>", " ").split()), {}  # (some write them, too)
    for i in sorted(range(len(labels)), key=lambda i: -len(labels[i])):  # "black cat" before "cat"
        found = (match.end() for match in re.finditer(rf"(?<!\w){re.escape(labels[i])}(?!\w)", prompt))
        end = next((end for end in found if end not in ends.values()), None)
        if end is None:
            raise BadInput(f"--prompt does not name {labels[i]!r}: say where each --label stands")
        ends[i] = end
    order = sorted(ends, key=ends.get)
    for i in reversed(order):
        prompt = f"{prompt[:ends[i]]} <image>{prompt[ends[i]:]}"
    return prompt, order


def say_unknown(known, labels, caption):
    """Says what of --label and --prompt training never saw. known: as train.known_text gives it."""
    places = [*filter(None, PLACES), *(QUARTERS if len(labels) > 1 else ["in the middle"])]
    for phrase in sorted((*labels, *places, *known["backgrounds"]), key=len, reverse=True):
        caption = re.sub(rf"(?<!\w){re.escape(phrase)}(?!\w)", ",", caption)
    new = re.findall(r"\b(?:in|on|at|under|behind|beside|near|over) (?:an?|the) [\w ]*\w", caption)
    words = known["words"].split() + words_of(str(new))
    new += [word for word in words_of(" ".join((*labels, caption))) if word not in words]
    if new:
        say(f"training never saw {', '.join(map(repr, new))}, which tells the model nothing (places and "
            f"backgrounds that it knows: {', '.join((*places, *known['backgrounds'][:12]))}, ...)")


def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ref", metavar="IMAGE", action="append", default=[],
                        help="any image file; of a photograph its centred square (up to four times)")
    parser.add_argument("--label", action="append", default=[],
                        help='what each reference shows; of several things the "cat on the left"')
    parser.add_argument("--example", metavar=("BEFORE", "AFTER"), nargs=2, default=[],
                        help="two pictures that show what to do to the reference")
    parser.add_argument("--prompt", default="", help="the picture to draw, in words")
    parser.add_argument("-n", type=at_least(1), default=1, help="how many pictures")
    parser.add_argument("-o", "--output", default="sample.png",
                        help="a .png, several pictures as a grid, or a folder (default: sample.png)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="picture i is drawn with seed + i")
    parser.add_argument("--temperature", type=at_least(0, float), nargs="+", default=TEMPERATURES,
                        help="0 takes the likeliest codes; a number, or one a codebook (default: "
                             f"{' '.join(map(str, TEMPERATURES))})")
    parser.add_argument("--cfg-image", type=at_least(0, float), help="how closely to follow the references,")
    parser.add_argument("--cfg-text", type=at_least(0, float), help="and the text (default: the task's)")
    parser.add_argument("--ckpt", help="a trained model (default: out/stage2.pt, or else weights/cpu.pt)")
    add_device_flag(parser)
    args = parser.parse_args()
    if os.path.splitext(args.output)[1].lower() in IMAGE_ENDINGS - {".png"}:
        raise BadInput(f"-o {args.output}: pictures are written as PNG: give a name that ends in .png, "
                       "or a folder")
    return args


def main():
    args = parse_args()
    task = which_task(args.ref, args.label, args.prompt, args.example)
    if task == "reconstruction" and args.prompt:
        say("no --label: the reference is copied; add --label to draw its subject as --prompt says")
    trained = os.path.join("out", "stage2.pt")
    path = args.ckpt or (trained if os.path.exists(trained) else SHIPPED)
    model, tokenizer = load_models(path, torch.device(args.device))
    levels = model.config.n_codebooks
    temperatures = args.temperature * levels if len(args.temperature) == 1 else args.temperature
    if args.temperature is not TEMPERATURES and len(temperatures) != levels:
        raise BadInput(f"--temperature: give one number, or {levels}, one for each codebook of {path}")
    guidance = {"cfg_image": args.cfg_image, "cfg_text": args.cfg_text}
    guidance = {name: scale for name, scale in guidance.items() if scale is not None}  # else the task's
    caption, files = clean_text(args.prompt), [*args.example, *args.ref]  # in the words of training
    named = [clean_label(label) for label in args.label]  # (name, place) each
    asked = [name + place for name, place in named]       # a file may show several things
    labels = asked if task == "segmentation" else [name for name, _ in named]
    shown = list(zip(files, asked or [""] * len(files)))
    say_unknown(model.known, labels, caption)
    if task == "multi-image":
        caption, order = name_references(labels, caption)
        shown = [shown[i] for i in order]
    prompt, started = fill_prompt(task, labels or [""], caption), time.time()
    references = [open_reference(path, label, task, model, tokenizer) for path, label in shown]
    pictures = draw(model, tokenizer, task, [(prompt, references)], n=args.n, seed=args.seed,
                    temperatures=temperatures, exact=True, **guidance)
    seconds = (time.time() - started) / args.n

    paths = [args.output]
    if args.output.lower().endswith(".png") and args.n > 1:  # as a grid
        cells = [(f"seed {args.seed + i}", [picture]) for i, picture in enumerate(pictures)]
        titles = [args.prompt or " ".join(args.label)] + [""] * args.n
        save_sheet([(titles[i // 4], cells[i:i + 4]) for i in range(0, args.n, 4)], args.output)
    else:
        if not args.output.lower().endswith(".png"):
            paths = [os.path.join(args.output, f"{args.seed + i}.png") for i in range(args.n)]
        for name, picture in zip(paths, pictures):
            with whole_file(name) as temporary:
                Image.fromarray(picture).save(temporary, "PNG")
    print(f"{task} with {path}: wrote {', '.join(paths)} ({seconds:.2f} s a picture)")


if __name__ == "__main__":
    run_script(main)
