"""What fine-tuning gained on a folder of cut-outs, and what it forgot of held-out emoji. Run by hand:

    python train.py --stage 2 --init weights/cpu.pt --data my_folder,emoji --out own
    python tests/bench_finetune.py --data my_folder weights/cpu.pt own/stage2.pt

A row for each model, kind of subject and kind of reference. "own": the folder's subjects, all of them, though
training saw most: these are what fine-tuning is for. "emoji": held out from both models. "cut out": the
reference is shown as sample.py shows one with alpha. "any ground": it stands on one of bench_grounds.py.
The measures are those of bench_quality.py; rivals are of the same kind. The sheet shows the first five cases
of "own".
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_grounds import on_any_ground
from bench_quality import draw_cases, judge, make_cases, print_table, summary
from data import load_subjects
from mentor import BadInput
from sample import Parser, add_device_flag, at_least, load_models, run_script, save_sheet


def make_rows(subjects, n, size, seed):
    """kind of reference -> cases with such references"""
    cases = make_cases(subjects, n, size, seed)
    return {"cut out": [case._replace(reference=case.cutout) for case in cases],
            "any ground": on_any_ground(cases, size, seed)}


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="checkpoints to compare")
    parser.add_argument("--data", required=True, help="the folder that was trained on")
    parser.add_argument("--n", type=at_least(2), default=100, help="pictures a row (default: 100)")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("-o", "--output", default="finetune.png", help="the sheet (default: finetune.png)")
    add_device_flag(parser)
    args = parser.parse_args()
    started, device = time.time(), torch.device(args.device)
    own, emoji = load_subjects(args.data), load_subjects("emoji")
    kinds = {"own": own.table["has_cutout"], "emoji": emoji.table["has_cutout"] & emoji.table["held_out"]}
    kinds = {name: [subjects[i] for i in np.flatnonzero(kinds[name])]
             for name, subjects in (("own", own), ("emoji", emoji))}
    if len(kinds["own"]) < 2:
        raise BadInput(f"--data {args.data}: fewer than two cut-outs to tell apart")
    rows, sheet = {}, []
    for path in args.models:
        model, tokenizer, _ = load_models(path, device)
        for kind, subjects in kinds.items():
            for shown, cases in make_rows(subjects, args.n, model.config.image_size, args.seed).items():
                references = [case.reference for case in cases]
                drawn = draw_cases(model, tokenizer, "subject-driven", cases, references, args.seed, None)
                rows[f"{path}: {kind}, {shown}"] = summary(judge(drawn, cases))
                cells = [(case.caption, [case.reference, case.target, picture])
                         for case, picture in zip(cases[:5], drawn)]
                if kind == "own":
                    sheet.append((f"{path}: reference ({shown}), target, drawn", cells))
    columns = ("CP", "hard CP", "PF", "similarity")
    print_table({name: {column: row[column] for column in columns} for name, row in rows.items()})
    save_sheet(sheet, args.output)
    print(f"\n{args.n} cases a row, seed {args.seed}: {time.time() - started:.0f} s, wrote {args.output}")


if __name__ == "__main__":
    run_script(main)
