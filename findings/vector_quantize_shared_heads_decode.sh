#!/usr/bin/env bash
# vector-quantize-pytorch 1.32.0 (torch 2.13.0): heads that share a codebook cannot be decoded from their
# indices.
# Seen on 2026-11-29, Python 3.11, CPU build.
#
# VectorQuantize(dim, codebook_size, heads=2) looks up two codes per position. With a codebook for each head
# get_output_from_indices(indices) gives what forward gave. Expected: the same if the heads share one.
# Seen: no error, but the heads stay apart in an axis of their own. For images that axis comes last, and the
# channels are those of one head. So a model that draws such indices gets no picture from them.
# Output: own: (3, 20, 16), as forward; shared: (3, 20, 2, 8); of images: (3, 8, 4, 5, 2)
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$place/venv/bin/pip" install --quiet vector-quantize-pytorch==1.32.0
cd "$place"
"$place/venv/bin/python" - 2>/dev/null <<'PY' | tee seen
import torch
from vector_quantize_pytorch import VectorQuantize

torch.manual_seed(0)
texts, images = torch.randn(3, 20, 16), torch.randn(3, 16, 4, 5)
seen = []
for own, x in ((True, texts), (False, texts), (False, images)):
    quantizer = VectorQuantize(16, 64, heads=2, codebook_dim=8, separate_codebook_per_head=own,
                               accept_image_fmap=x is images).eval()
    quantized, indices, _ = quantizer(x)
    decoded = quantizer.get_output_from_indices(indices)
    same = decoded.shape == quantized.shape and torch.allclose(decoded, quantized, atol=1e-5)
    seen.append(f"{tuple(decoded.shape)}{', as forward' if same else ''}")
print(f"own: {seen[0]}; shared: {seen[1]}; of images: {seen[2]}")
PY
[ "$(cat seen)" = "own: (3, 20, 16), as forward; shared: (3, 20, 2, 8); of images: (3, 8, 4, 5, 2)" ]
