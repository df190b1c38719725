#!/usr/bin/env bash
# litdata 0.2.76 and mosaicml-streaming 0.13.0 (Pillow 13.0.0): raw storage of PIL images drops the palette.
# Seen on 2026-11-29, Python 3.11, CPU build of torch 2.13.0.
#
# litdata.optimize stores a PIL image that is no JPEG by PILSerializer. MDSWriter does so for columns of the
# encoding "pil". Both write mode, size and pixels. Expected: what is read back has the same colours.
# Seen: no error. An image of mode "P" (GIF, 8-bit PNG, masks such as those of VOC) comes back as mode "P"
# with its numbers but without a palette, so converted to RGB it is not the picture that was written. Mode
# "RGBA" comes back whole.
# Output: written: red; litdata: (0, 0, 0); streaming: (0, 0, 0); RGBA: as written
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
import runpy
import sysconfig

from litdata.streaming.serializers import PILSerializer
from PIL import Image

streaming = runpy.run_path(f"{sysconfig.get_path('purelib')}/streaming/base/format/mds/encodings.py")
Image.new("RGB", (8, 8), "red").quantize(4).save("mask.png")
mask, clear = Image.open("mask.png"), Image.new("RGBA", (8, 8), (1, 2, 3, 4))
assert mask.mode == "P" and mask.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
encode, decode = streaming["mds_encode"], streaming["mds_decode"]
round_trips = {"litdata": lambda image: PILSerializer.deserialize(PILSerializer().serialize(image)[0]),
               "streaming": lambda image: decode("pil", encode("pil", image))}
seen = ["written: red"]
for name, round_trip in round_trips.items():
    back = round_trip(mask)
    assert back.mode == "P" and back.tobytes() == mask.tobytes()
    assert round_trip(clear).getpixel((0, 0)) == (1, 2, 3, 4)
    seen.append(f"{name}: {back.convert('RGB').getpixel((0, 0))}")
print("; ".join(seen) + "; RGBA: as written")
PY
[ "$(cat seen)" = "written: red; litdata: (0, 0, 0); streaming: (0, 0, 0); RGBA: as written" ]
