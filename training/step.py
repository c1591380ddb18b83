"""One optimizer step, the validation pass, and the arithmetic of a run's length.

>>> accumulate = grad_accum_steps(train, batch_size=8, block_size=256, world=1)
>>> loss, norm, stepped = take_step(module, optimizer, scaler, batches, accumulate, train, "fp32", team)
>>> val_loss = validate(module, data.val, 256, 8, "fp32", team)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from config import ConfigError, TrainConfig
from dataset import TokenStream, validation_batches
from devices import Team, autocast
from inference.writing import eval_mode

if TYPE_CHECKING:
    from training.checkpointing import Progress
    from training.metrics import RunLog
    from training.optimizer import Optimizer
    from training.run_folder import Stop


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says at which step, why, and where the last good checkpoint is."""


def total_steps(train: TrainConfig, per_epoch: int, windows_per_step: int, block_size: int) -> int:
    """Optimizer steps of the whole run: the smallest of the given ends; 0 where only the clock ends it."""
    ends = [
        train.max_steps,
        math.ceil(train.epochs * per_epoch / windows_per_step),  # the last step may reach into the next epoch
        math.ceil(train.max_tokens / (windows_per_step * block_size)),
    ]
    return min((end for end in ends if end), default=0)


def grad_accum_steps(train: TrainConfig, batch_size: int, block_size: int, world: int) -> int:
    """Micro-batches that a rank accumulates in one step. Raises ConfigError where tokens_per_step is no multiple of one."""
    once = batch_size * block_size * world  # tokens of one micro-batch on every rank
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


@torch.no_grad()
def validate(
    model: torch.nn.Module,
    stream: TokenStream,
    block_size: int,
    batch_size: int,
    precision: str,
    team: Team,
    limit: int = 0,
) -> float:
    """Mean loss over the fixed validation pass, in nats a token, weighted by tokens; the same on every rank."""
    # Under FSDP a forward pass gathers weights from all ranks, so all must take the same batches.
    rank, world = (0, 1) if team.mode == "fsdp" else (team.rank, team.size)
    # In double precision, as thousands of batches are summed; Apple's MPS has none.
    nats = torch.zeros((), dtype=torch.float64, device=team.device if team.device.type != "mps" else "cpu")
    count = 0
    with eval_mode(model), autocast(team.device, precision):
        for x, y in validation_batches(stream, block_size, batch_size, limit, rank, world):
            loss = model(x.to(team.device), y.to(team.device))
            nats += loss.to(nats.device).double() * y.numel()  # the last batch is a shorter one: weight by tokens
            count += y.numel()
    total = team.total([float(nats), float(count)])  # over all ranks
    return total[0] / total[1]


def take_step(
    module: torch.nn.Module,
    optimizer: Optimizer,
    scaler: Any,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    grad_accum_steps: int,
    train: TrainConfig,
    precision: str,
    team: Team,
) -> tuple[float, float, bool]:
    """One optimizer step over `grad_accum_steps` micro-batches: (mean loss over them and all ranks, gradient norm, stepped).

    Order: scale, backward, unscale, clip, check, step, update, zero. Where the loss or the gradient is not finite no
    parameter changes; with fp16 that is the scaler's ordinary answer to an overflow, and all ranks answer alike.
    """
    # 1 gradients: forward and backward over the micro-batches, which add up as if they were one large batch
    total = torch.zeros((), device=team.device)
    for number in range(grad_accum_steps):
        x, y = next(batches)  # each [B, T]
        # Ranks exchange gradients once a step, with the last backward pass.
        if team.mode == "ddp":
            module.require_backward_grad_sync = number == grad_accum_steps - 1  # type: ignore[assignment]
        elif team.mode == "fsdp":
            module.set_requires_gradient_sync(number == grad_accum_steps - 1)  # type: ignore[operator]
        with autocast(team.device, precision):
            loss = module(x, y)
        # In fp16 small gradients would round to zero: the scaler multiplies the loss, and with it every gradient.
        scaler.scale(loss / grad_accum_steps).backward()
        total += loss.detach() / grad_accum_steps  # on the device: reading it here would wait for the GPU every time

    # 2 clipping: back to the true scale, then no longer than grad_clip all parameters together
    for part in optimizer.parts:
        scaler.unscale_(part)
    parameters = [p for part in optimizer.parts for group in part.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, train.grad_clip or math.inf)  # the norm before clipping
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    # 3 update: only where loss and gradient are finite. The norm covers all parameters and ranks, so no part of the
    # optimizer steps where another cannot, and no rank where another does not.
    mean = team.total([float(total)])[0] / team.size
    finite = math.isfinite(mean) and math.isfinite(float(norm))
    if finite:
        for part in optimizer.parts:
            scaler.step(part)
    # fp16: half the scale after an overflow, twice after many good steps. Other formats have nothing to adapt.
    if finite or scaler.is_enabled():
        scaler.update()
    optimizer.zero_grad()  # or the next step would add to these gradients
    return mean, float(norm), finite


def training_ends(train: TrainConfig, progress: Progress, total: int, minutes: float, stop: Stop) -> str:
    """Why training ends before its next step, or an empty string."""
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
    # In fp16 an overflow is ordinary, and the scaler has halved its factor; below 1 there is nothing left to halve.
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
