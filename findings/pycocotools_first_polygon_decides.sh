#!/usr/bin/env bash
# pycocotools 2.0.11 (numpy 2.4.6): the first polygon of an outline decides how all are read. Seen on
# 2026-11-28, Python 3.11.
#
# An outline has a square of 40 x 40 and a leftover of two points, as tools write it of things one pixel
# wide.
# Expected of mask.frPyObjects: 1600 pixels whatever their order, or an error in both.
# Seen: square first, 1600 pixels, the leftover has none. Leftover first, a TypeError about a bounding box:
# four numbers in the first polygon mean x, y, width, height for the whole list.
# Output: square first: 1600; leftover first: TypeError: Argument 'bb' has incorrect type
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet pycocotools==2.0.11 numpy==2.4.6
cd "$place"
"$place/venv/bin/python" - <<'PY' | tee seen
from pycocotools import mask

square, leftover = [20, 20, 60, 20, 60, 60, 20, 60], [30, 30, 31, 30]


def area(polygons):
    try:
        return str(mask.area(mask.merge(mask.frPyObjects(polygons, 80, 96))))
    except TypeError as error:
        return f"TypeError: {str(error).split(' (')[0]}"


print(f"square first: {area([square, leftover])}; leftover first: {area([leftover, square])}")
PY
[ "$(cat seen)" = "square first: 1600; leftover first: TypeError: Argument 'bb' has incorrect type" ]
