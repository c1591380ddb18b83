"""A model's weights in the form that this machine multiplies fastest, for writing; training never sees it.

    >>> model, tokenizer = load_model("runs/sample/best")
    >>> dtype, note = prepare(model, "auto")         # in place; float32, bfloat16, float16 or int8
    >>> row_counts(model)                            # (2, 4, 6, 8, 12, 16)

Writing one token multiplies every weight by a single row, so the time goes into reading the weights: int8 reads a
quarter of float32, and eight rows at once cost hardly more than one. Libraries that are made for large matrices lose
that: MKL's float32 product takes 2.6 times as long for 8 rows as for one (124M parameters, 2 cores of a Xeon 6248:
25 and 65 ms), oneDNN with the weights laid out beforehand 29 and 33 ms; FBGEMM with weights in float16 and sums in
float32 16 and 21 ms, in int8 9 and 12 ms. Without VNNI (an EPYC with AVX2) FBGEMM's int8 still takes 0.6 of its float16.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from devices import native_bf16
from model import GPT, Block

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")
WORTH_PACKING = 1 << 19  # numbers in a weight; below, oneDNN's 45 microseconds a call cost more than they save
WORTH_HALVING = 1 << 23  # numbers in all weights; smaller models fit the cache, and reading them costs little
WORTH_THREADS = 1 << 23  # numbers in all weights; below, waiting for other threads costs what they save, or far more
THREADS = torch.get_num_threads()
TINY = 1e-30  # keeps a row of zeros from dividing by zero
ROUNDED = 1 << 18  # bfloat16 results to compare: rounding hides all but some 3 in 100,000 of the differences
CPU_COUNTS = (
    (1, 2, 4, 6, 8, 12, 16),
    (2, 4, 6, 8, 12, 16),
    (3, 4, 6, 8, 12, 16),
    (2, 4, 8),
    (4, 8, 16),
    (4, 8),
    (8,),
    (1,),
)
GPU_COUNTS = ((1, 2, 4, 8, 16, 32, 64), (8, 16, 32, 64), (64,), (1,))
_counts: dict[Any, tuple[int, ...]] = {}


class PackedLinear(nn.Module):
    """A linear layer with its weight [N, K] in oneDNN's own layout for few rows; float32 or bfloat16, CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.bias = bias
        self.pack = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 8)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]"""
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise.default(x, self.pack, self.bias, "none", [], ""))


class HalfLinear(nn.Module):
    """A linear layer with its weight kept in float16 and multiplied in float32 (FBGEMM, CPU).

    Half the memory to read, 11 bits of each weight: four more than bfloat16 keeps. A row's result does not depend on
    how many rows there are.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.bias = bias
        self.pack = torch.ops.quantized.linear_prepack_fp16(weight.detach().float().contiguous(), bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] float32 -> [..., N] float32"""
        return cast(Tensor, torch.ops.quantized.linear_dynamic_fp16.default(x, self.pack))


class Int8Linear(nn.Module):
    """A linear layer in whole numbers: int8 weights scaled by output channel, activations rounded to 8 bits by row.

    The products are summed exactly, so a row's result cannot depend on the rows beside it. About 1% (root mean
    square) away from float32 on normally distributed numbers. Without VNNI, FBGEMM sums two neighbouring products in
    16 bits: there each pair of weights is kept within 128, as 128 x 255 still fits; about 1.3% away.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.bias = bias
        size = weight.detach().abs()
        largest = size.amax(1)
        if not has_vnni():
            pairs = F.pad(size, (0, size.size(1) % 2)).unflatten(1, (-1, 2)).sum(2)  # [N, K/2]
            largest = torch.maximum(largest, pairs.amax(1))
        scale = largest.clamp_min(TINY).double() / 127  # two that round up make 128
        zero = torch.zeros(len(scale), dtype=torch.int64)
        engine = torch.backends.quantized.engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces another API for 8-bit tensors
            torch.backends.quantized.engine = "fbgemm"
            try:
                rounded = torch.quantize_per_channel(weight.detach().float(), scale, zero, 0, torch.qint8)
                self.pack = torch.ops.quantized.linear_prepack(rounded, None)
            finally:
                torch.backends.quantized.engine = engine

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] float32 -> [..., N] float32"""
        size = x.abs().amax(-1, keepdim=True).clamp_min_(TINY)
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default(x / size, 1 / 127, 128, self.pack)
        return y.mul_(size) if self.bias is None else torch.addcmul(self.bias, y, size)


class WeightOnlyInt8(nn.Module):
    """A linear layer with int8 weights scaled by output channel and bfloat16 activations; about 0.8% off float32.

    torch's kernel is made for few rows. Beyond 16 (reading a prompt) the weights are widened for one product.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.bias = bias
        scale = weight.detach().abs().amax(1).clamp_min(TINY).float() / 127
        self.rounded = (weight.detach().float() / scale[:, None]).round().to(torch.int8)
        self.scale = scale.bfloat16()
        self.wide = torch.bfloat16 if native_bf16(weight.device) else torch.float32

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] float32 -> [..., N] float32"""
        flat = x.reshape(-1, x.size(-1))
        if len(flat) <= 16:
            y = torch._weight_int8pack_mm(flat.bfloat16(), self.rounded, self.scale)
        else:
            y = F.linear(flat.to(self.wide), self.rounded.to(self.wide) * self.scale.to(self.wide)[:, None])
        y = y.float().view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def has_vnni() -> bool:
    """Whether the processor sums four 8-bit products in 32 bits."""
    return bool(getattr(torch.cpu, "_is_vnni_supported", lambda: False)())


def int8_kind(device: torch.device) -> tuple[type[nn.Module] | None, str]:
    """(layer that works in int8 on this device, "") or (None, why there is none)."""
    kinds: list[type[nn.Module]] = [WeightOnlyInt8]
    if device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines:
        kinds.insert(0, Int8Linear)
    reason = ""
    for kind in kinds:
        weight = torch.linspace(-1, 1, 64 * 64, device=device).view(64, 64)
        try:
            with torch.inference_mode():
                off = kind(weight, None)(weight[-2:]) - weight[-2:] @ weight.t()  # near 1: the largest sums
            if off.abs().max() < 0.5:
                return kind, ""
            reason = f"{kind.__name__} computes wrongly on this {device.type}"
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            reason = f"{str(error).splitlines()[0]} ({kind.__name__} on {device.type}, torch {torch.__version__})"
    return None, reason


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN lays out weights of this type here."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    weight = torch.linspace(-1, 1, 32 * 32).view(32, 32).to(dtype)
    try:
        with torch.inference_mode():
            off = PackedLinear(weight, None)(weight[:2]) - F.linear(weight[:2], weight)
        return bool(off.abs().max() < 0.2)
    except (RuntimeError, NotImplementedError, AttributeError):
        return False


def can_halve(device: torch.device) -> bool:
    """Whether FBGEMM multiplies by float16 weights here, and gives a row the same result alone and among others."""
    if device.type != "cpu" or "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    weight = torch.linspace(-1, 1, 64 * 64).view(64, 64)
    try:
        with torch.inference_mode():
            layer = HalfLinear(weight, None)
            off = layer(weight[:2]) - F.linear(weight[:2], weight)
        return bool(off.abs().max() < 0.02)
    except (RuntimeError, NotImplementedError, AttributeError):
        return False


def prepare(model: GPT, dtype: str = "auto") -> tuple[str, str]:
    """Bring a model into the form it writes fastest in, in place: it can no longer be trained or saved.

    dtype: float32, bfloat16, float16 (on a CPU the weights alone), int8, or auto: bfloat16 where the processor
    multiplies it natively, else float16 where a CPU has it and the model is large enough to gain, else float32.
    A small model is given one thread (of the whole process, `torch.set_num_threads`): two are no faster on an idle
    machine, and 25 times slower where something else keeps the second core busy.
    Returns (dtype used, remark for the user or ""). Where int8 is impossible the remark says why, and auto is used.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    if model.__dict__.get("prepared"):
        raise ValueError("this model has been prepared for writing already: load it again for another dtype")
    model.__dict__["prepared"] = dtype
    device, remark, kind = model.wte.weight.device, "", None
    if dtype == "int8":
        kind, reason = int8_kind(device)
        if kind is None:
            remark, dtype = f"int8 is not available: {reason}; ", "auto"
    if dtype == "auto":
        large = model.num_parameters() >= WORTH_HALVING
        dtype = "bfloat16" if native_bf16(device) else "float16" if large and can_halve(device) else "float32"
        remark = remark and f"{remark}using {dtype}"
    elif dtype == "bfloat16" and not native_bf16(device):
        remark = f"this {device.type} has no bfloat16 instructions: float32 is faster here"
    if dtype == "float16" and device.type == "cpu":
        if can_halve(device):
            kind = HalfLinear
        else:
            remark, dtype = "this processor cannot keep weights in float16; using float32", "float32"
    elif dtype in ("bfloat16", "float16"):
        model.to(getattr(torch, dtype))
    if kind is None and can_pack(device, model.wte.weight.dtype):
        kind = PackedLinear
    model.eval()
    torch.set_num_threads(1 if model.num_parameters() < WORTH_THREADS else THREADS)
    if kind is not None:
        _replace(model, kind)
    return dtype, remark


@torch.no_grad()
def _replace(model: GPT, kind: Callable[[Tensor, Tensor | None], nn.Module]) -> None:
    """Every linear layer as `kind`. Their weights remain as shapes only, so that parameters can still be counted."""

    def replaced(weight: Tensor, bias: Tensor | None, counted: bool = True) -> nn.Module:
        layer = kind(weight, bias)
        if counted:
            stored = weight.dtype if kind is PackedLinear else torch.float16 if kind is HalfLinear else torch.int8
            layer.weight = nn.Parameter(torch.empty_like(weight, dtype=stored, device="meta"), requires_grad=False)
        return layer

    for block in cast(Sequence[Block], model.h):
        for part in (block.attn, block.mlp):
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Linear) and (kind is not PackedLinear or layer.weight.numel() >= WORTH_PACKING):
                    setattr(part, name, replaced(layer.weight, layer.bias))
    head = cast(Tensor, model.lm_head.weight)[: model.config.tokens]
    if kind is not PackedLinear or head.numel() >= WORTH_PACKING:
        model.lm_head = replaced(head, None, counted=not model.config.tied_head)


@torch.inference_mode()
def row_counts(model: GPT) -> tuple[int, ...]:
    """Numbers of rows in which this model may decode so that a row's result never depends on how many there are.

    One seed must give one text, alone or beside others, bit for bit; but a matrix product may sum in another order for
    another number of rows. So a batch is cut into pieces of at most the largest of these counts, and each piece is
    padded to the next of them. Which counts agree is found by trying: a block's layers on the same rows, all counts,
    in both orders; many times over where rounding to bfloat16 hides most differences. oneDNN agrees from 2 rows on at
    least (one row may be another kernel), FBGEMM's float16 always with AVX-512 and from 3 rows on with AVX2, a plain
    float32 nn.Linear for 2 to 8 or 4 to 8, depending on the threads. At worst each row goes alone.
    """
    device, config = model.wte.weight.device, model.config
    block = cast(Block, model.h[0])
    layers = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj, model.lm_head)
    key = (device, model.wte.weight.dtype, tuple(map(type, layers)), torch.get_num_threads(), config)
    if key in _counts:
        return _counts[key]
    parts: list[tuple[int, Callable[[Tensor], Tensor]]] = [
        (3 * config.n_embd, lambda x: cast(Tensor, block.attn.c_attn(block.ln_1(x)))),
        (config.n_embd, block.attn.c_proj),
        (config.n_embd, lambda x: cast(Tensor, block.mlp(block.ln_2(x)))),
        (config.tokens, lambda x: model._logits(model.ln_f(x))),
    ]
    candidates = GPU_COUNTS if device.type != "cpu" else CPU_COUNTS
    most = max(max(counts) for counts in candidates)
    rounded = model.wte.weight.dtype != torch.float32 or WeightOnlyInt8 in map(type, layers)
    generator = torch.Generator().manual_seed(0)
    tried = []
    for width, _ in parts:
        times = math.ceil((ROUNDED if rounded else 1) / (most * width))
        tried.append(torch.randn(times, most, config.n_embd, generator=generator).to(model.wte.weight))
    done: dict[tuple[int, int, bool], Tensor] = {}

    def rows(part: int, count: int, turned: bool = False) -> Tensor:
        """The part's results [times, count, width] for the first `count` rows of each trial, given in either order."""
        if (part, count, turned) not in done:
            order = slice(None) if not turned else torch.arange(count - 1, -1, -1)
            made = [parts[part][1](x[:count][order].contiguous())[order] for x in tried[part]]
            done[part, count, turned] = torch.stack(made)
        return done[part, count, turned]

    def agree(counts: tuple[int, ...]) -> bool:
        return all(
            torch.equal(rows(part, count, turned), rows(part, counts[-1])[:, :count])
            for part in range(len(parts))
            for count in counts
            for turned in ((False, True) if count > 1 else (False,))
        )

    _counts[key] = next(counts for counts in candidates if agree(counts))
    return _counts[key]


def load_for_writing(folder: Any, *, device: str = "auto", dtype: str = "auto") -> tuple[GPT, Any, str]:
    """(model, tokenizer, remark) of a model folder, prepared as `prepare` does on the device `pick_device` finds."""
    from checkpoint import load_model
    from devices import pick_device

    model, tokenizer = load_model(folder, device=pick_device(device))
    return model, tokenizer, prepare(model, dtype)[1]
