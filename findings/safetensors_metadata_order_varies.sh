#!/usr/bin/env bash
# Expected: the same tensors and the same metadata give the same bytes, so that the sha256 of a model file tells whether the model changed.
# Seen with safetensors 0.8.0: with two or more keys of metadata their order in the header differs from call to call, within one process
# too. With one key (as {"format": "pt"}) the bytes are equal; a second fact has to go into another file, or into the first one's value.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy as np
import safetensors
from safetensors.numpy import save

tensors = {"weight": np.zeros(2, np.float32)}
one = {save(tensors, metadata={"format": "pt"}) for _ in range(100)}
three = {save(tensors, metadata={"format": "pt", "step": "100", "seed": "1"}) for _ in range(100)}
print(f"safetensors {safetensors.__version__}, 100 saves: {len(one)} file with one key, {len(three)} different files with three keys")
for data in sorted(three)[:2]:
    print(data[8 : data.index(b"}") + 1].decode())
assert len(one) == 1, "one key is not stable either"
assert len(three) > 1, "the order of the keys is fixed now"
PY
