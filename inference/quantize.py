"""Quantizes and packs weights for inference on this machine; not used in training.

    >>> model, tokenizer = load_model("runs/sample/best")
    >>> dtype, remark = prepare(model, "auto")       # in place; float32, bfloat16, float16 or int8
    >>> row_counts(model)                            # (2, 4, 6, 8, 12, 16)

Writing one token multiplies every weight by a single row of numbers, so the time goes into reading the weights: int8
reads a quarter of float32, and eight rows at once cost hardly more than one. Libraries made for large matrices lose that:
MKL's float32 product takes 2.6 times as long for 8 rows as for one (124M parameters, 2 cores of a Xeon 6248: 25 and
65 ms), oneDNN with the weights laid out beforehand 29 and 33 ms; FBGEMM with weights in float16 and sums in float32 16
and 21 ms, in int8 9 and 12 ms. Without VNNI (an EPYC with AVX2) FBGEMM's int8 still takes 0.6 of its float16.

From top to bottom: the layers that replace `nn.Linear`; which of them work on this machine; `prepare`, which chooses
one and puts it in place; `row_counts`, the numbers of rows that keep one seed at one text.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from checkpoint import load_model
from devices import native_bf16, pick_device
from model import GPT, Block
from tokenizer import Tokenizer

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")
MIN_PACKED = 1 << 19  # numbers in a weight; below, oneDNN's 45 microseconds a call cost more than they save
MIN_FLOAT16 = 1 << 23  # numbers in all weights; smaller models fit the processor's cache and gain nothing from float16
MIN_THREADED = 1 << 23  # numbers in all weights; below, waiting for other threads costs what they save, or far more
THREADS = torch.get_num_threads()
TINY = 1e-30  # keeps a row of zeros from dividing by zero
COMPARED = 1 << 18  # results compared in a rounded format: rounding hides all but some 3 in 100,000 of the differences
CPU_ROW_COUNTS = (
    (1, 2, 4, 6, 8, 12, 16),
    (2, 4, 6, 8, 12, 16),
    (3, 4, 6, 8, 12, 16),
    (2, 4, 8),
    (4, 8, 16),
    (4, 8),
    (8,),
    (1,),
)
GPU_ROW_COUNTS = ((1, 2, 4, 8, 16, 32, 64), (8, 16, 32, 64), (64,), (1,))
_row_counts: dict[Any, tuple[int, ...]] = {}  # what was found, by everything it depends on

LayerType = Callable[[Tensor, Tensor | None], nn.Module]  # (weight [N, K], bias [N] or None) -> a linear layer


class PackedLinear(nn.Module):
    """A linear layer with its weight [N, K] in oneDNN's own layout for few rows; float32 or bfloat16, CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.bias = bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 8)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]"""
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "none", [], ""))


class Float16Linear(nn.Module):
    """A linear layer with its weight kept in float16 and multiplied in float32 (FBGEMM, CPU).

    Half the memory to read, 11 bits of each weight: three more than bfloat16 keeps. A row's result does not depend on how
    many rows there are.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.bias = bias
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.detach().float().contiguous(), bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] float32 -> [..., N] float32"""
        return cast(Tensor, torch.ops.quantized.linear_dynamic_fp16.default(x, self.packed))


class Int8Linear(nn.Module):
    """int8 linear layer: weights with a scale per output channel, activations quantized dynamically per row.

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
                self.packed = torch.ops.quantized.linear_prepack(rounded, None)
            finally:
                torch.backends.quantized.engine = engine

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] float32 -> [..., N] float32"""
        size = x.abs().amax(-1, keepdim=True).clamp_min_(TINY)
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        y = multiply(x / size, 1 / 127, 128, self.packed)
        return y.mul_(size) if self.bias is None else torch.addcmul(self.bias, y, size)


class WeightOnlyInt8(nn.Module):
    """A linear layer with int8 weights scaled by output channel and bfloat16 activations; about 0.8% off float32.

    torch's kernel is made for few rows. Beyond 16 (a chunk of a prompt) the weights are converted back for one product.
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


def int8_layer(device: torch.device) -> tuple[type[nn.Module] | None, str]:
    """(layer type that works in int8 on this device, "") or (None, why there is none)."""
    candidates: list[type[nn.Module]] = [WeightOnlyInt8]
    if device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines:
        candidates.insert(0, Int8Linear)
    reason = ""
    for layer_type in candidates:
        weight = torch.linspace(-1, 1, 64 * 64, device=device).view(64, 64)
        try:
            with torch.inference_mode():
                off = layer_type(weight, None)(weight[-2:]) - weight[-2:] @ weight.t()  # near 1: the largest sums
            if off.abs().max() < 0.5:
                return layer_type, ""
            reason = f"{layer_type.__name__} computes wrongly on this {device.type}"
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            reason = f"{str(error).splitlines()[0]} ({layer_type.__name__} on {device.type}, torch {torch.__version__})"
    return None, reason


def packed_works(device: torch.device, dtype: torch.dtype) -> bool:
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


def float16_works(device: torch.device) -> bool:
    """Whether FBGEMM multiplies by float16 weights here."""
    if device.type != "cpu" or "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    weight = torch.linspace(-1, 1, 64 * 64).view(64, 64)
    try:
        with torch.inference_mode():
            off = Float16Linear(weight, None)(weight[:2]) - F.linear(weight[:2], weight)
        return bool(off.abs().max() < 0.02)
    except (RuntimeError, NotImplementedError, AttributeError):
        return False


def prepare(model: GPT, dtype: str = "auto") -> tuple[str, str]:
    """Bring a model into the form it writes fastest in, in place: it can no longer be trained or saved.

    dtype: float32, bfloat16, float16 (on a CPU the weights alone), int8, or auto: bfloat16 where the processor
    multiplies it natively, otherwise float16 where a CPU has it and the model is large enough to gain, otherwise float32.
    A small model is given one thread (of the whole process, `torch.set_num_threads`): two are no faster on an idle
    machine, and 25 times slower where something else keeps the second core busy.
    Returns (dtype used, remark for the user or ""). Where int8 is impossible the remark says why, and auto is used.
    Raises ValueError for an unknown dtype and for a model that has been prepared before.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    if model.__dict__.get("prepared"):
        raise ValueError("this model has been prepared for writing already: load it again for another dtype")
    model.__dict__["prepared"] = dtype
    device, remark = model.wte.weight.device, ""
    layer_type: type[nn.Module] | None = None  # None: nn.Linear as it is

    # 1. The format: the requested one, or the nearest this machine has.
    if dtype == "int8":
        layer_type, reason = int8_layer(device)
        if layer_type is None:
            remark, dtype = f"int8 is not available: {reason}; ", "auto"
    if dtype == "auto":
        large = model.num_parameters() >= MIN_FLOAT16
        dtype = "bfloat16" if native_bf16(device) else "float16" if large and float16_works(device) else "float32"
        remark = remark and f"{remark}using {dtype}"
    elif dtype == "bfloat16" and not native_bf16(device):
        remark = f"this {device.type} has no bfloat16 instructions: float32 is faster here"

    # 2. The weights in that format.
    if dtype == "float16" and device.type == "cpu":
        if float16_works(device):
            layer_type = Float16Linear
        else:
            remark, dtype = "this processor cannot keep weights in float16; using float32", "float32"
    elif dtype in ("bfloat16", "float16"):
        model.to(getattr(torch, dtype))

    # 3. The layers that multiply by them, and the threads.
    if layer_type is None and packed_works(device, model.wte.weight.dtype):
        layer_type = PackedLinear
    model.eval()
    torch.set_num_threads(1 if model.num_parameters() < MIN_THREADED else THREADS)
    if layer_type is not None:
        replace_linears(model, layer_type)
    return dtype, remark


@torch.no_grad()
def replace_linears(model: GPT, layer_type: LayerType) -> None:
    """Every linear layer as `layer_type`. The old weights remain as shapes only, so that parameters can be counted."""

    def replaced(weight: Tensor, bias: Tensor | None, counted: bool = True) -> nn.Module:
        layer = layer_type(weight, bias)
        if counted:
            stored = {PackedLinear: weight.dtype, Float16Linear: torch.float16}.get(type(layer), torch.int8)
            layer.weight = nn.Parameter(torch.empty_like(weight, dtype=stored, device="meta"), requires_grad=False)
        return layer

    smallest = MIN_PACKED if layer_type is PackedLinear else 0
    for block in cast(Sequence[Block], model.h):
        for part in (block.attn, block.mlp):
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Linear) and layer.weight.numel() >= smallest:
                    setattr(part, name, replaced(layer.weight, layer.bias))
    head = cast(Tensor, model.lm_head.weight)[: model.config.tokens]
    if head.numel() >= smallest:
        model.lm_head = replaced(head, None, counted=not model.config.tied_head)


@torch.inference_mode()
def row_counts(model: GPT) -> tuple[int, ...]:
    """Batch sizes at which decoding is batch-invariant: a row's result does not depend on the number of rows.

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
    if key in _row_counts:
        return _row_counts[key]

    # 1. What is tried: (width of the result, function of x [rows, C]) for each matrix product of a decode step.
    parts: list[tuple[int, Callable[[Tensor], Tensor]]] = [
        (3 * config.n_embd, lambda x: cast(Tensor, block.attn.c_attn(block.ln_1(x)))),
        (config.n_embd, block.attn.c_proj),
        (config.n_embd, lambda x: cast(Tensor, block.mlp(block.ln_2(x)))),
        (config.tokens, lambda x: model._logits(model.ln_f(x))),
    ]
    candidates = GPU_ROW_COUNTS if device.type != "cpu" else CPU_ROW_COUNTS
    most = max(max(counts) for counts in candidates)

    # 2. Random inputs [trials, most, C] for each part.
    rounded = model.wte.weight.dtype != torch.float32 or WeightOnlyInt8 in map(type, layers)
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for width, _ in parts:
        trials = math.ceil((COMPARED if rounded else 1) / (most * width))
        inputs.append(torch.randn(trials, most, config.n_embd, generator=generator).to(model.wte.weight))

    # 3. The first set of counts whose results agree with those of its largest.
    computed: dict[tuple[int, int, bool], Tensor] = {}

    def results(part: int, count: int, backwards: bool = False) -> Tensor:
        """The part's results [trials, count, width] for the first `count` rows, given in either order."""
        if (part, count, backwards) not in computed:
            order = slice(None) if not backwards else torch.arange(count - 1, -1, -1)
            made = [parts[part][1](x[:count][order].contiguous())[order] for x in inputs[part]]
            computed[part, count, backwards] = torch.stack(made)
        return computed[part, count, backwards]

    def agree(counts: tuple[int, ...]) -> bool:
        return all(
            torch.equal(results(part, count, backwards), results(part, counts[-1])[:, :count])
            for part in range(len(parts))
            for count in counts
            for backwards in ((False, True) if count > 1 else (False,))
        )

    _row_counts[key] = next(counts for counts in candidates if agree(counts))
    return _row_counts[key]


def load_for_writing(folder: Path | str, *, device: str = "auto", dtype: str = "auto") -> tuple[GPT, Tokenizer, str]:
    """(model, tokenizer, remark) of a model folder, prepared as `prepare` does on the device `pick_device` finds."""
    model, tokenizer = load_model(folder, device=pick_device(device))
    return model, tokenizer, prepare(model, dtype)[1]
