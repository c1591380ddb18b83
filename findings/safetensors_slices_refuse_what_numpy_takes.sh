#!/usr/bin/env bash
# Expected: safe_open(...).get_slice(name) is indexed as the NumPy array that it stands for: get_slice(name)[:] is the whole tensor, whatever its
# shape, and [-2:] its last two rows.
# Seen with safetensors 0.8.0: [:] of a tensor without rows, which save_file writes and load_file reads, raises SafetensorError; [-1] works and [-2:] raises
# OverflowError; a stop beyond the end raises. A loader that reads its part of each tensor by slices needs get_tensor for empty ones.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - "$folder/model.safetensors" <<'PY'
import sys

import numpy as np
import safetensors
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

tensors = {"rows": np.arange(6, dtype=np.float32).reshape(3, 2), "none": np.zeros((0, 2), np.float32)}
save_file(tensors, sys.argv[1])
assert load_file(sys.argv[1])["none"].shape == (0, 2)
CASES = {
    "rows[:]": lambda rows, none: rows[:],
    "rows[-1]": lambda rows, none: rows[-1],
    "rows[-2:]": lambda rows, none: rows[-2:],
    "rows[1:9]": lambda rows, none: rows[1:9],
    "none[:]": lambda rows, none: none[:],
}
print(f"safetensors {safetensors.__version__}")
found = []
with safe_open(sys.argv[1], framework="np") as file:
    for name, cut in CASES.items():
        expected = cut(tensors["rows"], tensors["none"])
        try:
            same = np.array_equal(cut(file.get_slice("rows"), file.get_slice("none")), expected)
            end = "the same as NumPy" if same else "other values than NumPy"
        except Exception as error:
            end = f"{type(error).__name__}: {error}"
        found.append(end == "the same as NumPy")
        print(f"{name} (NumPy: shape {expected.shape}): {end}")
assert found == [True, True, False, False, False], "slices are taken otherwise now"
PY
