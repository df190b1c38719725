"""Shared by all tests: a trained toy (32 px, shapes), and ways to run the scripts as a user does."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import TaskDataset, load_subjects  # noqa: E402 (the path comes first)

SHAPES = load_subjects("shapes")
TOY = ("--preset", "test", "--data", "shapes", "--device", "cpu")


def script(name, *args, **how):
    """Runs a script in a process of its own -> the finished process, with stdout and stderr as text."""
    return subprocess.run(
        [sys.executable, str(ROOT / name), *map(str, args)], capture_output=True, text=True, **how
    )


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Stages 0, 1 and 2 of the toy, run by the commands of the README -> the folder."""
    out = tmp_path_factory.mktemp("trained")
    for stage in (1, 2):
        done = script("train.py", "--stage", stage, *TOY, "--out", out)
        assert done.returncode == 0, done.stderr
    return out


def noisy_model(**changes):
    """A small transformer with no zeros in it: a fresh one ignores its prefix, since its blocks start as the
    identity."""
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


@functools.cache
def tasks_of_shapes(task, train):
    return TaskDataset(SHAPES, {task: 1.0}, 32, (0,), train)


def tasks(task, train=True, subjects=SHAPES, size=32):
    if subjects is SHAPES and size == 32:
        return tasks_of_shapes(task, train)
    return TaskDataset(subjects, {task: 1.0}, size, (0,), train)


def picture(path, colour=(200, 30, 30), size=(40, 30), mode="RGB", **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **how)
    return path


def sprite(path, colour=(200, 30, 30)):
    """A cut-out: a coloured disc with a soft edge, on pixels of another colour that alpha hides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:48, :48] - 23.5
    alpha = np.clip((20 - np.hypot(x, y)) * 64 + 128, 0, 255)
    pixels = np.where(alpha[..., None] > 0, colour, (0, 255, 0))
    Image.fromarray(np.dstack([pixels, alpha]).astype(np.uint8)).save(path)
    return path
