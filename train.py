"""Trains everything: stage 0 the image tokenizer, stage 1 multimodal alignment, stage 2 multimodal
instruction.

    python train.py --stage 1                        the tokenizer first, where out/ has none, or part of one
    python train.py --stage 2                        starts from out/stage1.pt
    python train.py --stage 1 --data my_folder       your own cut-outs
    python train.py --stage 2 --show                 a sheet of what this run would learn from, no training
    torchrun --nproc_per_node=8 train.py --stage 1   eight GPUs; the same gradients as one, same --batch-size
    python train.py --export weights/mine.pt         the finished model, in half precision

The same command again resumes where it stopped. In --out: tokenizer.pt, stage1.pt, stage2.pt (checkpoints),
stage0.png, stage1.png, stage2.png (what it draws of held-out subjects), log.jsonl (a line per logged step;
steps that a kill undid stand there twice).
"""
import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
import time
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import BACKGROUNDS, PLACES, QUARTERS, SIZES, Tasks, load_subjects
from mentor import CONFIGS, MAX_BACKGROUND, TASKS, Config, Mentor, clean_text, words_of
from sample import (RANK, WORLD, Parser, add_device_flag, any_process, at_least, collate, evaluate, export,
                    fill_codes, follow_main, load_checkpoint, run_script, save_checkpoint, save_samples, say,
                    stop_signals)
from tokenizer import BadInput, Tokenizer, autocast, emoji_font, from_bytes, has_bf16

# Per stage 0, 1, 2: optimizer steps, samples a step (pictures, in stage 0), peak learning rate. micro_batch:
# how many sequences go through the transformer at once, for memory and speed; the gradient is that of all.
SCHEDULES = {
    "test": dict(steps=(150, 80, 80), batch_size=(32, 16, 16), lr=(2e-3, 1.2e-2, 6e-3), micro_batch=16),
    "cpu": dict(steps=(6000, 600, 12600), batch_size=(32, 16, 16), lr=(2e-3, 4e-3, 3e-3), micro_batch=4),
    # Twelve minutes of an H100.
    "cpu on cuda": dict(steps=(2350, 730, 5900), batch_size=(128, 128, 160), lr=(2e-3, 4e-3, 3.5e-3),
                        micro_batch=80),
    "gpu": dict(steps=(50000, 60000, 60000), batch_size=(256,) * 3, lr=(1e-3, 1e-3, 5e-4), micro_batch=64),
}
MIXES = {  # share of each task in a stage
    # Stage 0 sees every kind of picture. Each task of it has one reference: a sample has two pictures.
    0: {"segmentation": 0.35, "recovery": 0.15, "subject-driven": 0.5},
    1: {"text-to-image": 0.28, "reconstruction": 0.07, "segmentation": 0.65},  # the paper's
    # The paper has .46, -, .115, .115, .31. At this scale a stage without reconstruction forgets to copy.
    2: {"text-to-image": 0.18, "reconstruction": 0.03, "segmentation": 0.24, "recovery": 0.03,
        "subject-driven": 0.27, "multi-image": 0.13, "in-context": 0.12},
}
PLAIN_MIX = {"text-to-image": 1.0}  # stage 0 where nothing is a cut-out: one picture a sample
HELD_OUT = 3  # besides the stages 0, 1, 2: the stream of held-out samples, the same in all of them
CHECKPOINTS = ("tokenizer.pt", "stage1.pt", "stage2.pt")


# ---- Optimisation -----------------------------------------------------------------------------------------

def learning_rate(step, steps, peak):
    """5% linear warm-up, then a cosine towards zero (paper, section 4); counted in optimizer steps."""
    warmup = max(1, round(0.05 * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def make_optimizers(model, bf16, fused):
    """Muon on the matrices of the blocks (the tokenizer's, too) and the level MLPs, AdamW on all else:
    embeddings, codebooks, gains, ... torch's Muon works in bf16: where the hardware does not multiply it,
    AdamW takes the matrices, too."""
    hidden, decay, plain = [], [], []
    for name, parameter in model.named_parameters():
        in_block = ".conv" in name or name.startswith(("blocks.", "level_mlps."))
        is_matrix = parameter.ndim == 2
        group = hidden if is_matrix and in_block and bf16 else decay if is_matrix else plain
        group.append(parameter)
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=fused)]
    if hidden:  # match_rms_adamw: one learning rate serves both
        optimizers.append(torch.optim.Muon(hidden, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def weigh(nats, coverage, coarse):
    """The loss of the transformer: nats (B, N, n_codebooks) -> their sum over a patch's codes, its mean. The
    more of a patch the subject covers (B, N), the more it weighs: three in four are background, whose own
    randomness would drown what is to be learnt from the reference. A sample's weights have mean 1. coarse
    (B,): how often the coarsest code counts (mentor.Task)."""
    weights = 1 + 4 * coverage
    weights = weights / weights.mean(1, keepdim=True)
    return (weights * (nats.sum(-1) + (coarse[:, None] - 1) * nats[..., 0])).mean()


def accumulate(net, inputs, device):
    """Adds the gradient of the mean loss of all micro-batches, each what the model's forward takes and what
    `weigh` takes beside its losses (nothing in stage 0) -> their loss, unweighted, and what else the last one
    gave. k micro-batches give the gradient of one batch. Of several processes only the last backward
    exchanges it."""
    total = 0.0
    for i, (arguments, weights) in enumerate(inputs):
        exchanges = i == len(inputs) - 1 or not isinstance(net, DistributedDataParallel)
        with contextlib.nullcontext() if exchanges else net.no_sync():
            with autocast(device):
                result = net(*arguments)
            # Of the transformer nats (B, N, n_codebooks); of the tokenizer its loss, and codes and z besides.
            loss, *extra = result if isinstance(result, tuple) else (result,)
            weighed = weigh(loss, *weights) if weights else loss
            (weighed / len(inputs)).backward()
        total += loss.detach().sum(-1).mean() / len(inputs)
    return total, extra


def train_step(run, net, inputs, lr):
    """One step -> loss and norm of the gradient, as tensors: nothing waits for the device."""
    loss, extra = accumulate(net, inputs, run.plan.device)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if run.plan.stage == 0:
        run.tokenizer.restart_dead_codes(*extra)
    return loss, norm


# ---- The parts of a run -----------------------------------------------------------------------------------

@functools.cache  # each stage of a command asks
def load_sources(sources, backgrounds, out):
    """-> subjects, backgrounds; says what there is. Raises BadInput where there is nothing to learn from."""
    out_folder = os.path.join(os.path.realpath(out), "")
    if {"emoji", "shapes"} & set((backgrounds or "").split(",")):
        raise BadInput(f"--backgrounds {backgrounds}: give folders of pictures, not emoji or shapes")
    for folder in f"{sources or ''},{backgrounds or ''}".split(","):
        if folder and out_folder.startswith(os.path.join(os.path.realpath(folder), "")):
            raise BadInput(f"--out {out} lies in {folder}, and what is written there would be "
                           "trained on: give another --out")
    loaded = load_subjects(sources), load_subjects(backgrounds) if backgrounds else ()
    for name, pictures in zip(("data", "backgrounds"), loaded):
        if pictures:
            say(f"{name}: {pictures.report}")
    return loaded


def known_text(subjects, backgrounds):
    """What the captions of training say -> dict(words: all of them, in one string; backgrounds: a list)"""
    named = [clean_text(picture.caption, MAX_BACKGROUND) for picture in backgrounds]
    scenes = list(dict.fromkeys([*BACKGROUNDS, *filter(None, named)]))
    fixed = ["a big thing and, in the middle", *SIZES, *PLACES, *QUARTERS, *scenes]
    words = set(words_of(" ".join([*fixed, *(task.prompt for task in TASKS.values())])))
    for i in np.flatnonzero(~subjects.table["held_out"]):
        words.update(words_of(f"{subjects[i].label} {'' if subjects[i].has_cutout else subjects[i].caption}"))
    return {"words": " ".join(sorted(words)), "backgrounds": scenes}


def make_datasets(plan, args):
    """-> what the stage learns from, and task -> held-out samples of it"""
    subjects, backgrounds = load_sources(args.data, args.backgrounds, args.out)
    size, mix = plan.config.image_size, plan.mix
    if plan.stage == 0 and not subjects.table["has_cutout"].any():
        mix = PLAIN_MIX
    tasks = mix if plan.stage else list(mix)[-1:]  # the tokenizer looks at scenes: one task shows them
    held_out = {task: Tasks(subjects, {task: 1.0}, size, (args.seed, HELD_OUT), False, backgrounds)
                for task in tasks}
    return Tasks(subjects, mix, size, (args.seed, plan.stage), True, backgrounds), held_out


def parse_mix(text):
    """An argparse type: 'segmentation=.65,text-to-image=.35' -> dict that sums to 1, in TASKS' order."""
    mix = {}
    for item in text.split(","):
        task, _, share = item.partition("=")
        if task not in TASKS:
            raise BadInput(f"--mix: no task {task!r} (there are {', '.join(TASKS)})")
        mix[task] = math.nan
        with contextlib.suppress(ValueError):
            mix[task] = float(share)
    if not all(0 <= share < math.inf for share in mix.values()) or sum(mix.values()) == 0:
        raise BadInput(f"--mix {text}: shares must be numbers from 0 up, and not all 0 (write {task}=0.5)")
    return {task: mix[task] / sum(mix.values()) for task in TASKS if mix.get(task)}


class Plan(NamedTuple):
    """One stage of a run, as the flags say."""
    stage: int
    config: Config
    device: torch.device
    steps: int
    batch_size: int   # samples (stage 0: pictures) a step, over all processes
    micro_batch: int  # sequences at once, in one process
    lr: float
    mix: dict
    settings: dict    # what a run that goes on must have in common
    out: str
    path: str         # of the checkpoint
    sheet: str        # of what it draws of held-out subjects


def make_plan(stage, args, device):
    """Raises BadInput if the batches do not come out even."""
    schedule = SCHEDULES.get(f"{args.preset} on {device.type}", SCHEDULES[args.preset])
    batch_size = args.batch_size or schedule["batch_size"][stage]
    micro_batch = max(1, min(batch_size // WORLD, schedule["micro_batch"]))
    unit = 2 if stage == 0 else micro_batch  # (stage 0: both pictures of a sample)
    if batch_size % (WORLD * unit):
        hint = "; --stage 0 takes a --batch-size of its own" if stage == 0 else ""
        raise BadInput(f"stage {stage}, --batch-size {batch_size}: give a multiple of {WORLD * unit} "
                       f"({WORLD} processes, {unit} at a time){hint}")
    steps, mix = args.steps or schedule["steps"][stage], args.mix if args.mix and stage else MIXES[stage]
    settings = {"preset": args.preset, "data": args.data or ("emoji" if emoji_font() else "shapes"),
                "backgrounds": args.backgrounds, "mix": mix, "steps": steps, "batch_size": batch_size,
                "seed": args.seed, "bf16": has_bf16(device)}  # bf16 decides the optimizers
    return Plan(stage, CONFIGS[args.preset], device, steps, batch_size, micro_batch, schedule["lr"][stage],
                mix, settings, args.out, os.path.join(args.out, CHECKPOINTS[stage]),
                os.path.join(args.out, f"stage{stage}.png"))


@dataclasses.dataclass
class Run:
    """What a step changes, and what a checkpoint keeps of it."""
    plan: Plan
    model: torch.nn.Module      # what is trained: the transformer, in stage 0 the tokenizer
    tokenizer: Tokenizer
    optimizers: list
    known: dict                 # what captions say: known_text
    step: int = 0               # how many are done
    seconds: float = 0.0        # that they took


def start_run(plan, known):
    """Weights and optimizers as the last run of this stage left them (BadInput if its settings were others),
    or else the weights of the stage before. All else, samples and random numbers, follows from the step."""
    torch.manual_seed(plan.settings["seed"])
    tokenizer = Tokenizer(plan.config).to(plan.device).requires_grad_(plan.stage == 0)
    model = Mentor(plan.config).to(plan.device) if plan.stage else tokenizer
    checkpoint = checked(plan.path, plan.config, plan.stage) if os.path.exists(plan.path) else None
    for name, value in checkpoint["settings"].items() if checkpoint else ():
        if plan.settings[name] != value and name != "bf16":
            raise BadInput(f"{plan.path} was trained with {name} {value}, not {plan.settings[name]}: "
                           "give the same, or another --out")
    if checkpoint and checkpoint["settings"]["bf16"] != plan.settings["bf16"]:
        plan.settings["bf16"] = checkpoint["settings"]["bf16"]  # the optimizers stay what they were
        say(f"{plan.path} was begun on another kind of machine (bf16): its last bits will differ")
    optimizers = make_optimizers(model, plan.settings["bf16"], fused=plan.device.type == "cuda")
    run = Run(plan, model, tokenizer, optimizers, known)
    if checkpoint:
        for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(state)
        run.step, run.seconds = checkpoint["step"], checkpoint["seconds"]
    elif plan.stage == 0:
        return run
    else:
        before = os.path.join(plan.out, CHECKPOINTS[plan.stage - 1])
        if not os.path.exists(before):
            raise BadInput(f"{before} is missing: stage {plan.stage} starts from it "
                           f"(python train.py --stage {plan.stage - 1} --out {plan.out})")
        checkpoint = checked(before, plan.config, plan.stage - 1)
        if checkpoint["step"] < checkpoint["settings"]["steps"]:
            say(f"{before} is not finished (step {checkpoint['step']}): starting from it all the same")
    tokenizer.load_state_dict(checkpoint["tokenizer"])
    if plan.stage:
        model.codebooks.copy_(tokenizer.codebooks)
    if checkpoint["stage"] > 0:
        model.load_state_dict(checkpoint["model"])
    return run


def checked(path, config, stage):
    """A checkpoint of this preset and stage, else BadInput."""
    checkpoint = load_checkpoint(path)
    if checkpoint["config"] != dataclasses.asdict(config) or checkpoint["stage"] != stage:
        raise BadInput(f"{path} is of another preset or stage: give its --preset, or another --out")
    if "optimizers" not in checkpoint:
        raise BadInput(f"{path} is an exported model, without what training needs: give another --out")
    return checkpoint


def save_run(run):
    if RANK == 0:
        parts = {"model": run.model.state_dict(), "tokenizer": run.tokenizer.state_dict(),
                 "optimizers": [optimizer.state_dict() for optimizer in run.optimizers]}
        save_checkpoint(run.plan.path, stage=run.plan.stage, step=run.step, seconds=run.seconds,
                        settings=run.plan.settings, config=dataclasses.asdict(run.plan.config),
                        known=run.known, **parts)
    if WORLD > 1:
        dist.barrier()  # none goes on, or leaves, before it is written


def stack_pictures(samples):
    """Stage 0: all pictures of the samples -> [uint8 (B, H, W, 3)]"""
    return [torch.from_numpy(np.stack([image for s in samples for image in (s.target, *s.references)]))]


def make_loader(run, dataset, n_workers):
    """Batches of the steps to come, composed and laid out by workers."""
    plan = run.plan
    in_pairs = plan.stage == 0 and dataset.mix != PLAIN_MIX
    n = plan.batch_size // (2 if in_pairs else 1)  # samples a step
    indices = [range(step * n + RANK, (step + 1) * n, WORLD) for step in range(run.step, plan.steps)]
    to_parts = functools.partial(collate, plan.config, plan.micro_batch) if plan.stage else stack_pictures
    return DataLoader(dataset, batch_sampler=indices, collate_fn=to_parts, num_workers=n_workers,
                      worker_init_fn=follow_main, pin_memory=plan.device.type == "cuda")


def can_compile(device):
    """Whether torch.compile works here; says so where it does not."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(2, device=device))
        return True
    except Exception as error:  # no C++ compiler, no Triton
        why = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        say(f"torch.compile does not work here ({why}): training slower, without it")
        return False


def parallel(model, device, compiled):
    """The model as a step calls it: blocks compiled, for any length of sequence; a copy a process."""
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=True)
    if WORLD == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def to_inputs(run, parts):
    """What the workers composed -> what `accumulate` takes."""
    device = run.plan.device
    if run.plan.stage == 0:
        return [((from_bytes(pictures.to(device, non_blocking=True)),), ()) for pictures in parts]
    return [(fill_codes(run.tokenizer, batch, device), [x.to(device, non_blocking=True) for x in batch[3:]])
            for batch in parts]


def leave(bar, plan, saved):
    bar.close()
    kept = f"{saved} of {plan.steps} steps are saved in {plan.path}" if saved else "nothing was saved yet"
    say(f"stopped: {kept}; the same command goes on")
    sys.exit(130)


def log(plan, **record):
    if RANK == 0:
        with open(os.path.join(plan.out, "log.jsonl"), "a") as file:
            print(json.dumps({"stage": plan.stage, **record}), file=file)


def look(run, held_out):
    """Figures on held-out subjects, into the log, and a sheet. The first process does it."""
    if RANK == 0:
        figures = evaluate(run.model, run.tokenizer, held_out, run.plan.sheet)
        log(run.plan, step=run.step, held_out=figures, seconds=round(run.seconds, 1))
        words = ", ".join(f"{name} {value}" for name, value in figures.items())
        tqdm.write(f"stage {run.plan.stage}, step {run.step}, held out: {words}", file=sys.stderr)


def log_step(run, bar, loss, lr, n_steps, seconds):
    """The mean loss of all processes, and the rate of the last n_steps, which took so many seconds."""
    if WORLD > 1:
        dist.all_reduce(loss)
    record = {"step": run.step, "loss": round(loss.item() / WORLD, 4), "lr": round(lr, 7),
              "samples_per_second": round(run.plan.batch_size * n_steps / seconds, 1)}
    bar.set_postfix({name: value for name, value in record.items() if name != "step"})
    log(run.plan, **record, seconds=round(run.seconds, 1))


# ---- The loop, the same for all three stages --------------------------------------------------------------

def train(stage, args, device):
    """Trains one stage to its end, or goes on with it; returns at once where it is finished."""
    plan = make_plan(stage, args, device)
    dataset, held_out = make_datasets(plan, args)
    run = start_run(plan, known_text(dataset.subjects, dataset.backgrounds))

    def due(every):
        return run.step % max(1, every) == 0 or run.step == plan.steps

    n_looks = 10 if device.type == "cpu" and plan.steps > 500 else 3  # (one takes as long as many fast steps)
    net = parallel(run.model, device, args.compile and stage > 0)
    watched, saved, tick = torch.zeros((), device=device), run.step, time.time()
    since, first = tick, run.step  # of what the next line of the log speaks of
    bar = tqdm(make_loader(run, dataset, args.workers), f"stage {stage}", plan.steps, initial=run.step,
               disable=RANK > 0, mininterval=1)
    with bar, stop_signals() as stop:
        for parts in bar:
            torch.manual_seed(args.seed * 1_000_003 + run.step)  # so that a run that goes on draws the same
            lr = learning_rate(run.step, plan.steps, plan.lr)
            try:
                loss, norm = train_step(run, net, to_inputs(run, parts), lr)
            except Exception as error:
                if stop and type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
                    leave(bar, plan, saved)  # Ctrl-C has reached the compiler that torch started, too
                raise
            run.step += 1
            watched += loss + norm
            logs, looks, saves = run.step % 10 == 0, due(plan.steps // n_looks), due(plan.steps // 40)
            if not (logs or looks or saves or stop and WORLD == 1):
                continue  # nothing so far has waited for the device

            stopping = any_process(stop, device) and run.step < plan.steps
            if not torch.isfinite(watched):
                raise BadInput(f"stage {stage}: loss or gradient not finite by step {run.step}; the last "
                               f"good checkpoint is of step {saved}: lower the learning rate (SCHEDULES)")
            now = time.time()
            run.seconds, tick = run.seconds + now - tick, now
            if logs:
                log_step(run, bar, loss, lr, run.step - first, now - since)
            if looks:  # before the checkpoint: after a kill in between, these steps come again
                look(run, held_out)
            if looks or saves or stopping:
                save_run(run)
                saved = run.step
            if stopping:
                leave(bar, plan, saved)
            since, first = time.time(), run.step
    say(f"stage {stage} is finished: {plan.path}, and what it draws: {plan.sheet}")
    if any_process(stop, device):  # during the last step: all is saved, but no next stage begins
        sys.exit(130)


def show(stage, args, device):
    """A sheet of the first six samples of each task that this very run would learn from."""
    plan = make_plan(stage, args, device)
    dataset, _ = make_datasets(plan, args)
    samples = [dataset[i] for i in range(500)]
    rows = {task: [sample for sample in samples if sample.task == task][:6] for task in dataset.mix}
    path = os.path.join(args.out, f"stage{stage}-samples.png")
    save_samples({task: row for task, row in rows.items() if row}, path)
    print(f"wrote {path}: {dataset.subjects.table['held_out'].sum()} images are held out")


def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    has_cuda = torch.cuda.is_available()
    parser.add_argument("--stage", type=int, choices=(0, 1, 2), help="tokenizer, alignment, instruction")
    parser.add_argument("--preset", choices=CONFIGS,
                        help="model, image size and schedule (default: gpu with CUDA, else cpu)")
    parser.add_argument("--data", help="emoji, shapes or folders, with commas (default: emoji, else shapes)")
    parser.add_argument("--backgrounds", metavar="DIR",
                        help="photographs to place subjects on, named by a .txt beside, file or folder")
    parser.add_argument("--mix", type=parse_mix, metavar="TASK=SHARE,...", help="tasks of stage 1 or 2")
    parser.add_argument("--steps", type=at_least(1), help="of this stage (default: the preset's)")
    parser.add_argument("--batch-size", type=at_least(1), help="samples (stage 0: pictures) a step")
    parser.add_argument("--workers", type=at_least(0), default=8 if has_cuda else 1,
                        help="processes that compose samples (default: %(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--out", default="out", help="for checkpoints, sheets and the log (default: out)")
    add_device_flag(parser)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="torch.compile of stages 1 and 2 (default: where it works, not for test)")
    parser.add_argument("--show", action="store_true", help="a sheet of what this run would learn from")
    parser.add_argument("--export", metavar="FILE", help="write the stage 2 of --out, in half precision")
    args = parser.parse_args()
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
    if args.compile is None and not args.show:
        args.compile = args.preset != "test" and args.stage > 0 and can_compile(device)
    if WORLD > 1:  # (two hours: the first process may look through a million images)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{args.out}: no such folder, and none can be made ({error.strerror})") from error
    if args.show:
        return show(args.stage, args, device)
    if args.stage == 1:
        make_datasets(make_plan(1, args, device), args)  # what is wrong is said now, not after the tokenizer
        path = os.path.join(args.out, CHECKPOINTS[0])
        begun = checked(path, CONFIGS[args.preset], 0) if os.path.exists(path) else None
        if begun is None or begun["step"] < begun["settings"]["steps"]:
            own = {name: begun["settings"][name] if begun else None for name in ("steps", "batch_size")}
            train(0, argparse.Namespace(**vars(args) | own), device)
    train(args.stage, args, device)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
