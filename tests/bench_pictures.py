"""The pictures of both READMEs, by weights/cpu.pt, into assets/. Nothing in them is picked. Run by hand:

    python tests/bench_pictures.py

subjects.png: the first ten cases of bench_quality.py on unseen grounds. stage2.png: the first six held-out
samples of each of the first five tasks. several.png: the first cases of bench_several.py. words.png: twelve
words that were chosen before anything was drawn.
"""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench_grounds import on_any_ground
from bench_quality import draw_all, draw_cases, make_cases
from bench_several import asked, make_queries, make_scenes
from data import TASKS, TaskDataset, fill_prompt, is_held_out, load_subjects
from sample import SHIPPED, load_models, run_script, save_sheet
from train import HELD_OUT, sheet_rows

WORDS = ("smiling face", "crying face", "red apple", "tangerine", "evergreen tree", "tulip", "sunflower",
         "blue heart", "crescent moon", "glowing star", "pizza", "frog face")


def main():
    *models, _ = load_models(SHIPPED, torch.device("cpu"))
    subjects, assets = load_subjects("emoji"), ROOT / "assets"
    unseen = [subject for subject in subjects if is_held_out(subject)]
    cases = on_any_ground(make_cases(unseen, 10, 64, 0), 64, 0)
    drawn = draw_cases(*models, "subject-driven", cases, [case.reference for case in cases], 0, None)
    cells = [(case.caption, [case.reference, picture]) for case, picture in zip(cases, drawn)]
    save_sheet([("reference, drawn", cells[:5]), ("", cells[5:])], assets / "subjects.png")

    datasets = {task: TaskDataset(subjects, {task: 1.0}, 64, (0, HELD_OUT), False)
                for task in list(TASKS)[:5]}
    first = {task: [dataset[i] for i in range(6)] for task, dataset in datasets.items()}
    save_sheet(sheet_rows(first, *models), assets / "stage2.png")

    def draw_cells(task, prompts):
        return [("<image>".join(pieces), [*shown, picture])
                for (pieces, shown), picture in zip(prompts, draw_all(*models, task, prompts, 0))]

    one_of = [(fill_prompt("segmentation", [asked(scene, "place")]), [scene.picture])
              for scene in make_scenes(unseen, 4, 64, 0)]
    both = [(fill_prompt("multi-image", caption=scene.caption), scene.references)
            for scene in make_scenes(unseen, 4, 64, 0, count=2)]
    examples = draw_cells("in-context", [(fill_prompt("in-context"), [*query.example, query.picture])
                                         for query in make_queries(unseen, 5, 64, 0)])
    save_sheet([("segmentation of one of several: reference, drawn", draw_cells("segmentation", one_of)),
                ("multi-image: references, drawn", draw_cells("multi-image", both)),
                ("in-context: an example, before and after; another reference, drawn", examples[:3]),
                ("", examples[3:])], assets / "several.png")

    captions = [f"a big {word} on a white background" for word in WORDS]
    prompts = [(fill_prompt("text-to-image", caption=caption), []) for caption in captions]
    pictures = draw_all(*models, "text-to-image", prompts, 0)
    cells = [(word, [picture]) for word, picture in zip(WORDS, pictures)]
    save_sheet([("", cells[:6]), ("", cells[6:])], assets / "words.png")


if __name__ == "__main__":
    run_script(main)
