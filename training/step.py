"""One optimizer step, the validation pass, and the conditions that end a run.

>>> accumulate = grad_accum_steps(train, batch_size=8, block_size=256, world=1)
>>> loss, norm, stepped = take_step(module, optimizer, scaler, batches, accumulate, train, "fp32", distributed)
>>> val_loss = validate(module, data.val, 256, 8, "fp32", distributed)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from config import ConfigError, TrainConfig
from dataset import TokenStream, validation_batches
from devices import DistributedContext, autocast, seed_dropout
from inference.writing import eval_mode
from loss import SoftTargets
from training.split import SplitModel

if TYPE_CHECKING:
    from training.checkpointing import Progress
    from training.metrics import RunLog
    from training.optimizer import Optimizer
    from training.run_folder import Stop


class TrainingFailed(RuntimeError):
    """Training cannot continue; the message gives the step, the reason and the place of the last good checkpoint."""


def grad_accum_steps(train: TrainConfig, batch_size: int, block_size: int, world: int) -> int:
    """Micro-batches that a rank accumulates in one step. Raises ConfigError if tokens_per_step is not a multiple."""
    once = batch_size * block_size * world  # tokens of one micro-batch on every rank: the unit of a step
    if not train.tokens_per_step:
        return 1
    if train.tokens_per_step % once:
        lower = max(once, train.tokens_per_step // once * once)
        raise ConfigError(
            [
                f"--train.tokens-per-step {train.tokens_per_step} is not a multiple of batch_size {batch_size} x "
                f"block_size {block_size} x {world} processes = {once}: try --train.tokens-per-step {lower}"
            ]
        )
    return train.tokens_per_step // once


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of the dropout masks of one step on one rank, so that a resumed run needs no saved generator state."""
    return ((seed * 1_000_003 + step) * 65_537 + rank) % (1 << 63)


def seed_step(module: torch.nn.Module, train: TrainConfig, step: int, distributed: DistributedContext) -> None:
    """Seed the dropout masks of the step after `step` steps."""
    seed = step_seed(train.seed, step, distributed.rank)
    if isinstance(module, SplitModel):
        module.seed_dropout(seed)
    else:
        seed_dropout(distributed.device, seed)


@torch.no_grad()
def validate(
    model: torch.nn.Module,
    stream: TokenStream,
    block_size: int,
    batch_size: int,
    precision: str,
    distributed: DistributedContext,
    limit: int = 0,
) -> float:
    """Mean loss over the fixed validation pass, in nats a token, weighted by tokens; the same on every rank."""
    # Under FSDP a forward pass gathers weights from all ranks, so all must run the same batches.
    rank, world = (0, 1) if distributed.mode == "fsdp" else (distributed.rank, distributed.size)
    # Summed in float64, as there may be thousands of batches; Apple's MPS lacks it, so the sum is on the CPU there.
    nats = torch.zeros(
        (), dtype=torch.float64, device=distributed.device if distributed.device.type != "mps" else "cpu"
    )
    count = 0
    with eval_mode(model), autocast(distributed.device, precision):
        for x, y in validation_batches(stream, block_size, batch_size, limit, rank, world):
            loss = model(x.to(distributed.device), y.to(distributed.device))
            nats += loss.to(nats.device).double() * y.numel()  # the last batch is a shorter one: weight by tokens
            count += y.numel()
    total = distributed.sum_over_ranks([float(nats), float(count)])  # over all ranks
    return total[0] / total[1]


def take_step(
    module: torch.nn.Module,
    optimizer: Optimizer,
    scaler: Any,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    grad_accum_steps: int,
    train: TrainConfig,
    precision: str,
    distributed: DistributedContext,
    soft: Callable[[torch.Tensor, torch.Tensor], SoftTargets] | None = None,
) -> tuple[float, float, bool]:
    """One optimizer step over `grad_accum_steps` micro-batches: (mean loss over them and all ranks, gradient norm, stepped).

    Order: scale, backward, unscale, clip, check, step, update, zero. If the loss or the gradient is not finite, no
    parameter changes; with fp16 that is the scaler's normal reaction to an overflow. All ranks decide alike.

    soft: makes the soft targets of a micro-batch (x, y), if a teacher has a share in them.
    """
    # 1 gradients: forward and backward for each micro-batch. backward() adds to .grad, so the result is the gradient of
    # one large batch, while only one micro-batch's activations are in memory.
    total = torch.zeros((), device=distributed.device)
    for number in range(grad_accum_steps):
        x, y = next(batches)  # each [B, T]; y is x one token ahead
        if isinstance(module, SplitModel):  # small models on CPUs: each thread computes some of the B rows
            with autocast(distributed.device, precision):
                total += module.backward(x, y, share=1 / grad_accum_steps, soft=soft)
            continue
        # All-reduce of the gradients once per step, in the last backward pass; partial sums need no exchange.
        if distributed.mode == "ddp":
            module.require_backward_grad_sync = number == grad_accum_steps - 1  # type: ignore[assignment]
        elif distributed.mode == "fsdp":
            module.set_requires_gradient_sync(number == grad_accum_steps - 1)  # type: ignore[operator]
        with autocast(distributed.device, precision):
            loss = module(x, y, *([soft(x, y)] if soft else []))  # mean over B*T targets, in nats per token
        # fp16: small gradients would underflow to zero, so the scaler multiplies the loss and thereby every gradient.
        # The division makes the sum over micro-batches a mean.
        scaler.scale(loss / grad_accum_steps).backward()
        total += loss.detach() / grad_accum_steps  # stays on the device: .item() here would synchronise with the GPU

    if isinstance(module, SplitModel):
        module.sum_gradients()

    # 2 clipping: divide the gradients by the scale, then limit the L2 norm over all parameters to grad_clip (Pascanu et
    # al. 2013), so that one unusual batch cannot throw the weights off
    for part in optimizer.parts:
        scaler.unscale_(part)
    parameters = [p for part in optimizer.parts for group in part.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, train.grad_clip or math.inf)  # the norm before clipping
    # FSDP: each rank holds a shard of the norm's DTensor; full_tensor combines them.
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    # 3 update, only if loss and gradient are finite. The norm covers all parameters and ranks, so AdamW and Muon take
    # the step or skip it together, and so do the ranks.
    mean = distributed.sum_over_ranks([float(total)])[0] / distributed.size
    finite = math.isfinite(mean) and math.isfinite(float(norm))
    if finite and isinstance(module, SplitModel):
        module.each(scaler.step, optimizer.parts)  # AdamW moves memory, Muon multiplies: at once on two threads
    elif finite:
        for part in optimizer.parts:
            scaler.step(part)
    # fp16: the scale is halved after an overflow and doubled after 2,000 good steps. In fp32 and bf16, which have the
    # exponent range, the scaler is disabled.
    if finite or scaler.is_enabled():
        scaler.update()
    optimizer.zero_grad()  # otherwise the next step would add to these gradients
    return mean, float(norm), finite


def training_ends(train: TrainConfig, progress: Progress, total: int, minutes: float, stop: Stop) -> str:
    """Reason to end training before its next step, or an empty string."""
    if stop.reason:
        return f"stopped by {stop.reason}"
    if total and progress.step >= total:
        return "all steps done"
    if train.target_loss and progress.step and progress.running_loss < train.target_loss:
        return f"running average of the loss {progress.running_loss:.4f} is below --train.target-loss {train.target_loss:g}"
    if train.patience and progress.evals_since_best >= train.patience:
        return f"no better validation loss in {progress.evals_since_best} passes (--train.patience)"
    if train.max_minutes and minutes >= train.max_minutes:
        return f"--train.max-minutes {train.max_minutes:g} are over"
    return ""


def bad_step(
    progress: Progress, scaler: Any, train: TrainConfig, loss: float, norm: float, run: Path, log: RunLog
) -> None:
    """Count a step whose loss or gradient was not finite, which changed no weight. Raises TrainingFailed after too many."""
    # In fp16 an overflow is normal: the scaler has halved its scale. Below 1 the scale is not the cause: count it.
    if scaler.is_enabled() and math.isfinite(loss) and scaler.get_scale() >= 1.0:
        return
    progress.skipped += 1
    what = f"step {progress.step + 1}: loss {loss}, gradient norm {norm}"
    if progress.skipped > train.skip_bad_steps:
        raise TrainingFailed(
            f"{what}: not finite. No weight was changed; the last good checkpoint is in {run}. "
            f"Lower --train.lr {train.lr:g}, or allow some with --train.skip-bad-steps {progress.skipped}"
        )
    log.say(f"warning: {what}: skipped ({progress.skipped} of {train.skip_bad_steps} allowed)")
