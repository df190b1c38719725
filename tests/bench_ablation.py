"""The paper's ablation at our scale: what happens to CP and PF when one part of the training is left out? Run
by hand:

    python tests/bench_ablation.py --row "without recovery"     one row: half an hour of training, and figures
    python tests/bench_ablation.py                              all six, then the table; nothing is done twice

All rows have the tokenizer (that of weights/cpu.pt), the seed and the number of steps in common. Interrupted,
the same command goes on. The rows that differ in stage 2 alone share one stage 1.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mentor import BadInput
from sample import SHIPPED, Parser, at_least, load_checkpoint, run_script, whole_file
from train import MIXES, save_checkpoint

FIRST, SECOND = MIXES[1], MIXES[2]


def without(task, mix):
    return {name: share for name, share in mix.items() if name != task}


ROWS = {  # name: (mix of stage 1, mix of stage 2, the paper's CP, PF, CP.PF)
    "without stage 1": (
        None,
        SECOND,
        0.179,
        0.673,
        0.120,
    ),  # as many steps in all, all with stage 2's mix, at stage 1's learning rate
    "without segmentation in stage 1": (without("segmentation", FIRST), SECOND, 0.252, 0.479, 0.121),
    "without recovery": (FIRST, without("recovery", SECOND), 0.661, 0.284, 0.188),
    "without subject-driven": (FIRST, without("subject-driven", SECOND), 0.407, 0.910, 0.370),
    "without segmentation in stage 2": (FIRST, without("segmentation", SECOND), 0.412, 0.918, 0.378),
    "all": (FIRST, SECOND, 0.555, 0.839, 0.466),
}


def run(*command):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)


def claim(folder, args):
    """A folder holds what one set of settings made, and nothing else."""
    settings = json.dumps(
        {name: str(getattr(args, name)) for name in ("steps", "preset", "data", "seed", "n", "tokenizer")}
    )
    kept = folder / "settings.json"
    folder.mkdir(parents=True, exist_ok=True)
    if kept.exists() and kept.read_text() != settings:
        raise BadInput(f"{folder} was made with other settings: give the same, or another --out")
    kept.write_text(settings)


def take_tokenizer(checkpoint, path):
    """The tokenizer of any checkpoint, as a finished stage 0."""
    checkpoint = load_checkpoint(checkpoint)
    weights = {name: w.float() for name, w in checkpoint["tokenizer"].items()}
    save_checkpoint(
        path,
        stage=0,
        step=1,
        settings={"steps": 1},
        config=checkpoint["config"],
        known=checkpoint["known"],
        model=weights,
        tokenizer=weights,
        optimizers=[],
    )


def train_row(name, args):
    """Trains and measures one row; its figures are in the row's folder, in quality.json."""
    first, second, *_ = ROWS[name]
    folder = Path(args.out).absolute() / name.replace(" ", "-")
    before = folder.parent / "stage1" if first is FIRST else folder
    for place in (before, folder):
        claim(place, args)
        if not (place / "tokenizer.pt").exists():
            take_tokenizer(args.tokenizer, place / "tokenizer.pt")
    common = ["--preset", args.preset, "--seed", args.seed] + (["--data", args.data] if args.data else [])

    def stage(number, mix, steps, where):
        shares = ",".join(f"{task}={share}" for task, share in mix.items())
        run("train.py", "--stage", number, "--mix", shares, "--steps", steps, "--out", where, *common)

    if first is None:
        stage(1, second, sum(args.steps), folder)
    else:
        stage(1, first, args.steps[0], before)
        if before != folder and not (folder / "stage1.pt").exists():
            with whole_file(folder / "stage1.pt") as temporary:
                shutil.copy(before / "stage1.pt", temporary)
        stage(2, second, args.steps[1], folder)
    run(
        "tests/bench_quality.py",
        "--ckpt",
        folder / ("stage1.pt" if first is None else "stage2.pt"),
        "--n",
        args.n,
        "--seed",
        args.seed,
        "--json",
        folder / "quality.json",
        "-o",
        folder / "quality.png",
        *(["--data", args.data] if args.data else []),
    )


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS, help="one row (default: all that are not finished)")
    parser.add_argument("--tokenizer", default=SHIPPED, help="the checkpoint whose tokenizer all rows share")
    parser.add_argument(
        "--steps",
        type=at_least(1),
        nargs=2,
        default=[1600, 2600],
        help="of stage 1 and stage 2 (default: 1600 2600)",
    )
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--data", help="as train.py takes it")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--n", type=at_least(2), default=200, help="pictures to measure (default: 200)")
    parser.add_argument("--out", default="out/ablation", help="a folder a row in it (default: out/ablation)")
    args = parser.parse_args()
    table = {}
    for name in ROWS:
        result = Path(args.out) / name.replace(" ", "-") / "quality.json"
        if not result.exists() and args.row in (None, name):
            train_row(name, args)
        if result.exists():
            claim(result.parent, args)
            table[name] = json.loads(result.read_text())["subject-driven"]
    print("| | CP | PF | CP.PF | paper: CP | PF | CP.PF |\n|---|---|---|---|---|---|---|")
    for name, row in table.items():
        figures = [row["CP"], row["PF"], row["CP.PF"], *ROWS[name][2:]]
        print(f"| {name} |", " | ".join(f"{value:.3f}" for value in figures), "|")
    print(
        f"\nOne run a row; of {args.n} cases a CP errs by up to {0.5 / args.n**0.5:.3f} (one standard error)"
    )


if __name__ == "__main__":
    run_script(main)
