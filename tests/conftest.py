"""Shared by all tests: a trained toy (32 px, shapes), and ways to run the scripts as a user does."""
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TOY = ("--preset", "test", "--data", "shapes", "--device", "cpu")


def script(name, *args, **how):
    """Runs a script in a process of its own -> the finished process, with stdout and stderr as text."""
    return subprocess.run([sys.executable, str(ROOT / name), *map(str, args)], capture_output=True, text=True, **how)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Stages 0, 1 and 2 of the toy, run by the commands of the README -> the folder."""
    out = tmp_path_factory.mktemp("trained")
    for stage in (1, 2):
        done = script("train.py", "--stage", stage, *TOY, "--out", out)
        assert done.returncode == 0, done.stderr
    return out


def noisy_model(**changes):
    """A small transformer with no zeros in it: a fresh one ignores its prefix, since its blocks start as the identity."""
    from mentor import CONFIGS, Mentor

    torch.manual_seed(0)
    model = Mentor(dataclasses.replace(CONFIGS["test"], **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.codebooks.normal_()
    return model


@pytest.fixture
def model():
    return noisy_model()
