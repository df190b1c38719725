#!/usr/bin/env bash
# mmap_ninja 0.9.0 (numpy 2.4.6): the first array of a RaggedMmap decides the dtype of all others.
# Seen on 2026-11-29, Python 3.11.
#
# A RaggedMmap keeps arrays of different shapes, such as the pictures or masks of a data set, in one mapped
# file. Expected: arrays of different dtypes are refused, or stored as a dtype that holds all of them.
# Seen: no error and no warning. If the first mask is a hard one (uint8), a soft mask (float32) behind it is
# truncated to 0, 16-bit depth wraps around, and so do negative numbers that are appended later.
# Output: float32 0.5 -> 0; int64 300 -> 44; int16 -1 -> 255; all uint8
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet mmap_ninja==0.9.0 numpy==2.4.6
cd "$place"
"$place/venv/bin/python" -W error - <<'PY' | tee seen
import numpy as np
from mmap_ninja.ragged import RaggedMmap

hard, soft = np.zeros((2, 2), np.uint8), np.full((2, 3), 0.5, np.float32)
masks = RaggedMmap.from_lists("masks", [hard, soft, np.full((3, 2), 300)])
masks.append(np.full((1, 2), -1, np.int16))
again = RaggedMmap("masks")
assert [mask.shape for mask in again] == [(2, 2), (2, 3), (3, 2), (1, 2)]
assert {mask.dtype for mask in again} == {np.dtype(np.uint8)}
values = [mask.flat[0] for mask in again]
print(f"float32 0.5 -> {values[1]}; int64 300 -> {values[2]}; int16 -1 -> {values[3]}; all uint8")
PY
[ "$(cat seen)" = "float32 0.5 -> 0; int64 300 -> 44; int16 -1 -> 255; all uint8" ]
