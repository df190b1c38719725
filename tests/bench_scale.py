"""A folder of a million images: how long until training could start, and how much memory does it take? Run by
hand:

    python tests/bench_scale.py [--n 1000000]

The images are hard links to a few cut-outs, a thousand in each class folder.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
from data import TASKS, paint_shape


def own_memory():
    """What this process does not share with another, in MB (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return (
        sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))
        / 1000
    )


class Memory(data.TaskDataset):
    """The same samples, but what comes back is the memory of the worker that made them."""

    def __getitem__(self, index):
        super().__getitem__(index)
        return own_memory()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=1_000_000)
    n = parser.parse_args().n
    with tempfile.TemporaryDirectory() as place:
        images = Path(place) / "images"
        images.mkdir()
        for i in range(100):
            paint_shape(data.shape_subjects()[i * 4].path).save(Path(place) / f"{i}.png")
        for i in range(n):
            if i % 1000 == 0:
                (images / f"class {i // 1000}").mkdir()
            os.link(Path(place) / f"{i % 100}.png", images / f"class {i // 1000}" / f"{i}.png")
        before = own_memory()
        started = time.time()
        subjects = data.load_subjects(str(images))
        print(f"scan: {time.time() - started:.1f} s; {subjects.report}")
        print(f"the process grew by {own_memory() - before:.0f} MB", flush=True)
        started = time.time()
        dataset = Memory(subjects, {task: 1 / len(TASKS) for task in TASKS}, 64, (0,))
        loader = DataLoader(dataset, batch_size=100, collate_fn=list, num_workers=2, sampler=range(10_000))
        memory = [max(batch) for batch in loader]
        print(
            f"10,000 samples by two workers in {time.time() - started:.0f} s; a worker's own memory: "
            f"{memory[0]:.0f} MB at first, {memory[len(memory) // 2]:.0f} MB half-way, "
            f"{memory[-1]:.0f} MB at the end"
        )


if __name__ == "__main__":
    main()
