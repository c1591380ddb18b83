"""Weights prepared for writing: the same model, the same parameter counts, and row counts that agree bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from inference import quantize
from inference.quantize import (
    Float16Linear,
    Int8Linear,
    PackedLinear,
    WeightOnlyInt8,
    float16_works,
    int8_layer,
    load_for_writing,
    prepare,
    row_counts,
)
from model import GPT
from support.tiny_models import random_model, shape, some_ids, tiny_tokenizer

CPU = torch.device("cpu")
LAYERS = [PackedLinear, WeightOnlyInt8]
if "fbgemm" in torch.backends.quantized.supported_engines:
    LAYERS.append(Int8Linear)
if float16_works(CPU):
    LAYERS.append(Float16Linear)
TOLERANCE = {PackedLinear: 1e-6, Float16Linear: 1e-3}  # relative distance from float32


@pytest.fixture(autouse=True)
def pack_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny weights are packed too, and what was found about one test's model is forgotten before the next."""
    monkeypatch.setattr(quantize, "MIN_PACKED", 0)
    monkeypatch.setattr(quantize, "_row_counts", {})


def small(**values: Any) -> GPT:
    return random_model(shape(tiny_tokenizer(), **{"block_size": 32, "n_embd": 64, **values}))


@pytest.mark.parametrize("layer_type", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 16, 17])
def test_each_layer_type_computes_a_linear_layer(layer_type: Any, bias: bool, rows: int) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(96, 40, bias=bias)
    x = torch.randn(rows, 96)
    x[0] *= 1000  # a row of large numbers must not cost the others their precision
    with torch.inference_mode():
        expected, found = layer(x), layer_type(layer.weight, layer.bias)(x)
    off = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert float(off.max()) < TOLERANCE.get(layer_type, 0.03)
    if layer_type is Int8Linear:
        with torch.inference_mode():
            of_zeros = layer_type(layer.weight, layer.bias)(torch.zeros(2, 96))
        assert torch.equal(of_zeros, torch.zeros(2, 40) if layer.bias is None else layer.bias.expand(2, 40))


@pytest.mark.skipif(Int8Linear not in LAYERS, reason="no FBGEMM on this machine")
@pytest.mark.parametrize("inside", [96, 97, 3072])
def test_int8_sums_do_not_saturate(inside: int) -> None:
    """Activations at their limits, and weights of which neighbours are large together: the sums of the rounded numbers."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(64, inside, generator=generator)
    weight[:8] = 1.0
    weight[8:16, ::2] = 0.01
    weight[16:24, 1::2] = -weight[16:24, : inside - 1 : 2]
    x = torch.randn(8, inside, generator=generator).sign()
    x[0], x[1] = 1.0, -1.0
    x[2:4] = weight[[20, 40]].sign()
    assert int8_layer(CPU) == (Int8Linear, "")
    layer = Int8Linear(weight, None)
    rounded = torch.ops.quantized.linear_unpack(layer.packed)[0].dequantize()
    with torch.inference_mode():
        found, expected = layer(x), x.double() @ rounded.double().t()
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-4)
    assert float((rounded - weight).norm() / weight.norm()) < 0.015


@pytest.mark.parametrize(
    "form", [{}, {"tied_head": False}, {"bias": False}, {"positions": "sinusoidal"}, {"padding": 9}]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_a_prepared_model_computes_the_same(form: dict[str, Any], dtype: str) -> None:
    model = small(**form)
    ids = some_ids(model.config)[:1, :20]
    with torch.inference_mode():
        expected = model(ids)[0]
    parameters, report = model.num_parameters(), model.report()
    used, _ = prepare(model, dtype)
    with torch.inference_mode():
        whole = model(ids)[0]
    cache = model.new_cache(1)
    model.prefill(ids[0, :12].tolist(), cache, 0)
    steps = [model.decode([int(id)], cache, [0], 4)[0] for id in ids[0, 12:]]
    spread = float(expected.std())
    for found, wanted in ((whole, expected), (torch.stack(steps), expected[12:])):
        assert found.dtype == torch.float32 and found.shape == wanted.shape
        if used == "int8":
            assert float((found - wanted).square().mean().sqrt()) < 0.07 * spread
        else:
            assert float((found - wanted).abs().max()) < {"float32": 1e-4, "float16": 0.01}.get(used, 0.2) * spread
    assert model.num_parameters() == parameters
    assert [row[:2] for row in model.report()] == [row[:2] for row in report]


def test_auto_takes_the_format_that_the_processor_multiplies_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(quantize, "native_bf16", lambda device, native=native: native)
        model = small()
        assert prepare(model, "auto") == (dtype, "")
        assert str(model.wte.weight.dtype) == f"torch.{dtype}"
    _, remark = prepare(small(), "bfloat16")
    assert "float32 is faster" in remark
    monkeypatch.setattr(quantize, "MIN_FLOAT16", 0)
    assert prepare(small(), "auto") == ("float16" if float16_works(CPU) else "float32", "")
    monkeypatch.setattr(quantize, "float16_works", lambda device: False)
    assert prepare(small(), "auto") == ("float32", "")
    used, remark = prepare(small(), "float16")
    assert used == "float32" and "cannot keep weights in float16" in remark


def test_a_missing_int8_says_why_and_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> torch.Tensor:
        raise RuntimeError("int8pack: no kernel for this machine")

    monkeypatch.setattr(torch, "_weight_int8pack_mm", missing)
    monkeypatch.setattr(quantize, "Int8Linear", missing)
    layer_type, reason = int8_layer(CPU)
    assert layer_type is None and "no kernel for this machine" in reason
    model = small()
    used, remark = prepare(model, "int8")
    assert used in ("float32", "bfloat16")
    assert "int8 is not available: int8pack: no kernel for this machine" in remark and f"using {used}" in remark
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda x, w, s: torch.zeros(len(x), len(w)))
    assert "computes wrongly" in int8_layer(CPU)[1]


def test_preparing_twice_or_in_an_unknown_format_is_refused() -> None:
    model = small()
    with pytest.raises(ValueError, match=r"--dtype int4: choose one of auto, float32"):
        prepare(model, "int4")
    prepare(model, "float32")
    with pytest.raises(ValueError, match="already"):
        prepare(model, "float32")


def test_small_weights_stay_as_they_are_and_small_models_take_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "MIN_PACKED", 280 * 64)
    monkeypatch.setattr(quantize, "THREADS", 3)
    before = torch.get_num_threads()
    try:
        model = small()
        prepare(model, "float32")
        assert torch.get_num_threads() == 1
        assert isinstance(model.lm_head, PackedLinear) and isinstance(model.h[0].mlp.c_fc, nn.Linear)
        monkeypatch.setattr(quantize, "MIN_THREADED", 10)
        prepare(small(), "float32")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


class RowDependent(nn.Module):
    """A linear layer whose last bits depend on the number of rows, or on a row's place."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, wrong: set[int], by_place: bool):
        super().__init__()
        self.register_buffer("held", weight.detach().clone())
        self.bias, self.wrong, self.by_place = bias, wrong, by_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([nn.functional.linear(row[None], self.held, self.bias) for row in x])
        if len(x) in self.wrong:
            y[(-1 if self.by_place else slice(None))] *= 1 + len(x) * 1e-6
        return y


@pytest.mark.parametrize(
    ("wrong", "by_place", "expected"),
    [
        (set(), False, (1, 2, 4, 6, 8, 12, 16)),
        ({1}, False, (2, 4, 6, 8, 12, 16)),
        ({1, 2}, False, (3, 4, 6, 8, 12, 16)),
        ({1, 2, 3, 6}, False, (4, 8, 16)),
        ({6, 12}, False, (2, 4, 8)),
        ({16}, False, (2, 4, 8)),
        ({2, 16}, False, (4, 8)),
        ({2, 4, 16}, False, (8,)),
        ({2, 4, 8, 16}, False, (8,)),
        ({16}, True, (2, 4, 8)),
        ({2}, True, (3, 4, 6, 8, 12, 16)),
        ({4, 16}, True, (8,)),
        ({8}, True, (1,)),
    ],
)
def test_row_counts_are_those_that_agree(wrong: set[int], by_place: bool, expected: tuple[int, ...]) -> None:
    model = small()
    quantize.replace_linears(model, lambda weight, bias: RowDependent(weight, bias, wrong, by_place))
    found = row_counts(model)
    assert found == expected
    assert row_counts(model) is found  # from the cache


def test_loading_for_writing(tmp_path: Any) -> None:
    from support.tiny_models import save

    model, tokenizer = small(), tiny_tokenizer()
    save(tmp_path / "m", model, tokenizer)
    loaded, other, remark = load_for_writing(tmp_path / "m", device="cpu", dtype="float32")
    ids = some_ids(model.config)[:, :9]
    with torch.inference_mode():
        assert torch.allclose(loaded(ids), model(ids), atol=1e-4)
    assert other.fingerprint == tokenizer.fingerprint and remark == ""
