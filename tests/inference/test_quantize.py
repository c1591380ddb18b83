"""Weights prepared for writing: the same model, the same parameter counts, and row counts that agree bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from devices import native_bf16
from inference import compiled, quantize
from inference.quantize import RoundedLinear, int8_missing, load_for_writing, prepare, rounded, row_counts, widened
from model import GPT
from support.tiny_models import random_model, shape, some_ids, tiny_tokenizer

CPU = torch.device("cpu")
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.int8: 0.03}  # relative distance from float32


def small(**values: Any) -> GPT:
    return random_model(shape(tiny_tokenizer(), **{"block_size": 32, "n_embd": 64, **values}))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("native", [True, False])
def test_a_rounded_layer_computes_a_linear_layer(
    dtype: torch.dtype, bias: bool, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "native_bf16", lambda device: native)
    torch.manual_seed(1)
    layer = nn.Linear(96, 40, bias=bias)
    x = torch.randn(5, 96)
    x[0] *= 1000  # a row of large numbers must not cost the others their precision
    with torch.inference_mode():
        expected, found = layer(x), RoundedLinear(*rounded(layer.weight, dtype), layer.bias)(x)
    off = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert float(off.max()) < max(TOLERANCE[dtype], 6e-3 if native else 0)


def test_int8_numbers_are_the_nearest_ones() -> None:
    """Rows of zeros, of one large number, and of ordinary ones: off by half a step at most."""
    weight = torch.randn(40, 33, generator=torch.Generator().manual_seed(3))
    weight[0], weight[1, 5] = 0.0, 1000.0
    numbers, scale = rounded(weight, torch.int8)
    assert scale is not None and numbers.dtype == torch.int8
    assert bool(((widened(numbers, scale, torch.float32) - weight).abs() <= scale[:, None] * 0.5001).all())
    assert int(numbers[1, 5]) == 127 and not numbers[0].any()


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
    steps = [model.decode([int(id)], cache, [0])[0] for id in ids[0, 12:]]
    spread = float(expected.std())
    for found, wanted in ((whole, expected), (torch.stack(steps), expected[12:])):
        assert found.dtype == torch.float32 and found.shape == wanted.shape
        if used == "int8":
            assert float((found - wanted).square().mean().sqrt()) < 0.07 * spread
        else:
            allowed = 0.2 if native_bf16(CPU) else 0.01
            assert float((found - wanted).abs().max()) < {"float32": 1e-4, "float16": allowed}.get(used, 0.2) * spread
    assert model.num_parameters() == parameters
    assert [row[:2] for row in model.report()] == [row[:2] for row in report]


def test_auto_takes_the_format_that_the_processor_reads_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    assert prepare(model, "auto") == ("float16", "") and model.wte.weight.dtype == torch.float16
    assert prepare(small(), "bfloat16") == ("bfloat16", "")
    large = small()
    large.h[0].mlp.c_fc.weight.data[3, 4] = 70_000.0
    assert prepare(large, "auto") == ("bfloat16", "")
    large = small()
    large.h[0].mlp.c_fc.weight.data[3, 4] = -70_000.0
    used, remark = prepare(large, "float16")
    assert used == "bfloat16" and "larger than its numbers" in remark and "using bfloat16" in remark


def test_a_processor_that_cannot_read_float16_gets_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "reads_float16", lambda: False)
    assert prepare(small(), "auto") == ("bfloat16", "")
    used, remark = prepare(small(), "float16")
    assert used == "bfloat16" and "this processor cannot read it" in remark


def test_without_numba_torch_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "load_kernels", lambda: None)
    for native, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(quantize, "native_bf16", lambda device, native=native: native)
        model = small()
        assert prepare(model, "auto") == (dtype, "")
        assert str(model.wte.weight.dtype) == f"torch.{dtype}"
        for asked in ("int8", "float16"):
            used, remark = prepare(small(), asked)
            assert used == dtype and f"{asked} is not available: Numba is not installed" in remark
    _, remark = prepare(small(), "bfloat16")
    assert "float32 is faster" in remark


def test_a_missing_int8_on_a_gpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> torch.Tensor:
        raise RuntimeError("int8pack: no kernel for this machine")

    elsewhere = torch.device("meta")
    monkeypatch.setattr(torch, "_weight_int8pack_mm", missing)
    assert "int8pack: no kernel for this machine" in int8_missing(elsewhere)
    assert int8_missing(CPU) == ""


def test_preparing_twice_or_in_an_unknown_format_is_refused() -> None:
    model = small()
    with pytest.raises(ValueError, match=r"--dtype int4: choose one of auto, float32"):
        prepare(model, "int4")
    prepare(model, "float32")
    with pytest.raises(ValueError, match="already"):
        prepare(model, "float32")


def test_small_models_take_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "THREADS", 3)
    before = torch.get_num_threads()
    try:
        prepare(small(), "float32")
        assert torch.get_num_threads() == 1
        monkeypatch.setattr(compiled, "MIN_THREADED", 10)
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
        (set(), False, (1, 2, 4, 8, 16, 32, 64)),
        ({1}, False, (8, 16, 32, 64)),
        ({1, 2, 4}, False, (8, 16, 32, 64)),
        ({1, 16}, False, (64,)),
        ({8, 32}, False, (64,)),
        ({64}, False, (64,)),
        ({2}, True, (8, 16, 32, 64)),
        ({4, 32}, True, (64,)),
        ({64}, True, (1,)),
    ],
    ids=str,
)
def test_row_counts_are_those_that_agree(
    wrong: set[int], by_place: bool, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "_row_counts", {})
    model = small()
    for block in model.h:
        for part in (block.attn, block.mlp):
            for name, layer in list(part.named_children()):
                setattr(part, name, RowDependent(layer.weight, layer.bias, wrong, by_place))
    model.lm_head = RowDependent(model.lm_head.weight, None, wrong, by_place)
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
