"""The training loss: cross-entropy of a linear head in chunks, so that the logits of a whole batch are never materialized;
of all ids, or of some that are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

IGNORE = -1  # targets with this value are ignored
SAMPLED_ROWS = 512  # positions that share the ids of a sampled softmax


@dataclass(frozen=True)
class Candidates:
    """The K ids that a sampled softmax computes for some positions: their targets, and others drawn at random."""

    ids: Tensor
    """int64 [K], ascending."""
    inclusion: Tensor
    """Probability with which each was drawn, float32 [K]; 1 for targets."""
    targets: Tensor
    """Place of each position's target in `ids`, int64 [m]."""
    soft: Tensor | None
    """The distribution beside the targets, estimated from the ids drawn: float32 [m, K], rows sum to 1. None: without."""


class SoftTargets(Protocol):
    """Targets that are a distribution over all ids, in part: see training/ngram_teacher.py."""

    weight: float
    """Share of the distribution, 0 to 1; the rest is the usual one-hot target."""
    sampled: int
    """Ids that a chunk's softmax computes, about; 0: all of them."""

    def candidates(self, start: int, stop: int) -> Candidates:
        """The ids that are computed for positions start .. stop-1, if `sampled`."""

    def subtract(self, probs: Tensor, start: int) -> None:
        """Take weight times the distribution of positions start .. start+m-1 off `probs` [m, N], in place."""


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of `x @ weight.T` without ever holding all logits.

    Rows are taken in chunks; each chunk's gradients are formed while its logits are at hand, so nothing is computed
    twice and the peak is one chunk of float32 logits instead of B*T*V. Gradients are kept unscaled and multiplied by
    the incoming gradient in backward: that keeps fp16 with a loss scaler as exact as the plain form.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        used: int,
        dtype: torch.dtype,
        chunk: int,
        soft: SoftTargets | None = None,
    ) -> Tensor:
        """x [M, C], weight [V, C], targets [M]; `used` is N. Returns the summed loss, float32.

        soft: the gradients are those of the cross-entropy against soft targets. The sum returned is that of the targets
        themselves in any case, so that losses of all steps compare.
        """
        train = any(ctx.needs_input_grad[:2])
        rows = weight if weight.is_cuda else weight[:used]  # GPUs want the aligned matrix, CPUs the smaller one
        x_lowp, weight_lowp = x.to(dtype), rows.to(dtype)
        total = torch.zeros((), device=x.device, dtype=torch.float32)
        grad_x = torch.empty_like(x_lowp) if train else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if train else None
        # checked on CPUs only: reading the result from a GPU would stall every step, and would split a compiled graph
        look = x.device.type == "cpu" and not torch.compiler.is_compiling()
        none_ignored = look and bool((targets != IGNORE).all())
        buffer = torch.empty(min(chunk, x.size(0)), weight_lowp.size(0), dtype=dtype, device=x.device)
        for start in range(0, x.size(0), chunk):
            x_chunk, target = x_lowp[start : start + chunk], targets[start : start + chunk]
            logits = torch.mm(x_chunk, weight_lowp.t(), out=buffer[: len(x_chunk)])[:, :used]  # [chunk, N]
            index = target.clamp(min=0)[:, None]
            max_logit, target_logit = logits.amax(-1).float(), logits.gather(1, index)[:, 0].float()
            probs = logits.softmax(dim=-1, dtype=torch.float32)
            # -log softmax(target) = max + log(sum exp(logit - max)) - target, and that sum is 1 / the largest probability
            losses = max_logit - probs.amax(-1).log() - target_logit
            total += losses.sum() if none_ignored else losses.masked_fill(target == IGNORE, 0.0).sum()
            if grad_x is None or grad_weight is None:
                continue
            # the gradient of cross-entropy by its logits: probabilities minus targets, in place of `probs`
            one_hot = 1.0 - soft.weight if soft is not None else 1.0
            probs.scatter_add_(1, index, torch.full_like(probs[:, :1], -one_hot))
            if soft is not None:
                soft.subtract(probs, start)
            dlogits = probs.to(dtype)
            grad_x_chunk = grad_x[start : start + chunk]
            torch.mm(dlogits, weight_lowp[:used], out=grad_x_chunk)
            if not none_ignored:
                counts = (target != IGNORE)[:, None]
                grad_x_chunk *= counts
                x_chunk = x_chunk * counts
            if dtype == torch.float32:
                grad_weight[:used].addmm_(dlogits.t(), x_chunk)
            else:
                grad_weight[:used] += dlogits.t() @ x_chunk
        if train:
            ctx.save_for_backward(grad_x, grad_weight)
            ctx.x_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled(ctx, grads[0]), None, None, None, None, None


def scaled(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight that forward has saved unscaled, times the incoming one."""
    grad_x, grad_weight = ctx.saved_tensors
    return (grad_x.float() * grad).to(ctx.x_dtype), (grad_weight * grad).to(ctx.weight_dtype)


class SampledCrossEntropy(torch.autograd.Function):
    """`LinearCrossEntropy` whose softmax computes some of the ids, different ones for every chunk (Jean et al. 2015).

    Each exponential is divided by the probability with which its id was drawn, so the sum over all ids is estimated
    without bias (Horvitz & Thompson 1952); the targets are always among them. For training alone.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, soft: SoftTargets) -> Tensor:
        """x [M, C], weight [V, C], targets [M]. Returns the estimated sum of cross-entropies, float32, on average a little low."""
        grad_x = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        total = torch.zeros((), device=x.device, dtype=torch.float32)
        for start in range(0, x.size(0), SAMPLED_ROWS):
            x_chunk, target = x[start : start + SAMPLED_ROWS].to(dtype), targets[start : start + SAMPLED_ROWS]
            drawn = soft.candidates(start, start + len(target))
            rows = weight.index_select(0, drawn.ids).to(dtype)  # [K, C]
            logits = torch.mm(x_chunk, rows.t()).float().sub_(drawn.inclusion.log())
            norm, index = logits.logsumexp(dim=1, keepdim=True), drawn.targets[:, None]
            counts = (target != IGNORE)[:, None]
            total += ((norm - logits.gather(1, index)) * counts).sum()
            dlogits = logits.sub_(norm).exp_()
            dlogits.scatter_add_(1, index, torch.full_like(norm, soft.weight - 1.0))
            if drawn.soft is not None:
                dlogits.sub_(drawn.soft, alpha=soft.weight)
            dlogits = dlogits.mul_(counts).to(dtype)
            grad_x[start : start + SAMPLED_ROWS] = dlogits @ rows
            grad_weight.index_add_(0, drawn.ids, (dlogits.t() @ x_chunk).float())
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled(ctx, grads[0]), None, None, None


def head_loss(
    x: Tensor, weight: Tensor, targets: Tensor, used: int, dtype: torch.dtype, soft: SoftTargets | None = None
) -> Tensor:
    """Sum of the cross-entropies of `x @ weight.T`, as LinearCrossEntropy; of some ids only if `soft` says so and gradients are wanted."""
    if soft is not None and not torch.is_grad_enabled():
        soft = None  # it is for the gradients alone
    if soft is not None and soft.sampled:
        return SampledCrossEntropy.apply(x, weight, targets, dtype, soft)  # type: ignore[no-untyped-call,no-any-return]
    rows = chunk_rows(weight.size(0), x.device)
    return LinearCrossEntropy.apply(x, weight, targets, used, dtype, rows, soft)  # type: ignore[no-untyped-call,no-any-return]


def chunk_rows(vocab: int, device: torch.device) -> int:
    """Rows of logits held at once: on an accelerator about 1 GB of float32; on a CPU at most 64 MB and 512 rows.

    Softmax reads a chunk several times, from the cache if it fits; products of fewer rows are slower (docs/experiments.md).
    """
    if device.type == "cpu":
        return max(128, min(512, (1 << 24) // vocab))
    return max(128, (1 << 28) // vocab)
