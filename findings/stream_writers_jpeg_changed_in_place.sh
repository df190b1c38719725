#!/usr/bin/env bash
# litdata 0.2.76 and mosaicml-streaming 0.13.0 (Pillow 13.0.0): a JPEG that was opened and changed in memory
# is written as its file was.
# Seen on 2026-11-29, Python 3.11, CPU build of torch 2.13.0.
#
# Image.thumbnail and Image.paste change a picture in place, and it stays a JpegImageFile with its file's
# name. JPEGSerializer (litdata.optimize calls it for each leaf) and the encoding "jpeg" (MDSWriter calls it
# for each column) copy the bytes of that file.
# Expected: the picture as it is in memory, 64 x 48, and black where it was painted over.
# Seen: no warning. The data set has the large picture, and what was painted over is there again. With
# Image.resize, which makes a new picture, MDSWriter writes the small one.
# Output: litdata: (512, 384), painted over: red; streaming: (512, 384), painted over: red
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 numpy pillow==13.0.0 typing_extensions
# Without what only storage in a cloud, video and reading tensors need.
"$place/venv/bin/pip" install --quiet --no-deps litdata==0.2.76 mosaicml-streaming==0.13.0 filelock requests \
    urllib3 lightning-utilities obstore tifffile packaging boto3 botocore s3transfer jmespath \
    python-dateutil six idna certifi charset_normalizer
cd "$place"
"$place/venv/bin/python" - 2>/dev/null <<'PY' | tee seen
import io
import runpy
import sysconfig

from litdata.streaming.serializers import JPEGSerializer
from PIL import Image

streaming = f"{sysconfig.get_path('purelib')}/streaming/base/format/mds/encodings.py"
mds_encode = runpy.run_path(streaming)["mds_encode"]  # the package as a whole needs torchvision
Image.new("RGB", (512, 384), "red").save("photo.jpg")
small, painted = Image.open("photo.jpg"), Image.open("photo.jpg")
small.thumbnail((64, 64))
painted.paste("black", (0, 0, 512, 384))
assert small.size == (64, 48) and painted.getpixel((99, 99)) == (0, 0, 0)
litdata = JPEGSerializer()
assert litdata.can_serialize(small)
seen = []
for name, write in (("litdata", lambda picture: litdata.serialize(picture)[0]),
                    ("streaming", lambda picture: mds_encode("jpeg", picture))):
    size = Image.open(io.BytesIO(write(small))).size
    red, *_ = Image.open(io.BytesIO(write(painted))).getpixel((99, 99))
    seen.append(f"{name}: {size}, painted over: {'red' if red > 200 else 'black'}")
assert Image.open(io.BytesIO(mds_encode("jpeg", small.resize((64, 48))))).size == (64, 48)
print("; ".join(seen))
PY
[ "$(cat seen)" = \
  "litdata: (512, 384), painted over: red; streaming: (512, 384), painted over: red" ]
