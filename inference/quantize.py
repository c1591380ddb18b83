"""Loads and rounds weights for writing on this machine; not used in training.

    >>> model, tokenizer = load_model("runs/sample/best")
    >>> dtype, remark = prepare(model, "auto")       # in place; float32, bfloat16, float16 or int8
    >>> row_counts(model)                            # (1, 2, 4, 8, 16, 32, 64): on GPUs

Writing one token multiplies every weight by a single row of numbers, so the time goes into reading the weights: float16
reads half of float32, int8 a quarter. On CPUs `kernels` read them as they are stored here, several rows at once; the
layers below compute the same with torch, for long prompts and for whole texts, by widening one matrix at a time.

    python -m inference.quantize      # compiles the kernels for every format now, so that nobody waits for it later
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from checkpoint import load_model
from config import ModelConfig
from devices import native_bf16, pick_device
from inference import compiled
from model import GPT, Block, TiedHead
from tokenizer import Tokenizer

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")
TINY = 1e-30  # keeps a row of zeros from dividing by zero
COMPARED = 1 << 18  # results compared in a rounded format: rounding hides all but some 3 in 100,000 of the differences
GPU_ROW_COUNTS = ((1, 2, 4, 8, 16, 32, 64), (8, 16, 32, 64), (64,), (1,))
_row_counts: dict[Any, tuple[int, ...]] = {}  # what was found, by everything it depends on


class RoundedLinear(nn.Module):
    """A linear layer with its weight [N, K] stored as float16, bfloat16 or int8; sums in float32.

    int8 numbers have a scale for each output; about 0.8% (root mean square) away from float32 on normally distributed
    numbers.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None, bias: Tensor | None):
        """weight, scale: as `rounded` returns them."""
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias
        self.packed = weight.device.type != "cpu" and scale is not None
        self.scale = scale.bfloat16() if scale is not None and self.packed else scale
        self.wide = torch.bfloat16 if native_bf16(weight.device) else torch.float32

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] float32"""
        flat = x.reshape(-1, x.size(-1))
        if self.packed and len(flat) <= 16:  # torch's kernel is made for few rows
            y = torch._weight_int8pack_mm(flat.bfloat16(), self.weight, cast(Tensor, self.scale))
        else:
            y = F.linear(flat.to(self.wide), widened(self.weight, self.scale, self.wide))
        y = y.float().view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class RoundedEmbedding(nn.Module):
    """An embedding [V, C] stored as float16, bfloat16 or int8 with a scale for each id; gives float32."""

    def __init__(self, weight: Tensor, scale: Tensor | None):
        super().__init__()
        self.weight, self.scale = nn.Parameter(weight, requires_grad=False), scale

    def forward(self, ids: Tensor) -> Tensor:
        return widened(self.weight[ids], None if self.scale is None else self.scale[ids], torch.float32)


class TiedRoundedHead(nn.Module):
    """The head of a tied model: its weight is not counted, as it is the embedding's, or (on GPUs) a copy of it."""

    def __init__(self, weight: Tensor, scale: Tensor | None):
        super().__init__()
        self.__dict__["layer"] = RoundedLinear(weight, scale, None)

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.__dict__["layer"].weight)

    @property
    def scale(self) -> Tensor | None:
        return cast("Tensor | None", self.__dict__["layer"].scale)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.__dict__["layer"](x))


def rounded(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(weight [N, K] in the format `dtype`, scale [N] of int8 rows or None)"""
    weight = weight.detach()
    if dtype != torch.int8:
        return weight.to(dtype).contiguous(), None
    scale = weight.abs().amax(1).clamp_min(TINY).float() / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def widened(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Stored numbers [N, K] as `dtype`."""
    wide = weight.to(dtype)
    return wide if scale is None else wide * scale.to(dtype)[..., None]


@torch.no_grad()
def round_weights(model: GPT, dtype: torch.dtype) -> None:
    """Every matrix of the model rounded, in place; beside a GPU the embedding stays as it is."""
    for block in cast(Sequence[Block], model.h):
        for part in (block.attn, block.mlp):
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(part, name, RoundedLinear(*rounded(layer.weight, dtype), layer.bias))
    weight, scale = rounded(cast(Tensor, model.lm_head.weight), dtype)
    tied = isinstance(model.lm_head, TiedHead)
    model.lm_head = TiedRoundedHead(weight, scale) if tied else RoundedLinear(weight, scale, None)
    if weight.device.type == "cpu":
        table = (weight, scale) if tied else rounded(model.wte.weight, dtype)
        model.wte = cast(nn.Embedding, RoundedEmbedding(*table))


def int8_missing(device: torch.device) -> str:
    """Why int8 does not work on this device; empty if it does."""
    if device.type == "cpu":
        return "" if compiled.available(device) else compiled.MISSING
    weight = torch.linspace(-1, 1, 64 * 64, device=device).view(64, 64)
    try:
        with torch.inference_mode():
            layer = RoundedLinear(*rounded(weight, torch.int8), None)
            off = layer(weight[-2:]) - weight[-2:] @ weight.t()  # near 1: the largest sums
        return "" if off.abs().max() < 0.5 else f"computes wrongly on this {device.type}"
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        return f"{str(error).splitlines()[0]} (on {device.type}, torch {torch.__version__})"


def float16_missing(model: GPT) -> str:
    """Why this model's weights cannot be kept in float16 on a CPU; empty if they can."""
    if not compiled.available(model.wte.weight.device):
        return compiled.MISSING
    if not compiled.reads_float16():
        return "this processor cannot read it"
    most = torch.finfo(torch.float16).max
    fits = all(bool(parameter.detach().abs().max() <= most) for parameter in model.parameters())
    return "" if fits else "some weights are larger than its numbers"


def prepare(model: GPT, dtype: str = "auto") -> tuple[str, str]:
    """Bring a model into the form it writes fastest in, in place: it can no longer be trained or saved.

    dtype: float32, bfloat16, float16 (on a CPU the weights alone), int8, or auto: on a CPU float16, which is read in half
    the time and loses nothing that could be measured; on a GPU bfloat16 where it multiplies that natively.
    A small model is given one thread (of the whole process, `torch.set_num_threads`): two are no faster on an idle
    machine, and 25 times slower where something else keeps the second core busy.
    Returns (dtype used, remark for the user or ""). Where a format is impossible the remark says why, and auto is used.
    Raises ValueError for an unknown dtype and for a model that has been prepared before.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    if model.__dict__.get("prepared"):
        raise ValueError("this model has been prepared for writing already: load it again for another dtype")
    model.__dict__["prepared"] = dtype
    device, remark = model.wte.weight.device, ""
    kernels = compiled.available(device)

    # 1. The format: the requested one, or the nearest this machine has.
    reason = int8_missing(device) if dtype == "int8" else ""
    if dtype == "float16" and device.type == "cpu":
        reason = float16_missing(model)
    if reason:
        remark, dtype = f"{dtype} is not available: {reason}; ", "auto"
    if dtype == "auto":
        if kernels:
            dtype = "bfloat16" if float16_missing(model) else "float16"
        else:
            dtype = "bfloat16" if native_bf16(device) else "float32"
        remark = remark and f"{remark}using {dtype}"
    elif dtype == "bfloat16" and not kernels and not native_bf16(device):
        remark = f"this {device.type} has no bfloat16 instructions: float32 is faster here"

    # 2. The weights in that format, and the threads.
    model.eval()
    if dtype == "int8" or (kernels and dtype != "float32"):
        round_weights(model, getattr(torch, dtype))
    elif dtype != "float32":
        model.to(getattr(torch, dtype))
    small = model.num_parameters() < compiled.MIN_THREADED
    torch.set_num_threads(1 if small else compiled.THREADS)
    return dtype, remark


@torch.inference_mode()
def row_counts(model: GPT) -> tuple[int, ...]:
    """Batch sizes at which decoding with torch is batch-invariant: a row's result does not depend on the number of rows.

    One seed must give one text, alone or beside others, bit for bit; but a matrix product may sum in another order for
    another number of rows. So a batch is cut into pieces of at most the largest of these counts, and each piece is
    padded to the next of them. Which counts agree is found by trying: a block's layers on the same rows, all counts,
    in both orders; many times over where rounding to bfloat16 hides most differences. At worst each row goes alone.
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
    most = max(max(counts) for counts in GPU_ROW_COUNTS)

    # 2. Random inputs [trials, most, C] for each part.
    inexact = model.wte.weight.dtype != torch.float32 or RoundedLinear in map(type, layers)
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for width, _ in parts:
        trials = math.ceil((COMPARED if inexact else 1) / (most * width))
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

    _row_counts[key] = next(counts for counts in GPU_ROW_COUNTS if agree(counts))
    return _row_counts[key]


def load_for_writing(folder: Path | str, *, device: str = "auto", dtype: str = "auto") -> tuple[GPT, Tokenizer, str]:
    """(model, tokenizer, remark) of a model folder, prepared as `prepare` does on the device `pick_device` finds."""
    model, tokenizer = load_model(folder, device=pick_device(device))
    return model, tokenizer, prepare(model, dtype)[1]


def compile_all() -> None:
    """Compile the kernels for every format, so that the code is on disk when a model is first used."""
    for dtype in DTYPES:  # what is mostly used comes first
        model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=8, vocab_used=8))
        prepare(model, dtype)
        compiled.CompiledStep.of(model)


if __name__ == "__main__":
    from cli import help_alone

    help_alone(compile_all.__doc__)
    compile_all()
