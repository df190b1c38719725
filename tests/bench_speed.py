"""Where the time goes, for a preset and the device at hand. Run by hand, with nothing else running:

    python tests/bench_speed.py                      the cpu preset, or gpu where there is one
    python tests/bench_speed.py --preset test

Composing is one worker's. A training step is encoding, forward, backward and optimizers on one micro-batch of
the stage-2 mix. A picture is drawn after a reference and a caption, with the guidance of the subject-driven
task. Each figure is the fastest of several runs. The weights are random: they cost what trained ones do.
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
from data import TASKS, fill_prompt
from mentor import CONFIGS, Mentor, generate, has_bf16
from sample import Parser, add_device_flag, run_script
from tokenizer import Tokenizer
from train import (MIXES, Run, can_compile, collate, fill_codes, make_optimizers, make_plan, parallel,
                   train_step)

# Of dense bf16 matrices, a second, by the makers' data sheets; a multiply-add counts as two.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def peak_flops(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in name), None)


def share_of_peak(model, lengths, seconds):
    """What share of the hardware's peak training a transformer (mentor.Mentor) was, on sequences of these
    lengths (a list) in as many seconds; None where the peak is not known. Counted are 6 operations a
    weight and token, and 6 n_embd a layer and pair of tokens."""
    peak = peak_flops(model.head_gain.device)
    if peak is None:
        return None
    lengths, config = torch.tensor(lengths).double(), model.config
    n_weights = sum(parameter.numel() for parameter in model.blocks.parameters())
    pairs = config.n_layer * config.n_embd * lengths.pow(2).sum().item()
    return 6 * (n_weights * lengths.sum().item() + pairs) / seconds / peak


def fastest(action, device, times=5):
    """Seconds of the fastest of several calls, after two that warm up."""
    seconds = []
    for _ in range(times + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[2:])


def photographs(folder, n=6):
    """n pictures of 12 megapixels, as a camera writes them -> data.Subjects"""
    rng = np.random.default_rng(0)
    for i in range(n):
        rough = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        rough.resize((4000, 3000), Image.Resampling.BICUBIC).save(
            Path(folder) / f"on planet {i}.jpg", quality=90
        )
    return data.load_subjects(folder)


def samples_per_second(config, size, backgrounds, n=64):
    dataset = data.TaskDataset(data.load_subjects(), MIXES[2], config.image_size, (0,), True, backgrounds)

    def compose():
        collate(config, size, [dataset[i] for i in range(n)])

    return n / fastest(compose, torch.device("cpu"), times=3)


def peak_memory(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # (Linux: in kB)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=CONFIGS, default="gpu" if torch.cuda.is_available() else "cpu")
    add_device_flag(parser)
    args = parser.parse_args()
    config, device = CONFIGS[args.preset], torch.device(args.device)
    flags = argparse.Namespace(preset=args.preset, batch_size=None, steps=None, mix=None, data=None,
                               backgrounds=None, seed=0, out="", init=None)
    plan = make_plan(2, flags, device)
    size = plan.micro_batch
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads"
    )
    print(f"{args.preset} preset, {name}, {'bf16' if has_bf16(device) else 'fp32'}\n\n| | |\n|---|---|")

    def row(what, value):
        print(f"| {what} | {value} |", flush=True)

    row("composed and collated by one worker, emoji", f"{samples_per_second(config, size, ()):.0f} samples/s")
    with tempfile.TemporaryDirectory() as folder:
        rate = samples_per_second(config, size, photographs(folder))
    row("the same, half of them on photographs of 12 megapixels", f"{rate:.0f} samples/s")

    torch.manual_seed(0)
    tokenizer, model = Tokenizer(config).to(device), Mentor(config).to(device)
    model.codebooks.copy_(tokenizer.codebooks.detach())
    for parameter in model.parameters():
        if not parameter.any():  # an untrained block is the identity
            torch.nn.init.normal_(parameter, std=0.02)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    row("parameters of the transformer", f"{n_parameters / 1e6:.1f} million")
    dataset = data.TaskDataset(data.load_subjects(), MIXES[2], config.image_size, (0,))
    batch, = collate(config, size, [dataset[i] for i in range(size)])
    seconds = fastest(lambda: fill_codes(tokenizer, batch, device), device)
    row(f"encode {len(batch.pictures)} pictures", f"{1000 * seconds:.1f} ms")

    run = Run(plan, model, tokenizer, make_optimizers(model, has_bf16(device)), known={})
    shape = f"{size} samples, {len(batch.tokens):,} tokens"
    for compiled in (False, True)[: 1 + can_compile(device)]:
        net = parallel(model, device, compiled)
        seconds = fastest(lambda: train_step(run, net, [batch], 1e-5), device)
        share = share_of_peak(model, batch.lengths, seconds)
        words = "" if share is None else f", {share:.0%} of {peak_flops(device) / 1e12:.0f} TFLOP/s"
        row(
            f"training step on {shape}, {'compiled' if compiled else 'eager'}",
            f"{1000 * seconds:.0f} ms{words}",
        )

    model.eval()
    task = TASKS["subject-driven"]
    shape = len(task.copies), config.n_patches, config.n_codebooks
    reference = torch.randint(config.codebook_size, shape)
    prompt = (fill_prompt("subject-driven", ["dog"], "a small dog on the beach, on the left"), [reference])
    for n in (1, 8, 32):
        seconds = fastest(
            lambda: generate(
                model, [prompt], task.copies, n=n, cfg_image=task.cfg_image, cfg_text=task.cfg_text
            ),
            device,
            times=3,
        )
        row(f"drawing, n = {n}", f"{seconds / n:.3f} s a picture")
    row("peak memory", f"{peak_memory(device):.1f} GiB")


if __name__ == "__main__":
    run_script(main)
