#!/usr/bin/env bash
# torch 2.13.0: sequences of different lengths in one jagged tensor have attention on a CPU, but not a causal
# one.
# Seen on 2026-11-29, Python 3.11, CPU build.
#
# A jagged nested tensor holds a batch of sequences without padding. scaled_dot_product_attention takes it.
# Expected with is_causal=True on a CPU: slow but right, as without it: the math kernel takes any input.
# Seen: RuntimeError "No viable backend", since the math kernel, the only one for a CPU, refuses nested
# tensors with is_causal. So a GPT on packed text, which is causal, cannot be tried on a CPU this way.
# Output: is_causal=False: as one by one; is_causal=True: RuntimeError, No viable backend
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 numpy
cd "$place"
"$place/venv/bin/python" - 2>/dev/null <<'PY' | tee seen
import torch
import torch.nn.functional as F

torch.manual_seed(0)
sequences = [torch.randn(length, 2, 16) for length in (5, 9, 3)]
jagged = torch.nested.nested_tensor(sequences, layout=torch.jagged).transpose(1, 2)  # (3, 2, length, 16)
results = []
for causal in (False, True):
    alone = [F.scaled_dot_product_attention(*[x.transpose(0, 1)] * 3, is_causal=causal) for x in sequences]
    try:
        together = F.scaled_dot_product_attention(jagged, jagged, jagged, is_causal=causal).transpose(1, 2)
        pairs = zip(together.unbind(), alone)
        same = all(torch.allclose(a.transpose(0, 1), b, atol=1e-5) for a, b in pairs)
        results.append("as one by one" if same else "not as one by one")
    except RuntimeError as error:
        results.append(f"RuntimeError, {str(error)[:17]}")
print(f"is_causal=False: {results[0]}; is_causal=True: {results[1]}")
PY
[ "$(cat seen)" = "is_causal=False: as one by one; is_causal=True: RuntimeError, No viable backend" ]
