#!/usr/bin/env bash
# Expected: a row's result does not depend on the other rows of its batch. In float32 it does not; and quantize_dynamic of onnxruntime, so its documentation,
# only computes the activations' scale anew for each run.
# Seen with onnxruntime 1.32.0: one scale is shared by the whole batch, so a row with large values takes the precision of the others. A language model quantized so
# can give a writer other words when somebody else writes at the same time, and other logits for a prompt read at once than token by token.
# A scale for each row avoids it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - "$folder" 2>/dev/null <<'PY'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic

folder = sys.argv[1]
random = np.random.default_rng(0)
weight = numpy_helper.from_array(random.normal(size=(64, 16)).astype(np.float32), "weight")
graph = helper.make_graph(
    [helper.make_node("MatMul", ["rows", "weight"], ["out"])],
    "layer",
    [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["n", 64])],
    [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 16])],
    [weight],
)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), f"{folder}/float.onnx")
quantize_dynamic(f"{folder}/float.onnx", f"{folder}/int8.onnx")
mine = random.normal(size=(1, 64)).astype(np.float32)
batch = np.concatenate([mine, 20 * random.normal(size=(1, 64)).astype(np.float32)])
print(f"onnxruntime {onnxruntime.__version__}: the same row alone and beside another, twenty times as large")
differences = {}
for name in ("float", "int8"):
    run = onnxruntime.InferenceSession(f"{folder}/{name}.onnx", providers=["CPUExecutionProvider"]).run
    alone, beside = run(None, {"rows": mine})[0][0], run(None, {"rows": batch})[0][0]
    differences[name] = float(np.abs(alone - beside).max() / np.abs(alone).max())
    print(f"{name}: the results differ by {differences[name]:.2%} of the largest")
if differences["float"] > 1e-5 or differences["int8"] < 0.01:
    print("rows of a batch are quantized otherwise now")
    sys.exit(1)
PY
