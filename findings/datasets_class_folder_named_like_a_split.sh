#!/usr/bin/env bash
# datasets 5.2.0 (with pillow 13.0.0): a class folder "test tube" makes a folder of three classes a data set
# of one class, without labels. Seen on 2026-11-28, Python 3.11.
#
# Expected of load_dataset("imagefolder") on flask/, beaker/ and "test tube/", three pictures each: one split
# "train" of nine pictures, with the column "label" of three classes.
# Seen: one split "test" of the three test tubes, no column "label". Flask and beaker are gone, and nothing
# says so. A folder's name is a split as soon as one of its words (between spaces, dots, - or _) is train,
# test, val, dev, eval, ...; if any file lies in such a folder, files outside of them are no data. With the
# folder called "tube" all is as expected.
# Output: {'test': (3, ['image'])} {'train': (9, ['image', 'label'])}
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet datasets==5.2.0 pillow==13.0.0
cd "$place"
export HF_HUB_OFFLINE=1 HF_HOME="$place/home"
"$place/venv/bin/python" - 2>/dev/null <<'PY' | tee seen
import os

from datasets import load_dataset
from PIL import Image


def splits(odd):
    for name in (odd, "flask", "beaker"):
        os.makedirs(f"{odd} and others/{name}")
        for i in range(3):
            Image.new("RGB", (8, 8)).save(f"{odd} and others/{name}/{i}.png")
    found = load_dataset("imagefolder", data_dir=f"{odd} and others")
    return {split: (len(found[split]), sorted(found[split].features)) for split in found}


print(splits("test tube"), splits("tube"))
PY
[ "$(cat seen)" = "{'test': (3, ['image'])} {'train': (9, ['image', 'label'])}" ]
