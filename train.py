"""Trains everything: stage 0 the tokenizer, stage 1 multimodal alignment, stage 2 multimodal instruction.

Stages 1 and 2 train the same model by the same loop. They differ in their mix of tasks (MIXES), their
schedule (SCHEDULES), the weights that they start from (start_run), their random samples, and the weight of
segmentation's coarsest codes in the loss (batch_loss).

    python train.py --stage 1                        the tokenizer first, unless --out has a finished one
    python train.py --stage 2                        starts from out/stage1.pt
    python train.py --stage 1 --data my_folder       your own cut-outs
    python train.py --stage 2 --init weights/cpu.pt --data my_folder,emoji --out own    fine-tunes a model
    python train.py --stage 2 --show                 a sheet of what this run would learn from, no training
    torchrun --nproc_per_node=8 train.py --stage 1   eight GPUs; the same gradients as one, same --batch-size
    python train.py --export weights/mine.pt         the finished model, in half precision

The same command resumes a run where it was saved last. In --out: tokenizer.pt, stage1.pt, stage2.pt
(checkpoints), stage0.png, stage1.png, stage2.png (what it draws of held-out subjects; with --init also
stage2-before.png, what it drew before), log.jsonl (a line for each logged step; steps that an interrupted run
lost are there twice), curves.png (held-out losses and gains).
"""
import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import sys
import time
import zlib
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (AS_GIVEN, MAX_BACKGROUND, PLACES, QUARTERS, SIZES, TASKS, TaskDataset, clean_text, compose,
                  fill_prompt, load_subjects, open_cutout)
from mentor import (CODES, CONFIGS, HIDDEN, WORD_IDS, BadInput, Config, Mentor, autocast, build_sequence,
                    has_bf16, hide_condition, pack_sequences, weighted_loss, words_of)
from sample import (RANK, VERSION, WORLD, Parser, add_device_flag, at_least, draw, load_checkpoint,
                    load_weights, run_script, save_plot, save_sheet, say, whole_file)
from tokenizer import (BACKGROUNDS, Tokenizer, emoji_font, from_bytes, reference_copies, to_arrays,
                       to_images)

# For stages 0, 1, 2: optimizer steps, samples per step, peak learning rate. micro_batch: at most how many
# sequences go through the transformer at once. It decides memory and speed; the gradient is that of the whole
# batch.
SCHEDULES = {
    "test": dict(steps=(150, 80, 80), batch_size=(16, 16, 16), lr=(2e-3, 1.2e-2, 6e-3), micro_batch=16),
    "cpu": dict(steps=(6000, 600, 12600), batch_size=(16, 16, 16), lr=(2e-3, 4e-3, 3e-3), micro_batch=32),
    # Twelve minutes on an H100.
    "cpu on cuda": dict(steps=(2350, 730, 5900), batch_size=(64, 128, 160), lr=(2e-3, 4e-3, 3.5e-3),
                        micro_batch=80),
    "gpu": dict(steps=(50000, 60000, 60000), batch_size=(128, 256, 256), lr=(1e-3, 1e-3, 5e-4),
                micro_batch=64),
}
FINE_TUNING = dict(steps=200, lr=1 / 3)  # with --init: default steps, and a factor for the stage's peak rate
MIXES = {  # share of each task in a stage
    # Stage 0 sees every kind of picture. Each of these tasks has one reference: two pictures a sample.
    0: {"segmentation": 0.35, "recovery": 0.15, "subject-driven": 0.5},
    # The paper: .28, .07, .65. Reconstruction teaches to copy, which the other tasks then build on.
    1: {"text-to-image": 0.2, "reconstruction": 0.3, "segmentation": 0.5},
    # The paper: text-to-image .46, segmentation .115, recovery .115, subject-driven .31. At this scale a
    # stage without reconstruction forgets to copy.
    2: {"text-to-image": 0.13, "reconstruction": 0.03, "segmentation": 0.28, "recovery": 0.03,
        "subject-driven": 0.23, "multi-image": 0.13, "in-context": 0.17},
}
HELD_OUT = 3  # besides stages 0, 1 and 2: the seed of held-out samples, the same in all of them
CHECKPOINTS = ("tokenizer.pt", "stage1.pt", "stage2.pt")


# ---- Batches ----------------------------------------------------------------------------------------------
# Worker processes lay out sequences, but only the device has the tokenizer. So a worker writes the index of a
# patch where its codes will be, and fill_codes looks them up.

class Batch(NamedTuple):
    pictures: torch.Tensor  # uint8 (m, H, W, 3): the targets of all B samples, then their references' copies
    tokens: torch.Tensor    # (n, 5 + 1), packed: in the last column a patch's index among all of `pictures`
    lengths: list           # of the B sequences; they sum to n
    coverage: torch.Tensor  # (B, N): how much of each patch of the target the subject covers, 0 to 1
    coarse: torch.Tensor    # (B,): the weight of the coarsest codes (Task.coarse)


def collate(config, at_once, samples):
    """Samples -> list of Batch, equally many samples in each: their losses' mean is the loss of all."""
    return [lay_out(config, samples[i:i + at_once]) for i in range(0, len(samples), at_once)]


def lay_out(config, samples):
    """Samples -> Batch"""
    N, pictures, sequences = config.n_patches, [s.target for s in samples], []

    def patch_ids(first, n):  # of n pictures (n, N, 1)
        return torch.arange(N * first, N * (first + n)).view(n, N, 1)

    for i, s in enumerate(samples):
        pieces, references = hide_condition(fill_prompt(s.task, s.labels, s.caption), s.references, s.hide)
        ids = []
        for reference in references:
            copies = reference_copies(config, TASKS[s.task].copies, reference)
            ids.append(patch_ids(len(pictures), len(copies)))
            pictures += copies
        tokens = build_sequence(config, pieces, ids, TASKS[s.task].copies, patch_ids(i, 1)[0])
        if s.hide == "picture":  # so that the prompt alone must determine each patch
            tokens[1 - N:, WORD_IDS] = HIDDEN
        sequences.append(tokens)
    masks = torch.from_numpy(np.stack([s.mask for s in samples]))  # (B, H, W)
    coverage = F.avg_pool2d(masks[:, None].float(), config.downsample).flatten(1) / 255
    coarse = torch.tensor([TASKS[s.task].coarse for s in samples])
    pictures = torch.from_numpy(np.stack(pictures))  # (m, H, W, 3)
    return Batch(pictures, *pack_sequences(sequences), coverage, coarse)


@torch.no_grad()
def fill_codes(tokenizer, batch, device):
    """A Batch -> Mentor.forward's tokens (n, 5 + n_codebooks), lengths, target (B, N, n_codebooks)"""
    pictures, tokens = (x.to(device, non_blocking=True) for x in batch[:2])
    codes = tokenizer.encode(from_bytes(pictures))  # (m, N, n_codebooks)
    patch_ids = tokens[:, CODES][:, 0]  # (n,); 0 for other tokens, whose codes are never read
    tokens = torch.cat((tokens[:, :CODES.start], codes.flatten(0, 1)[patch_ids]), -1)
    return tokens, batch.lengths, codes[:len(batch.lengths)]


def stack_pictures(samples):
    """Stage 0: one micro-batch of all pictures of the samples -> [uint8 (n, H, W, 3)]"""
    return [torch.from_numpy(np.stack([picture for s in samples for picture in (s.target, *s.references)]))]


# ---- Optimization -----------------------------------------------------------------------------------------

def learning_rate(step, steps, peak):
    """5% linear warm-up, then a cosine towards zero (paper, section 4), in optimizer steps."""
    warmup = max(1, round(0.05 * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def make_optimizers(model, bf16):
    """Muon for the matrices of the blocks (the tokenizer's, too) and of the level MLPs, AdamW for all else:
    embeddings, codebooks, gains, ... torch's Muon computes in bf16. Where the hardware does not multiply
    bf16, AdamW takes these matrices as well. Weight decay is for parameters of two dimensions alone, so not
    for code tables, convolutions and gains."""
    muon, decayed, others = [], [], []
    for name, parameter in model.named_parameters():
        in_block = ".conv" in name or name.startswith(("blocks.", "level_mlps."))
        is_matrix = parameter.ndim == 2
        group = muon if is_matrix and in_block and bf16 else decayed if is_matrix else others
        group.append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)]
    if muon:  # match_rms_adamw: one learning rate serves both
        optimizers.append(torch.optim.Muon(muon, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def batch_loss(run, net, batch):
    """Of a micro-batch: returns its loss, the loss without weights for the log, and in stage 0 (codes, z)."""
    device = run.plan.device
    with autocast(device):
        if run.plan.stage == 0:
            loss, *codes_and_z = net(from_bytes(batch.to(device, non_blocking=True)))
            return loss, loss.detach(), codes_and_z
        nats = net(*fill_codes(run.tokenizer, batch, device))  # (B, N, n_codebooks)
    coverage, coarse = (x.to(device, non_blocking=True) for x in (batch.coverage, batch.coarse))
    if not run.plan.settings["init"] and (run.plan.stage == 1 or run.step < run.plan.steps // 3):
        coarse = torch.ones_like(coarse)  # a large weight delays copying, which must be learnt first
    return weighted_loss(nats, coverage, coarse), nats.detach().sum(-1).mean(), None


def accumulate(run, net, micro_batches):
    """Adds up the gradients of a batch, over its micro-batches -> loss for the log; codes and z of stage 0"""
    total, n = 0.0, len(micro_batches)
    for i, batch in enumerate(micro_batches):
        waits = isinstance(net, DistributedDataParallel) and i < n - 1  # the last backward exchanges them
        with net.no_sync() if waits else contextlib.nullcontext():
            loss, shown, codes_and_z = batch_loss(run, net, batch)
            (loss / n).backward()
        total = total + shown / n
    return total, codes_and_z


def train_step(run, net, micro_batches, lr):
    """One optimizer step -> loss and norm of the gradient, as tensors: nothing waits for the device."""
    loss, codes_and_z = accumulate(run, net, micro_batches)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if run.plan.stage == 0:
        run.tokenizer.restart_dead_codes(*codes_and_z)
    return loss, norm


# ---- Evaluation on held-out subjects ----------------------------------------------------------------------

SUBJECT_PATCH = 0.6  # "on the subject": on patches of which it covers more than this share
EDGE_PATCH = 0.02, 0.98  # "on its edge": on patches that it covers by a share between these


def psnr(a, b):
    """Peak signal-to-noise ratio of images in [-1, 1], in dB, averaged: (B, 3, H, W) x 2 -> float"""
    mean_square = (a - b).pow(2).mean((1, 2, 3))  # (B,)
    return (10 * torch.log10(4 / mean_square.clamp_min(1e-10))).mean().item()


@torch.no_grad()
def quality(tokenizer, pictures, sheet):
    """How well pictures (uint8 (H, W, 3) each) survive the tokenizer -> dict(psnr: dB, codes: how many of
    each codebook occur). sheet: the PNG to write, of the first 24 before and after."""
    images = to_images(pictures, tokenizer.codebooks.device)
    codes = tokenizer.encode(images)
    decoded = tokenizer.decode(codes)
    cells = [("", pair) for pair in zip(pictures, to_arrays(decoded[:24]))]
    save_sheet([("picture, through the tokenizer", cells[i:i + 6]) for i in range(0, len(cells), 6)], sheet)
    used = [len(level.unique()) for level in codes.unbind(-1)]
    return {"psnr": round(psnr(decoded, images), 2), "codes": used}


@torch.no_grad()
def held_out_losses(model, tokenizer, datasets, n, device):
    """Cross-entropy of each task in nats per patch. Of subject-driven (in stage 1 of segmentation) also two
    gains: how much the loss rises with another sample's reference, or text. And for each codebook the loss on
    the subject, the reference gain there, and the loss on its edge. Without that task there are none."""
    losses, compared = {}, "subject-driven" if "subject-driven" in datasets else "segmentation"

    def mean_losses(samples):
        """-> nats per patch; nats per code of each codebook, (n_codebooks,): on the subject, on its edge"""
        nats, coverage = [], []
        for batch in collate(model.config, 16, [sample._replace(hide="") for sample in samples]):
            with autocast(device):
                nats.append(model(*fill_codes(tokenizer, batch, device)).cpu())  # (B, N, n_codebooks)
            coverage.append(batch.coverage)
        nats, coverage = torch.cat(nats), torch.cat(coverage)
        on_edge = (coverage > EDGE_PATCH[0]) & (coverage < EDGE_PATCH[1])
        return nats.sum(-1).mean().item(), nats[coverage > SUBJECT_PATCH].mean(0), nats[on_edge].mean(0)

    for task, dataset in datasets.items():
        samples = [dataset[i] for i in range(n)]
        losses[task], on_subject, on_edge = mean_losses(samples)
        if task == compared:
            pairs = list(zip(samples, samples[1:] + samples[:1]))
            other_reference, other_on_subject, _ = mean_losses(
                [a._replace(references=b.references) for a, b in pairs])
            other_text, *_ = mean_losses([a._replace(labels=b.labels, caption=b.caption) for a, b in pairs])
            losses["reference gain"] = other_reference - losses[task]
            losses["prompt gain"] = other_text - losses[task]
            losses["on the subject"] = on_subject.tolist()
            losses["on its edge"] = on_edge.tolist()
            losses["its reference gain"] = (other_on_subject - on_subject).tolist()
    return {name: np.round(value, 4).tolist() for name, value in losses.items()}


def sheet_rows(samples, *models):
    """samples: task -> list of data.Sample -> rows for save_sheet: references, target and, given models, what
    they draw"""
    sheet = []
    for task, row in samples.items():
        prompts = [(fill_prompt(task, s.labels, s.caption), s.references) for s in row]
        drawn = [[picture] for picture in draw(*models, task, prompts)] if models else [[]] * len(row)
        columns = ["reference"] * bool(row[0].references) + ["target"] + ["drawn"] * bool(models)
        cells = [("<image>".join(pieces), [*references, sample.target, *its])
                 for (pieces, references), sample, its in zip(prompts, row, drawn)]
        sheet.append((f"{task}: {', '.join(columns)}", cells))
    return sheet


def evaluate(run, held_out):
    """held_out: task -> TaskDataset. Writes figures into the log, their curves and a sheet. Only the first
    process does."""
    if RANK > 0:
        return
    plan, n = run.plan, 64 if run.plan.config.n_embd > 64 else 16  # (fewer for --preset test)
    sheet = plan.sheet if run.step else before(plan.sheet)
    if plan.stage == 0:
        dataset, = held_out.values()
        figures = quality(run.tokenizer, [dataset[i].target for i in range(256)], sheet)
    else:
        figures = held_out_losses(run.model, run.tokenizer, held_out, n, plan.device)
        first = {task: [dataset[i] for i in range(6)] for task, dataset in held_out.items()}
        save_sheet(sheet_rows(first, run.model, run.tokenizer), sheet)
    log(plan, step=run.step, samples=run.step * plan.batch_size, held_out=figures,
        seconds=round(run.seconds, 1))
    if plan.stage:
        draw_curves(plan.out)
    words = ", ".join(f"{name} {value}" for name, value in figures.items())
    tqdm.write(f"stage {plan.stage}, step {run.step}, held out: {words}", file=sys.stderr)


def before(sheet):
    """The sheet of what a model drew before it was fine-tuned"""
    return sheet.replace(".png", "-before.png")


def draw_curves(out):
    """curves.png, from the log of stages 1 and 2: held-out losses and the two gains, over samples."""
    looks = {}  # (stage, step) -> record; where a run started again, what was logged from there on is void
    with open(os.path.join(out, "log.jsonl")) as file:
        for line in file:
            with contextlib.suppress(ValueError):  # a kill or a full disk can leave half a line
                record = json.loads(line)
                if record["stage"] > 0 and "samples" in record:
                    at = record["stage"], record["step"]
                    looks = {other: looks[other] for other in looks if other < at} | {at: record}
    first = max((record["samples"] for record in looks.values() if record["stage"] == 1), default=0)
    losses, gains = {}, {}
    for (stage, _), record in looks.items():
        for name, value in record["held_out"].items():
            if name in TASKS or name in ("reference gain", "prompt gain"):
                line = (losses if name in TASKS else gains).setdefault(name, [])
                line.append((record["samples"] + (first if stage == 2 else 0), value))
    save_plot([("held-out loss, nats per patch", "samples", losses),
               ("how much the loss rises with another reference, or text", "samples", gains)],
              os.path.join(out, "curves.png"))


# ---- The parts of a run -----------------------------------------------------------------------------------

class Plan(NamedTuple):
    """One stage of a run, as the flags say."""
    stage: int
    config: Config
    device: torch.device
    steps: int
    batch_size: int   # samples per step, over all processes
    micro_batch: int  # samples at once, in one process (in stage 0 all)
    lr: float
    mix: dict
    settings: dict    # what a resumed run must have in common
    out: str          # the folder for checkpoints, sheets and the log
    path: str         # of the checkpoint
    sheet: str        # of what it draws of held-out subjects


def make_plan(stage, args, device):
    """Raises BadInput if the batches do not come out even."""
    schedule = SCHEDULES.get(f"{args.preset} on {device.type}", SCHEDULES[args.preset])
    batch_size = args.batch_size or schedule["batch_size"][stage]
    if batch_size % WORLD:
        raise BadInput(f"stage {stage}, --batch-size {batch_size}: give a multiple of {WORLD}, the number "
                       "of processes")
    micro_batch = next(n for n in range(schedule["micro_batch"], 0, -1) if batch_size // WORLD % n == 0)
    steps, lr = schedule["steps"][stage], schedule["lr"][stage]
    if args.init:
        steps, lr = FINE_TUNING["steps"], FINE_TUNING["lr"] * lr
    steps, mix = args.steps or steps, args.mix if args.mix and stage else MIXES[stage]
    settings = {"preset": args.preset, "data": args.data or ("emoji" if emoji_font() else "shapes"),
                "backgrounds": args.backgrounds, "mix": mix, "steps": steps, "batch_size": batch_size,
                "seed": args.seed, "init": args.init, "bf16": has_bf16(device)}  # it decides the optimizers
    paths = (os.path.join(args.out, name) for name in (CHECKPOINTS[stage], f"stage{stage}.png"))
    return Plan(stage, CONFIGS[args.preset], device, steps, batch_size, micro_batch, lr, mix, settings,
                args.out, *paths)


@functools.cache  # each stage of a command asks
def load_sources(sources, backgrounds, out):
    """-> subjects, backgrounds; says what there is. Raises BadInput if there is nothing to learn from."""
    out_folder = os.path.join(os.path.realpath(out), "")
    if {"emoji", "shapes"} & set((backgrounds or "").split(",")):
        raise BadInput(f"--backgrounds {backgrounds}: give folders of pictures, not emoji or shapes")
    for folder in f"{sources or ''},{backgrounds or ''}".split(","):
        if folder and out_folder.startswith(os.path.join(os.path.realpath(folder), "")):
            raise BadInput(f"--out {out} lies in {folder}, and what is written there would be "
                           "trained on: give another --out")
    for name, value in (("data", sources), ("backgrounds", backgrounds)):
        if value and not value.strip(","):
            raise BadInput(f"--{name} {value}: nothing between its commas: give a folder, or leave it out")
    loaded = load_subjects(sources), load_subjects(backgrounds) if backgrounds else ()
    for name, pictures in zip(("data", "backgrounds"), loaded):
        if pictures:
            say(f"{name}: {pictures.report}")
    return loaded


def make_datasets(plan, args):
    """-> what the stage learns from; task -> held-out samples of it. Notes in plan.settings what there is,
    which load_begun and load_first compare."""
    subjects, backgrounds = load_sources(args.data, args.backgrounds, args.out)
    plan.settings.update(held_out=checksum_held_out(subjects), n_images=len(subjects))
    size, mix = plan.config.image_size, plan.mix
    if plan.stage == 0 and not subjects.table["has_cutout"].any():
        mix = {"text-to-image": 1.0}
    tasks = mix if plan.stage else list(mix)[-1:]  # the tokenizer sees scenes: one task shows them
    held_out = {task: TaskDataset(subjects, {task: 1.0}, size, (args.seed, HELD_OUT), False, backgrounds)
                for task in tasks}
    return TaskDataset(subjects, mix, size, (args.seed, plan.stage), True, backgrounds), held_out


def make_loader(plan, dataset, first, n_workers):
    """The micro-batches of each step from `first` on, composed and laid out by worker processes."""
    n = plan.batch_size
    indices = (range(step * n + RANK, (step + 1) * n, WORLD) for step in range(first, plan.steps))
    split = functools.partial(collate, plan.config, plan.micro_batch) if plan.stage else stack_pictures
    return DataLoader(dataset, batch_sampler=indices, collate_fn=split, num_workers=n_workers,
                      worker_init_fn=ignore_interrupts, pin_memory=plan.device.type == "cuda")


def ignore_interrupts(worker):
    """Ctrl-C reaches the worker processes, too; the main process ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclasses.dataclass
class Run:
    """What a step changes, and what a checkpoint keeps."""
    plan: Plan
    model: torch.nn.Module      # what is trained: the transformer, in stage 0 the tokenizer
    tokenizer: Tokenizer
    optimizers: list
    known: dict                 # what captions say: known_text
    step: int = 0               # how many are done
    seconds: float = 0.0        # that they took


def known_text(subjects, backgrounds):
    """What the captions of training say -> dict(words: all of them, in one string; backgrounds: a list)"""
    named = [clean_text(picture.caption, MAX_BACKGROUND) for picture in backgrounds]
    scenes = list(dict.fromkeys([*BACKGROUNDS, *filter(None, named)]))
    fixed = ["a big thing and, in the middle", *SIZES, *PLACES, *QUARTERS, *scenes]
    words = set(words_of(" ".join([*fixed, *(task.prompt for task in TASKS.values())])))
    for i in np.flatnonzero(~subjects.table["held_out"]):
        words.update(words_of(f"{subjects[i].label} {'' if subjects[i].has_cutout else subjects[i].caption}"))
    return {"words": " ".join(sorted(words)), "backgrounds": scenes}


def start_run(plan, known):
    """Weights and optimizers as this stage's last run left them (BadInput if its settings were others), or
    else the weights to start from. All else, samples and random numbers, follows from the step."""
    torch.manual_seed(plan.settings["seed"])
    tokenizer = Tokenizer(plan.config).to(plan.device).requires_grad_(plan.stage == 0)
    model = Mentor(plan.config).to(plan.device) if plan.stage else tokenizer
    resumed = load_begun(plan)
    optimizers = make_optimizers(model, plan.settings["bf16"])
    run = Run(plan, model, tokenizer, optimizers, known)
    if resumed:
        for optimizer, state in zip(optimizers, resumed["optimizers"]):
            optimizer.load_state_dict(state)
        run.step, run.seconds = resumed["step"], resumed["seconds"]
    elif plan.stage == 0:
        return run
    weights, path = (resumed, plan.path) if resumed else load_first(plan)
    has_model = weights["stage"] > 0
    load_weights(weights, path, tokenizer, model if has_model else None)
    if plan.stage:
        model.codebooks.copy_(tokenizer.codebooks)
    if has_model:  # its captions taught it words, too
        earlier, words = weights["known"], {*known["words"].split(), *weights["known"]["words"].split()}
        backgrounds = dict.fromkeys([*known["backgrounds"], *earlier["backgrounds"]])
        run.known = {"words": " ".join(sorted(words)), "backgrounds": list(backgrounds)}
    return run


def checksum_held_out(subjects):
    names = {subjects[i].name for i in np.flatnonzero(subjects.table["held_out"])}
    return zlib.crc32("\n".join(sorted(names)).encode())


def compare_held_out(plan, settings, path):
    """Says if a checkpoint was trained while another set of subjects was held out."""
    if settings.get("held_out", plan.settings["held_out"]) != plan.settings["held_out"]:
        say(f"{path} was trained while another set of subjects was held out (has --data changed?): figures "
            "may be of subjects that it was trained on")


def check_settings(plan, settings):
    """Raises BadInput if a run was begun with other settings. What --data holds may have changed, and so may
    bf16, whose optimizers stay."""
    for name, value in {"init": None, **settings}.items():  # (older checkpoints have no init)
        if plan.settings[name] != value and name not in ("bf16", "held_out", "n_images"):
            was, now = (f"no {name}" if x is None else f"{name} {x}" for x in (value, plan.settings[name]))
            raise BadInput(f"{plan.path} was trained with {was}, not {now}: give the same, or another --out")
    compare_held_out(plan, settings, plan.path)
    if settings.get("n_images", plan.settings["n_images"]) != plan.settings["n_images"]:
        say(f"{plan.path} was begun with {settings['n_images']} images; now there are "
            f"{plan.settings['n_images']} (delete it to start over)")
    if settings["bf16"] != plan.settings["bf16"]:
        plan.settings["bf16"] = settings["bf16"]
        say(f"{plan.path} was begun on another kind of machine (bf16): its last bits will differ")


def load_begun(plan):
    """The checkpoint of a run of this stage in --out, or None. Raises BadInput if it was begun otherwise."""
    if not os.path.exists(plan.path):
        return None
    checkpoint = load_stage(plan.path, plan.config, plan.stage)
    check_settings(plan, checkpoint["settings"])
    return checkpoint


def saved_step(plan):
    """The step of the checkpoint in --out, 0 without one. Ctrl-C may come right after it was written."""
    return load_checkpoint(plan.path)["step"] if os.path.exists(plan.path) else 0


def load_first(plan):
    """The checkpoint to start from, --init or that of the stage before, and its path. Raises BadInput if
    there is none."""
    init, path = plan.settings["init"], os.path.join(plan.out, CHECKPOINTS[plan.stage - 1])
    if init:
        checkpoint = load_fitting(init, plan.config, "another --init")
        if checkpoint["stage"] == 0:
            raise BadInput(f"--init {init} holds the tokenizer alone: give a stage1.pt, a stage2.pt or an "
                           "exported model")
        return checkpoint, init
    if not os.path.exists(path):
        raise BadInput(f"{path} is missing: stage {plan.stage} starts from it (python train.py --stage "
                       f"{plan.stage - 1} --out {plan.out}), or from a trained model (--init FILE)")
    checkpoint = load_stage(path, plan.config, plan.stage - 1)
    compare_held_out(plan, checkpoint["settings"], path)
    if checkpoint["step"] < checkpoint["settings"]["steps"]:
        say(f"{path} is not finished (step {checkpoint['step']}): starting from it all the same")
    return checkpoint, path


def load_fitting(path, config, remedy):
    """A checkpoint of this configuration. Raises BadInput."""
    checkpoint = load_checkpoint(path)
    if checkpoint["config"] != dataclasses.asdict(config):
        preset = preset_of(checkpoint)
        known = f"give --preset {preset}, or {remedy}" if preset else f"none of this program's: give {remedy}"
        raise BadInput(f"{path} is of another preset: {known}")
    return checkpoint


def preset_of(checkpoint):
    known = (name for name, config in CONFIGS.items() if dataclasses.asdict(config) == checkpoint["config"])
    return next(known, None)


def load_stage(path, config, stage):
    """A checkpoint that training can resume, of this configuration and stage. Raises BadInput."""
    checkpoint = load_fitting(path, config, "another --out")
    if checkpoint["stage"] != stage:
        raise BadInput(f"{path} is of stage {checkpoint['stage']}, not {stage}: give another --out")
    if "optimizers" not in checkpoint:
        raise BadInput(f"{path} is an exported model, without what training needs: give another --out, and "
                       f"--init {path} to start from it")
    return checkpoint


def save_checkpoint(path, **state):
    with whole_file(path) as temporary:
        torch.save({"version": VERSION, **state}, temporary)


def save_run(run):
    if RANK == 0:
        parts = {"model": run.model.state_dict(), "tokenizer": run.tokenizer.state_dict(),  # one, in stage 0
                 "optimizers": [optimizer.state_dict() for optimizer in run.optimizers]}
        save_checkpoint(run.plan.path, stage=run.plan.stage, step=run.step, seconds=run.seconds,
                        settings=run.plan.settings, config=dataclasses.asdict(run.plan.config),
                        known=run.known, **parts)
    if WORLD > 1:
        dist.barrier()  # no process continues, or ends, before it is written


def export(source, path):
    """Tokenizer and transformer of a stage 2 in half precision, and nothing else: what drawing needs."""
    if not os.path.exists(source):
        raise BadInput(f"{source} is missing: train stage 2 first, or give its --out")
    checkpoint = load_checkpoint(source)
    if "settings" not in checkpoint:
        raise BadInput(f"{source} is an exported model already: copy it, or give another --out")
    if os.path.exists(path):
        raise BadInput(f"--export {path}: this file exists: delete it first, or give another name")
    if checkpoint["step"] < checkpoint["settings"]["steps"]:
        say(f"{source} is not finished (step {checkpoint['step']}): exporting it all the same")
    half = {part: {name: weight.half() for name, weight in checkpoint[part].items()}
            for part in ("model", "tokenizer")}
    kept = {name: checkpoint[name] for name in ("config", "stage", "step", "known")}
    save_checkpoint(path, **kept, **half)
    print(f"wrote {path}, {os.path.getsize(path) / 1e6:.1f} MB")


def can_compile(device):
    """Whether torch.compile works here; says so if it does not."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(2, device=device))
        return True
    except Exception as error:  # no C++ compiler, no Triton
        why = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        say(f"torch.compile does not work here ({why}): training without it, which is slower")
        return False


def parallel(model, device, compiled):
    """The model as a step calls it: blocks compiled, for any length of sequence; one copy per process."""
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=True)
    if WORLD == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def log(plan, **record):
    if RANK == 0:
        with open(os.path.join(plan.out, "log.jsonl"), "a") as file:
            print(json.dumps({"stage": plan.stage, **record}), file=file)


def log_step(run, bar, loss, lr, samples_per_second):
    """loss: of this process; the log has the mean over all of them."""
    if WORLD > 1:
        dist.all_reduce(loss)
    record = {"step": run.step, "loss": round(loss.item() / WORLD, 4), "lr": round(lr, 7),
              "samples_per_second": round(samples_per_second, 1)}
    bar.set_postfix({name: value for name, value in record.items() if name != "step"})
    log(run.plan, **record, seconds=round(run.seconds, 1))


# ---- The loop, the same for all three stages --------------------------------------------------------------

def train(stage, args, device):
    """Trains one stage to its end, or resumes it; returns at once if it is finished."""
    plan = make_plan(stage, args, device)
    dataset, held_out = make_datasets(plan, args)
    run = start_run(plan, known_text(dataset.subjects, dataset.backgrounds))
    try:
        os.makedirs(plan.out, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{plan.out}: no such folder, and none can be made ({error.strerror})") from error
    net = parallel(run.model, device, args.compile and stage > 0)
    loader = make_loader(plan, dataset, run.step, args.workers)
    # How many evaluations. Where steps are fast, each takes the time of many. --init has one more, at step 0.
    n_looks = 1 if args.init else 10 if device.type == "cpu" and plan.steps > 500 else 3

    def due(every):
        return run.step % max(1, every) == 0 or run.step == plan.steps

    if run.step == plan.steps:
        return say(f"{plan.path} is already finished: delete it to train it again, or give another --out")
    if run.step > 0:
        say(f"stage {stage}: resuming at step {run.step} of {plan.steps}")
    if run.step == 0 and args.init:
        evaluate(run, held_out)
    started = time.time() - run.seconds
    timed, timed_step = time.time(), run.step  # where the rate of the next log line is counted from
    bar = tqdm(loader, f"stage {stage}", plan.steps, initial=run.step, disable=RANK > 0, mininterval=1)
    try:
        for micro_batches in bar:
            torch.manual_seed(args.seed * 1_000_003 + run.step)  # so that a resumed run has the same numbers
            lr = learning_rate(run.step, plan.steps, plan.lr)
            loss, norm = train_step(run, net, micro_batches, lr)
            run.step += 1
            logs, evaluates, saves = run.step % 10 == 0, due(plan.steps // n_looks), due(plan.steps // 40)
            if not (logs or evaluates or saves):
                continue  # nothing so far has waited for the device

            if not torch.isfinite(loss + norm):
                raise BadInput(f"stage {stage}: loss or gradient not finite by step {run.step}; the last "
                               f"good checkpoint is of step {saved_step(plan)}: lower the learning rate "
                               "(SCHEDULES)")
            now = time.time()
            run.seconds = now - started
            if logs:
                log_step(run, bar, loss, lr, plan.batch_size * (run.step - timed_step) / (now - timed))
            if evaluates:  # before the checkpoint: if a kill comes in between, the same steps come again
                evaluate(run, held_out)
            if evaluates or saves:
                save_run(run)
            timed, timed_step = time.time(), run.step
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would end this message
        saved = saved_step(plan)
        kept = f"{saved} of {plan.steps} steps are saved in {plan.path}, and the same command resumes there"
        bar.close()
        say(f"stopped: {kept if saved else 'nothing is saved yet'}")
        sys.exit(130)
    earlier = f" (before: {before(plan.sheet)})" if args.init else ""
    say(f"stage {stage} is finished: {plan.path}, and what it draws: {plan.sheet}{earlier}")


def show(stage, args, device):
    """A sheet of the first six samples of each task that this very run would learn from. Before them a dozen
    cut-outs, on a colour that shows what a wrong mask left in or cut off."""
    plan = make_plan(stage, args, device)
    dataset, _ = make_datasets(plan, args)
    if args.init:
        load_first(plan)  # what is wrong with it is said now
    size, cells = plan.config.image_size, []
    rng = np.random.default_rng(args.seed)
    picked = [dataset.pick(rng, dataset.cutouts) for _ in range(50 if len(dataset.cutouts) else 0)]
    for i in list(dict.fromkeys(picked))[:12]:
        subject, magenta = dataset.subjects[i], Image.new("RGB", (size, size), (255, 0, 255))
        try:
            scene, _, _ = compose(open_cutout(subject, size), magenta, AS_GIVEN)
            cells.append((subject.label, [np.asarray(scene)]))
        except BadInput as error:
            say(f"skipped: {error}")
    rows = [("" if i else "cut-outs", cells[i:i + 6]) for i in range(0, len(cells), 6)]
    samples = [dataset[i] for i in range(500)]
    by_task = {task: [sample for sample in samples if sample.task == task][:6] for task in dataset.mix}
    path = os.path.join(args.out, f"stage{stage}-samples.png")
    save_sheet(rows + sheet_rows({task: row for task, row in by_task.items() if row}), path)
    print(f"wrote {path}; held out, and not in it: {len(dataset.subjects) - len(dataset.all)} images")


def parse_mix(text):
    """An argparse type: 'segmentation=.65,text-to-image=.35' -> dict that sums to 1, in the order of TASKS"""
    mix = {}
    for item in text.split(","):
        task, _, share = item.partition("=")
        if task not in TASKS:
            raise BadInput(f"--mix: no task {task!r} (there are {', '.join(TASKS)})")
        if task in mix:
            raise BadInput(f"--mix {text}: {task} stands there twice: leave one out")
        mix[task] = math.nan
        with contextlib.suppress(ValueError):
            mix[task] = float(share)
    if not all(share >= 0 for share in mix.values()) or not 0 < sum(mix.values()) < math.inf:
        raise BadInput(f"--mix {text}: shares must be numbers from 0 up, and not all 0 (write {task}=0.5)")
    return {task: mix[task] / sum(mix.values()) for task in TASKS if mix.get(task)}


def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    has_cuda = torch.cuda.is_available()
    parser.add_argument("--stage", type=int, choices=(0, 1, 2),
                        help="0 tokenizer, 1 alignment, 2 instruction")
    parser.add_argument("--preset", choices=CONFIGS,
                        help="model, image size, schedule (default: that of --init; gpu with CUDA, else cpu)")
    parser.add_argument("--data", help="emoji, shapes or folders, with commas: they take equal turns "
                                       "(default: emoji, else shapes)")
    parser.add_argument("--backgrounds", metavar="DIR",
                        help="photographs to place subjects on, named by a .txt beside, file or folder")
    parser.add_argument("--mix", type=parse_mix, metavar="TASK=SHARE,...", help="tasks of stage 1 or 2")
    parser.add_argument("--init", metavar="FILE",
                        help="fine-tune: start from this model, of stage 1 or 2 or exported")
    parser.add_argument("--steps", type=at_least(1),
                        help=f"of this stage (default: the preset's; with --init {FINE_TUNING['steps']})")
    parser.add_argument("--batch-size", type=at_least(1), help="samples per step (default: the preset's)")
    parser.add_argument("--workers", type=at_least(0), default=8 if has_cuda else 1,
                        help="processes that compose samples (default: %(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--out", default="out", help="for checkpoints, sheets and the log (default: out)")
    add_device_flag(parser)
    parser.add_argument("--no-compile", dest="compile", action="store_false",
                        help="without torch.compile, which stages 1 and 2 use (not with --preset test)")
    parser.add_argument("--show", action="store_true", help="a sheet of what this run would learn from")
    parser.add_argument("--export", metavar="FILE", help="write stage 2 of --out to a new FILE, in fp16")
    args = parser.parse_args()
    if args.init and not args.preset:
        args.preset = preset_of(load_checkpoint(args.init))
    args.preset = args.preset or ("gpu" if args.device == "cuda" else "cpu")
    return args


def main():
    args = parse_args()
    if args.export:
        return export(os.path.join(args.out, CHECKPOINTS[2]), args.export)
    if args.stage is None:
        raise BadInput("give --stage 0, 1 or 2 (or --export FILE)")
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if WORLD > 1:  # (two hours: the first process may look through a million images)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    if args.stage == 0 and (args.init or args.mix):
        raise BadInput(f"{'--init' if args.init else '--mix'}: stage 0 trains a tokenizer from nothing, on "
                       "every kind of picture: give --stage 1 or 2")
    if args.show:
        return show(args.stage, args, device)
    args.compile = args.compile and args.preset != "test" and args.stage > 0 and can_compile(device)
    if args.stage == 1 and not args.init:
        plan = make_plan(1, args, device)
        make_datasets(plan, args)  # what is wrong is said now, not after the tokenizer
        load_begun(plan)
        path = os.path.join(args.out, CHECKPOINTS[0])
        begun = load_stage(path, CONFIGS[args.preset], 0) if os.path.exists(path) else None
        if begun is None or begun["step"] < begun["settings"]["steps"]:
            own = {name: begun["settings"][name] if begun else None for name in ("steps", "batch_size")}
            train(0, argparse.Namespace(**vars(args) | own), device)
    train(args.stage, args, device)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
