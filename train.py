"""Trains everything: stage 0 the image tokenizer, stage 1 multimodal alignment, stage 2 multimodal instruction.

    python train.py --stage 1                        the tokenizer first, if out/ has none
    python train.py --stage 2                        starts from out/stage1.pt
    python train.py --stage 1 --data my_folder       your own cut-outs
    torchrun --nproc_per_node=8 train.py --stage 1   eight GPUs; the same gradients as one with the same --batch-size
    python train.py --export weights/mine.pt         the finished model, in half precision

The same command again resumes where it stopped. In --out: tokenizer.pt, stage1.pt, stage2.pt (checkpoints), stage0.png,
stage1.png, stage2.png (what it draws of held-out subjects), log.jsonl (a line per logged step; steps that a kill undid stand
there twice), index.npz and backgrounds.npz (what --data and --backgrounds hold).
"""
import argparse
import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from data import BadInput
from mentor import (CONFIGS, GUIDANCE, VERSION, Mentor, build_sequence, fill_prompt, hide_condition, pad_sequences)
from sample import Parser, add_data_flags, at_least, draw, open_checkpoint, run, save_sheet, whole_file
from tokenizer import Tokenizer, quality, to_arrays, to_images

# Per stage 0, 1, 2: optimizer steps, samples a step (images, in stage 0), peak learning rate. micro_batch: how many
# sequences go through the transformer at once; it changes memory and speed, never the result.
SCHEDULES = {
    "test": dict(steps=(150, 80, 80), batch_size=(32, 16, 16), lr=(2e-3, 1.2e-2, 6e-3), micro_batch=16),
    "cpu": dict(steps=(5400, 600, 5400), batch_size=(64, 32, 32), lr=(2e-3, 4e-3, 3e-3), micro_batch=16),
    "gpu": dict(steps=(50_000, 60_000, 60_000), batch_size=(256, 256, 256), lr=(1e-3, 1e-3, 5e-4), micro_batch=64),
    "paper": dict(steps=(200_000, 20_000, 20_000), batch_size=(128, 128, 128), lr=(2e-4, 5e-4, 1e-4), micro_batch=4),
}
MIXES = {  # share of each task in a stage
    0: {"segmentation": 0.3, "recovery": 0.2, "subject-driven": 0.5},  # every kind of picture, two a sample
    1: {"text-to-image": 0.28, "reconstruction": 0.07, "segmentation": 0.65},  # the paper's
    # The paper has .46, -, .115, .115, .31. At this scale a stage without reconstruction forgets to copy: in a prototype its
    # held-out loss rose from 1.3 to 3.0.
    2: {"text-to-image": 0.36, "reconstruction": 0.05, "segmentation": 0.115, "recovery": 0.115, "subject-driven": 0.36},
}
STOPS = (signal.SIGINT, signal.SIGTERM)  # a run saves, and leaves


def parse_mix(text):
    """'segmentation=.65,text-to-image=.35' -> dict that sums to 1. Raises BadInput."""
    mix = {}
    for item in text.split(","):
        task, _, share = item.partition("=")
        if task not in data.TASKS:
            raise BadInput(f"--mix: no task {task!r} (there are {', '.join(data.TASKS)})")
        try:
            mix[task] = float(share)
        except ValueError:
            raise BadInput(f"--mix: {item!r} is not a share (write {task}=0.5)") from None
    if not all(0 <= share < math.inf for share in mix.values()) or sum(mix.values()) == 0:
        raise BadInput(f"--mix {text}: shares must be numbers from 0 up, and not all 0")
    return {task: share / sum(mix.values()) for task, share in mix.items()}


# ---------------------------------------------------------------------------------------------------------------------
# From samples to tensors


def has_bf16(device):
    """Whether the hardware multiplies bf16: CUDA since Ampere, and CPUs with avx512_bf16 (others emulate it slowly)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu.get_capabilities().get("avx512_bf16", False)


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))


def encode_samples(tokenizer, samples, device):
    """-> list of (pieces, references' codes, target's codes), codes (N,) on the CPU, with one pass of the encoder"""
    images = [image for s in samples for image in (*s["refs"], s["target"])]
    with autocast(device):
        codes = iter(tokenizer.encode(to_images(images, device)).cpu())
    return [(fill_prompt(s["task"], s["label"], s["caption"]), [next(codes) for _ in s["refs"]], next(codes)) for s in samples]


def to_batch(config, encoded, device):
    """-> ids (B, T), positions (B, T, 3), lengths (B,), target codes (B, N)"""
    sequences = [build_sequence(config, *sample) for sample in encoded]
    return [x.to(device) for x in (*pad_sequences(sequences, multiple=32), torch.stack([target for _, _, target in encoded]))]


def micro_batches(config, tokenizer, samples, size, device):
    """One step's samples, sorted by length and split: short sequences are not padded to the longest. The parts are of
    equal size, so the mean of their losses is the loss of the whole batch."""
    encoded = [(*hide_condition(pieces, references, s["hide"]), target)
               for s, (pieces, references, target) in zip(samples, encode_samples(tokenizer, samples, device))]
    encoded.sort(key=lambda sample: (len(sample[1]), len("".join(sample[0]).encode())))
    for i in range(0, len(encoded), size):
        yield to_batch(config, encoded[i:i + size], device)


# ---------------------------------------------------------------------------------------------------------------------
# Optimisation


def learning_rate(step, steps, peak):
    """5% linear warm-up, then a cosine to zero (paper, section 4); counted in optimizer steps."""
    warmup = max(1, round(0.05 * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - 1 - warmup)))


def make_optimizers(model, bf16, fused):
    """Muon on the hidden matrices (the tokenizer's residual blocks too), AdamW on all else (embeddings, codebooks, gains).

    torch's Muon orthogonalises in bf16: where the hardware does not multiply bf16 fast, AdamW takes the matrices too.
    """
    named = list(model.named_parameters())
    hidden = [p for name, p in named if bf16 and p.ndim == 2 and (".conv" in name or name.startswith(("blocks.", "fine_mlp.")))]
    rest = [p for name, p in named if not any(p is h for h in hidden)]
    decay, plain = [p for p in rest if p.ndim == 2], [p for p in rest if p.ndim != 2]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=fused)]
    if hidden:  # match_rms_adamw: one learning rate serves both
        optimizers.append(torch.optim.Muon(hidden, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def accumulate(net, parts, device):
    """Adds the gradient of the mean loss over all parts -> that loss, and what the last part's pass returned beside it.

    The division comes before backward, so k parts give the gradient of one batch. Among several processes only the last
    part's backward exchanges gradients.
    """
    total = 0.0
    for i, part in enumerate(parts):
        with net.no_sync() if isinstance(net, DistributedDataParallel) and i < len(parts) - 1 else nullcontext():
            with autocast(device):
                result = net(*part)
            loss, *beside = result if isinstance(result, tuple) else (result,)
            loss = loss.mean() / len(parts)
            loss.backward()
        total += loss.detach()
    return total, beside


# ---------------------------------------------------------------------------------------------------------------------
# Looking at what was learnt, on held-out subjects


@torch.no_grad()
def held_out_losses(model, tokenizer, datasets, n, device):
    """Cross-entropy per task in nats a code, and two gains: how much worse the model does with the next sample's
    reference, or text, in place of its own. A gain of 0 means that it does not look. They are taken on the subject-driven
    task, in stage 1 on segmentation, and left out where a mix has neither."""
    losses, prefix_task = {}, "subject-driven" if "subject-driven" in datasets else "segmentation"

    def mean_loss(encoded):
        total = 0.0
        for i in range(0, n, 16):
            with autocast(device):
                total += model(*to_batch(model.config, encoded[i:i + 16], device)).sum().item()
        return total / n

    for task, dataset in datasets.items():
        encoded = encode_samples(tokenizer, [dataset[i] for i in range(n)], device)
        losses[task] = mean_loss(encoded)
        if task == prefix_task:
            pieces, references, targets = (list(column) for column in zip(*encoded))
            swapped = mean_loss(list(zip(pieces, references[1:] + references[:1], targets)))
            losses["reference gain"] = swapped - losses[task]
            swapped = mean_loss(list(zip(pieces[1:] + pieces[:1], references, targets)))
            losses["prompt gain"] = swapped - losses[task]
    return {name: round(value, 4) for name, value in losses.items()}


@torch.no_grad()
def held_out_sheet(model, tokenizer, datasets, path, device, n=6):
    """Draws n held-out samples of every task into one labelled picture: reference, target, drawn."""
    rows = []
    for task, dataset in datasets.items():
        samples = [dataset[i] for i in range(n)]
        cfg_image, cfg_text = GUIDANCE[task]
        prompts = [(fill_prompt(task, s["label"], s["caption"]), s["refs"]) for s in samples]
        with autocast(device):
            drawn = draw(model, tokenizer, prompts, cfg_image=cfg_image, cfg_text=cfg_text)
        cells = [("<image>".join(pieces), [*s["refs"], s["target"], d]) for (pieces, _), s, d in zip(prompts, samples, drawn)]
        rows.append((f"{task}: {'reference, ' if samples[0]['refs'] else ''}target, drawn", cells))
    save_sheet(rows, path)


@torch.no_grad()
def tokenizer_quality(tokenizer, dataset, path, device, n=256):
    """What `quality` says of n held-out pictures; draws a sheet of some, before and after."""
    samples = [dataset[i] for i in range(n)]
    with autocast(device):
        drawn, result = quality(tokenizer, to_images([s["target"] for s in samples], device))
    cells = [("", [s["target"], d]) for s, d in zip(samples, to_arrays(drawn[:24]))]
    save_sheet([("picture, through the tokenizer", cells[i:i + 6]) for i in range(0, 24, 6)], path)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The loop, the same for all three stages


def load_sources(args):
    """-> subjects, backgrounds"""
    for folder in f"{args.data or ''},{args.backgrounds or ''}".split(","):
        if folder and os.path.join(os.path.realpath(args.out), "").startswith(os.path.join(os.path.realpath(folder), "")):
            raise BadInput(f"--out {args.out} lies in {folder}, and what is written there would be trained on: give another --out")
    return (data.load_subjects(args.data, os.path.join(args.out, "index.npz")),
            data.load_subjects(args.backgrounds, os.path.join(args.out, "backgrounds.npz")) if args.backgrounds else ())


def can_compile(device):
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(2, device=device))
        return True
    except Exception as error:  # no C++ compiler, no Triton
        print(f"torch.compile does not work here ({str(error).strip().splitlines()[0][:100]}): training slower, without it", file=sys.stderr)
        return False


def batch_plan(stage, args, world):
    """-> samples a step over all processes, samples a micro-batch of one. Raises BadInput if they do not come out even."""
    schedule = SCHEDULES[args.preset]
    batch_size = args.batch_size or schedule["batch_size"][stage]
    mine = batch_size // world  # stage 0 takes both pictures of a sample, and all of them at once
    micro_batch = max(2, mine) if stage == 0 else max(1, min(mine, schedule["micro_batch"]))
    if mine * world != batch_size or mine % micro_batch or (stage == 0 and mine % 2):
        raise BadInput(f"stage {stage}, --batch-size {batch_size}: give a multiple of {world * (2 if stage == 0 else micro_batch)} ({world} processes, "
                       f"micro-batches of {micro_batch})" + ("; --stage 0 takes a --batch-size of its own" if stage == 0 else ""))
    return batch_size, micro_batch


def save(path, **state):
    with whole_file(path) as temporary:
        torch.save({"version": VERSION, **state}, temporary)


def follow_main(worker):
    """Ctrl-C and SIGTERM reach the whole group of processes: the main one stops after its step, and needs its workers until then.
    Where it is killed they leave, too: by themselves they would wait for ever to hand over their last samples."""
    for name in STOPS:
        signal.signal(name, signal.SIG_IGN)

    def watch(main_process=os.getppid()):
        while os.getppid() == main_process:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def train(stage, args, device, rank, world):
    """Trains one stage to its end, or goes on with it; returns at once where it is finished."""
    config, schedule = CONFIGS[args.preset], SCHEDULES[args.preset]
    steps = args.steps or schedule["steps"][stage]
    batch_size, micro_batch = batch_plan(stage, args, world)
    if rank > 0:
        dist.barrier()  # the first process looks through the folders, the others read what it found
    subjects, backgrounds = load_sources(args)
    if rank == 0:
        print(f"stage {stage}: {subjects.said}" + (f"\nbackgrounds: {backgrounds.said}" if backgrounds else ""), file=sys.stderr)
        if world > 1:
            dist.barrier()
    path, sheet = (os.path.join(args.out, name) for name in (f"stage{stage}.pt" if stage else "tokenizer.pt", f"stage{stage}.png"))
    mix = args.mix if args.mix and stage else MIXES[stage]
    if stage == 0 and not subjects.table["has_cutout"].all():
        mix = {"text-to-image": 1.0}  # the targets show plain pictures as well as cut-outs
    settings = dict(preset=args.preset, data=args.data or ("emoji" if data.emoji_font() else "shapes"), backgrounds=args.backgrounds,
                    mix=mix, steps=steps, batch_size=batch_size, seed=args.seed, bf16=has_bf16(device))  # bf16 decides the optimizer

    torch.manual_seed(args.seed)
    tokenizer = Tokenizer(config.downsample, config.codebook_size, config.code_dim, config.channels).to(device)
    model = tokenizer if stage == 0 else Mentor(config).to(device)
    first, seconds = 0, 0.0
    optimizers = make_optimizers(model, has_bf16(device), fused=device.type == "cuda")
    if os.path.exists(path):
        checkpoint = checked(path, config, stage)
        for name, value in checkpoint["settings"].items():
            if settings[name] != value:
                raise BadInput(f"{path} was trained with {name} {value}, not {settings[name]}: give the same, or another --out")
        first, seconds = checkpoint["step"], checkpoint["seconds"]
        model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(state)
    elif stage:
        before = os.path.join(args.out, "stage1.pt" if stage == 2 else "tokenizer.pt")
        if not os.path.exists(before):
            raise BadInput(f"{before} is missing: stage 2 starts from it (python train.py --stage 1 --out {args.out})")
        checkpoint = checked(before, config, stage - 1)
        if rank == 0 and checkpoint["step"] < checkpoint["settings"]["steps"]:
            print(f"{before} is not finished (step {checkpoint['step']}): starting from it all the same", file=sys.stderr)
        if stage == 2:
            model.load_state_dict(checkpoint["model"])
    if first >= steps:
        if rank == 0:
            print(f"stage {stage} is finished: {path}", file=sys.stderr)
        return
    if stage:
        tokenizer.load_state_dict(checkpoint["tokenizer"])
        model.codebook.copy_(tokenizer.books().detach())
    tokenizer.requires_grad_(stage == 0)

    dataset = data.Tasks(subjects, mix, config.image_size, args.seed + stage, True, backgrounds)
    held_out = {task: data.Tasks(subjects, {task: 1.0}, config.image_size, 1_000_000 + args.seed, False, backgrounds)
                for task in ([list(mix)[-1]] if stage == 0 else mix)}  # the tokenizer looks at scenes: one task shows them
    per_step = batch_size // (2 if stage == 0 and "text-to-image" not in mix else 1)  # stage 0 takes all pictures of a sample
    batches = [range(step * per_step + rank, (step + 1) * per_step, world) for step in range(first, steps)]
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=list, num_workers=args.workers, worker_init_fn=follow_main)
    # Compiled once for every length that occurs (multiples of 32).
    torch._dynamo.config.recompile_limit = 64
    net = torch.compile(model, dynamic=False) if args.compile and stage else model
    if world > 1:
        net = DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None)
    stop, saved = [], first
    handlers = [signal.signal(name, lambda *_: stop.append(True)) for name in STOPS]
    evaluate_every, save_every = max(1, steps // 10), max(1, steps // 40)
    started, bar = time.time(), tqdm(loader, total=steps, initial=first, desc=f"stage {stage}", disable=rank > 0, mininterval=1)
    with bar, open(os.path.join(args.out, "log.jsonl"), "a") as log:
        for step, samples in enumerate(bar, first):
            lr = learning_rate(step, steps, schedule["lr"][stage])
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
            torch.manual_seed(args.seed * 1_000_003 + step)  # so that a resumed run draws the same
            if stage == 0:
                parts = [[to_images([image for s in samples for image in (s["target"], *s["refs"])], device)]]
            else:
                parts = list(micro_batches(config, tokenizer, samples, micro_batch, device))
            try:
                loss, outputs = accumulate(net, parts, device)
            except Exception:
                if not stop:
                    raise
                stopping, done = True, saved  # the signal has reached the compiler that torch.compile started, too
                break
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not torch.isfinite(loss + norm):
                raise BadInput(f"stage {stage}, step {step}: loss {loss.item()}, gradient {norm.item()}: training cannot go on. The "
                               f"last good checkpoint is {path if saved else 'none'}, of step {saved}: lower the learning rate (SCHEDULES)")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if stage == 0:
                tokenizer.restart_dead_codes(*outputs)

            done, now = step + 1, seconds + time.time() - started
            if rank == 0 and (done % 10 == 0 or done == steps):
                record = {"stage": stage, "step": done, "loss": round(loss.item(), 4), "lr": round(lr, 7),
                          "samples_per_second": round(batch_size * (done - first) / (now - seconds), 1), "seconds": round(now, 1)}
                print(json.dumps(record), file=log, flush=True)
                bar.set_postfix(loss=record["loss"], lr=f"{lr:.1e}", samples_s=record["samples_per_second"])
            if world > 1:  # a signal reaches the processes at different steps: they stop together
                any_stop = torch.tensor(len(stop), device=device)
                dist.all_reduce(any_stop)
            stopping = (int(any_stop) if world > 1 else len(stop)) and done < steps
            evaluate = done % evaluate_every == 0 or done == steps
            if stopping or evaluate or done % save_every == 0:
                if rank == 0:  # first the checkpoint, then everything that may fail
                    save(path, stage=stage, step=done, seconds=now, settings=settings, config=dataclasses.asdict(config),
                         model=model.state_dict(), tokenizer=tokenizer.state_dict(), optimizers=[o.state_dict() for o in optimizers])
                saved = done
            if stopping:
                break
            if evaluate and rank == 0:
                if stage == 0:
                    result = tokenizer_quality(tokenizer, *held_out.values(), sheet, device)
                else:
                    result = held_out_losses(model, tokenizer, held_out, 16 if args.preset == "test" else 64, device)
                    held_out_sheet(model, tokenizer, held_out, sheet, device)
                print(json.dumps({"stage": stage, "step": done, "held_out": result, "seconds": round(now, 1)}), file=log, flush=True)
                bar.write(f"stage {stage}, step {done}, held out: " + ", ".join(f"{k} {v}" for k, v in result.items()))
    if stopping:
        if rank == 0:
            print(f"stopped: {done} of {steps} steps are saved in {path}; the same command goes on", file=sys.stderr)
        sys.exit(130)
    if rank == 0:
        print(f"stage {stage} is finished: {path}, and what it draws: {sheet}", file=sys.stderr)
    if world > 1:
        dist.barrier()  # the next stage reads what the first process has just saved
    for name, handler in zip(STOPS, handlers):
        signal.signal(name, handler)
    if stop:  # during the last step: all is saved, but no next stage begins
        sys.exit(130)


def checked(path, config, stage):
    """A checkpoint of this preset and stage, else BadInput."""
    checkpoint = open_checkpoint(path)
    if checkpoint["config"] != dataclasses.asdict(config) or checkpoint["stage"] != stage:
        raise BadInput(f"{path} is of another preset or stage: give the --preset it was trained with, or another --out")
    if "optimizers" not in checkpoint:
        raise BadInput(f"{path} is an exported model, without what training needs: give another --out")
    return checkpoint


def export(args):
    """Tokenizer and transformer in half precision, nothing else: what sample.py needs."""
    source = os.path.join(args.out, "stage2.pt")
    checkpoint = open_checkpoint(source)
    if "settings" not in checkpoint or os.path.realpath(args.export) == os.path.realpath(source):
        raise BadInput(f"--export {args.export}: {source} is exported already, or would be overwritten: give another name or --out")
    if checkpoint["step"] < checkpoint["settings"]["steps"]:
        print(f"{source} is not finished (step {checkpoint['step']}): exporting it all the same", file=sys.stderr)
    half = {part: {k: v.half() for k, v in checkpoint[part].items()} for part in ("model", "tokenizer")}
    save(args.export, config=checkpoint["config"], stage=2, step=checkpoint["step"], **half)
    print(f"wrote {args.export}, {os.path.getsize(args.export) / 1e6:.1f} MB")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    has_cuda = torch.cuda.is_available()
    parser.add_argument("--stage", type=int, choices=(0, 1, 2), help="0 tokenizer, 1 alignment, 2 instruction")
    parser.add_argument("--preset", choices=CONFIGS, default="gpu" if has_cuda else "cpu", help="model, image size and schedule")
    add_data_flags(parser)
    parser.add_argument("--mix", type=parse_mix, help='share of each task in stage 1 or 2, as "segmentation=.65,text-to-image=.35"')
    parser.add_argument("--steps", type=at_least(1), help="optimizer steps of this stage (default: the preset's)")
    parser.add_argument("--batch-size", type=at_least(1), help="samples a step, over all processes (default: the preset's)")
    parser.add_argument("--workers", type=at_least(0), default=8 if has_cuda else 1, help="processes that compose samples")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--out", default="out", help="folder for checkpoints, sheets and the log (default: out)")
    parser.add_argument("--device", choices=("cpu", "cuda")[:1 + has_cuda], default="cuda" if has_cuda else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: where it works, save for --preset test)")
    parser.add_argument("--export", metavar="FILE", help="write the finished stage 2 of --out to FILE, in half precision")
    args = parser.parse_args()
    if args.export:
        return export(args)
    if args.stage is None:
        raise BadInput("give --stage 0, 1 or 2 (or --export FILE)")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if args.compile is None:
        args.compile = args.preset != "test" and can_compile(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))  # for the first one's scan
    os.makedirs(args.out, exist_ok=True)
    batch_plan(args.stage, args, world)  # said now, not after the tokenizer's half hour
    if args.stage == 1:
        if rank == 0:
            data.Tasks(load_sources(args)[0], args.mix or MIXES[1], 8, 0)  # raises BadInput if these images cannot feed the tasks
        path = os.path.join(args.out, "tokenizer.pt")
        begun = checked(path, CONFIGS[args.preset], 0) if os.path.exists(path) else None
        if begun is None or begun["step"] < begun["settings"]["steps"]:
            own = {name: begun["settings"][name] if begun else None for name in ("steps", "batch_size")}
            train(0, argparse.Namespace(**vars(args) | own), device, rank, world)
    train(args.stage, args, device, rank, world)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
