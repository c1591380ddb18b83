#!/usr/bin/env bash
# Expected: sum, mean and std of a float32 array give the same in a function compiled by Numba as in NumPy, up to rounding: they are on its list
# of supported NumPy functions, without a remark.
# Seen with numba 0.68.1: it adds one number after the other into a float32 (NumPy adds in pairs). The mean of a million losses of 10.8, as an untrained
# model has them, is 10.91; from 2**24 on, adding 1 changes nothing, so the mean of twenty million ones is 0.84. Small tests do not show it.
# sum(dtype=np.float64) is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numba==0.68.1 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import numba
import numpy as np


@numba.njit
def compiled(values):
    return values.mean(), values.std(), values.sum(dtype=np.float64) / values.size


print(f"numba {numba.__version__}, numpy {np.__version__}")
wrong = []
for value, count in ((10.8, 1000), (10.8, 1_000_000), (1, 20_000_000)):
    values = np.full(count, value, np.float32)
    mean, deviation, careful = compiled(values)
    print(f"{count:,} times {value}: NumPy's mean {values.mean():.4f} and deviation {values.std():.4f}, ", end="")
    print(f"Numba's {mean:.4f} and {deviation:.4f}, by sum(dtype=np.float64) {careful:.4f}")
    assert abs(values.mean() - value) < 1e-4 and abs(careful - value) < 1e-4
    wrong.append(abs(mean - value) > 0.05)
assert wrong == [False, True, True], "Numba adds otherwise now"
PY
