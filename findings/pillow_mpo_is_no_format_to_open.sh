#!/usr/bin/env bash
# pillow 13.0.0: "MPO", which it says a phone's photograph is, cannot be named among the formats to open.
# Seen on 2026-11-28, Python 3.11.
#
# A JPEG with a second picture behind the first (MPO, as phones and stereo cameras write it) has the format
# "MPO".
# Expected of Image.open(path, formats=["PNG", "MPO"]): it opens, since .mpo is a registered ending of MPO.
# Seen: KeyError: 'MPO'. The plug-in of JPEG opens it and then calls it MPO: formats=["JPEG"] opens it. Any
# other file gives the KeyError, too, in place of UnidentifiedImageError, unless a format before MPO accepts
# it.
# Output: format MPO; ending MPO; formats PNG, MPO: KeyError; formats PNG, JPEG: MPO; of an AVIF: KeyError
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet pillow==13.0.0
cd "$place"
"$place/venv/bin/python" - <<'PY' | tee seen
from PIL import Image

pictures = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
pictures[0].save("phone.jpg", "MPO", save_all=True, append_images=pictures[1:])
pictures[0].save("other.avif")


def opened(path, formats=None):
    try:
        with Image.open(path, formats=formats) as image:
            return image.format
    except Exception as error:
        return type(error).__name__


print(f"format {opened('phone.jpg')}; ending {Image.registered_extensions()['.mpo']}; "
      f"formats PNG, MPO: {opened('phone.jpg', ['PNG', 'MPO'])}; "
      f"formats PNG, JPEG: {opened('phone.jpg', ['PNG', 'JPEG'])}; "
      f"of an AVIF: {opened('other.avif', ['PNG', 'MPO'])}")
PY
wanted="format MPO; ending MPO; formats PNG, MPO: KeyError; formats PNG, JPEG: MPO; of an AVIF: KeyError"
[ "$(cat seen)" = "$wanted" ]
