#!/usr/bin/env bash
# Expected: safetensors.numpy.save asks for contiguous arrays, so it refuses a transposed one, as safetensors.torch does, or copies it,
# as safetensors 0.7.0 did. GPT-2's Conv1D layout is the transpose of Linear's, so a converter has such views at hand.
# Seen with safetensors 0.8.0: it writes the memory as it lies under the shape of the view. No error, and the file loads: every
# matrix in it is scrambled (safetensors issue 825). numpy.ascontiguousarray before saving helps.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 0.7.0 0.8.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "safetensors==$version" "numpy==2.4.6"
done
cat > "$folder/show.py" <<'PY'
import numpy as np
import safetensors
from safetensors.numpy import load, save

weight = np.arange(6, dtype=np.float32).reshape(2, 3)
loaded = load(save({"weight": weight.T}))["weight"]
copied = load(save({"weight": np.ascontiguousarray(weight.T)}))["weight"]
print(f"safetensors {safetensors.__version__}: saved {weight.T.tolist()}, loaded {loaded.tolist()}")
right = np.array_equal(loaded, weight.T)
assert np.array_equal(copied, weight.T)
assert right == (safetensors.__version__ == "0.7.0"), "the transposed array is saved otherwise now"
PY
"$folder/0.7.0/bin/python" "$folder/show.py"
"$folder/0.8.0/bin/python" "$folder/show.py"
