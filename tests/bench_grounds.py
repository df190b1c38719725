"""Grounds that no training has seen: bench_quality.py shows its references on them, too.

Training knows plain colours, gradients, soft noise, stripes and squares, and sprites' insides. These are
cells of random colours, waves that cross each other, and heaps of discs; or parts of photographs of your own.
"""

import numpy as np
from PIL import Image, ImageDraw

from data import AS_GIVEN, compose, free_placement, load_subjects, open_cutout, open_square


def draw_unseen_ground(size, rng):
    """-> RGB image, size x size"""
    kind, colours = rng.choice(["cells", "waves", "discs"]), rng.uniform(0, 255, (24, 3))
    y, x = np.mgrid[:size, :size][..., None] / size  # (size, size, 1) each
    if kind == "cells":  # each pixel has the colour of the nearest of twelve points
        points = rng.uniform(0, 1, (12, 2))
        image = colours[((y - points[:, 0]) ** 2 + (x - points[:, 1]) ** 2).argmin(2)]
    elif kind == "waves":  # two of them a colour channel
        turns, phases = rng.uniform(-2, 2, (2, 2, 3)), rng.uniform(0, 1, (2, 3))
        image = sum(np.sin(2 * np.pi * (a * y + b * x + c)) for (a, b), c in zip(turns, phases)) * 64 + 128
    else:
        picture = Image.new("RGB", (4 * size, 4 * size), tuple(map(int, colours[0])))
        for colour, (left, top, width) in zip(colours[1:], rng.uniform(-0.1, 1, (23, 3))):
            corners = np.array([left, top, left + abs(width) / 2, top + abs(width) / 2]) * 4 * size
            ImageDraw.Draw(picture).ellipse(tuple(corners), fill=tuple(map(int, colour)))
        return picture.resize((size, size), Image.Resampling.BOX)
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))


def on_any_ground(cases, size, seed, folder=None):
    """Cases of bench_quality.py with their reference and their scene on such grounds, or on parts of a
    folder's photographs; each a pure function of (seed, its number). Raises BadInput."""
    photographs, moved = load_subjects(folder) if folder else (), []
    for case in cases:
        rng, sprite = np.random.default_rng([seed, case.number, 1]), open_cutout(case.subject)
        grounds = [open_square(photographs[rng.integers(len(photographs))].path, size, rng) if folder
                   else draw_unseen_ground(size, rng) for _ in range(2)]
        reference = np.asarray(compose(sprite, grounds[0], AS_GIVEN)[0])
        scene, alone, mask = map(np.asarray, compose(sprite, grounds[1], free_placement(rng)))
        moved.append(case._replace(reference=reference, scene=scene, alone=alone, mask=mask >= 128))
    return moved
