#!/usr/bin/env bash
# tfrecord 1.14.6 (numpy 2.4.6): lists of bytes are read back without their last zeros.
# Seen on 2026-11-29, Python 3.11.
#
# A sample with several pictures, such as references or masks, can be written as one feature of the kind
# "byte" with a list of bytes. Expected: each is read back as it was written, like a single value.
# Seen: no error. The reader puts a list into a numpy array of fixed-width strings (dtype S), which ends each
# of them at its last byte that is not zero. A mask whose lower half is black comes back half as long. A
# single value comes back whole.
# Output: list: 4 bytes -> 2, 4 bytes -> 4; single: 4 bytes -> 4
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet tfrecord==1.14.6 numpy==2.4.6 protobuf==7.36.2 crc32c==2.9.post0
cd "$place"
"$place/venv/bin/python" - <<'PY' | tee seen
from pathlib import Path

from tfrecord import TFRecordWriter, tfrecord_loader

above, below = bytes([1, 1, 0, 0]), bytes([0, 0, 0, 1])  # two masks of 2 x 2 pixels
writer = TFRecordWriter("samples.tfrecord")
writer.write({"masks": ([above, below], "byte"), "mask": (above, "byte")})
writer.close()
sample = next(iter(tfrecord_loader("samples.tfrecord", None, {"masks": "byte", "mask": "byte"})))
assert above in Path("samples.tfrecord").read_bytes()  # the file has all of it
lengths = ", ".join(f"4 bytes -> {len(mask)}" for mask in sample["masks"])
print(f"list: {lengths}; single: 4 bytes -> {len(sample['mask'])}")
PY
[ "$(cat seen)" = "list: 4 bytes -> 2, 4 bytes -> 4; single: 4 bytes -> 4" ]
