"""kill -9 at twenty random moments of a run, on one process and on two: are the weights those of an
undisturbed run? By hand:

    python tests/bench_stops.py [--kills 20]

Trains the toy (--preset test), some minutes in all, and ends with exit code 1 if a single bit differs.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def start(n, stage, out, port):
    """n ranks, as torchrun starts them, but without torchrun: its workers would outlive it."""
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--stage",
        str(stage),
        "--preset",
        "test",
        "--data",
        "shapes",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    return [
        subprocess.Popen(
            command,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(n),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(n)
    ]


def step_of(out):
    path = out / "stage2.pt"
    return torch.load(path, weights_only=True)["step"] if path.exists() else 0


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    kills = parser.parse_args().kills
    chance, same, port = random.Random(0), True, 29600
    with tempfile.TemporaryDirectory() as place:
        for n in (1, 2):
            quiet, killed = (Path(place) / f"{n} {name}" for name in ("quiet", "killed"))
            for stage in (1, 2):
                assert not any(process.wait() for process in start(n, stage, quiet, port))
                if stage == 1:
                    shutil.copytree(quiet, killed)  # both stage 2 start from one stage 1
            steps, saving = [], 0
            while True:
                port += 1
                before, processes = step_of(killed), start(n, 2, killed, port)
                if len(steps) == kills:
                    assert not any(process.wait() for process in processes)
                    break
                while step_of(killed) == before:  # it has come further than the last one
                    time.sleep(0.1)
                    assert all(
                        process.poll() is None for process in processes
                    ), "it ended before it could be killed"
                time.sleep(chance.uniform(0, 1))
                for process in processes:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                steps.append(step_of(killed))
                for left in killed.glob("*.tmp"):
                    saving += 1
                    left.unlink()
                if steps[-1] > 60:  # nearly at the end: from the start again
                    (killed / "stage2.pt").unlink()
            a, b = (torch.load(out / "stage2.pt", weights_only=True)["model"] for out in (quiet, killed))
            equal = all(torch.equal(weight, b[name]) for name, weight in a.items())
            same &= equal
            print(
                f"{n} process(es): {kills} kills, {saving} of them within a save, at the steps {steps}: "
                f"weights {'bit-identical' if equal else 'DIFFER'}",
                flush=True,
            )
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
