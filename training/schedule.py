"""The learning-rate schedule and the length of a run, as functions of the step and the settings alone.

>>> total = total_steps(train, per_epoch=1200, windows_per_step=16, block_size=256)
>>> train, warnings = clamp_schedule(train, total)
>>> optimizer.set_lr(lr_scale(step, total, train))
"""

from __future__ import annotations

import math

from config import TrainConfig


def total_steps(train: TrainConfig, per_epoch: int, windows_per_step: int, block_size: int) -> int:
    """Optimizer steps of the run: the smallest of --train.max-steps, epochs and max-tokens; 0 if only time limits it.

    per_epoch: windows in one pass over the training text.
    """
    ends = [
        train.max_steps,
        math.ceil(train.epochs * per_epoch / windows_per_step),  # the last step may reach into the next epoch
        math.ceil(train.max_tokens / (windows_per_step * block_size)),
    ]
    return min((end for end in ends if end), default=0)


def clamp_schedule(train: TrainConfig, total: int) -> tuple[TrainConfig, list[str]]:
    """(settings with warm-up and lowest rate limited to what a run of `total` steps allows, warnings).

    total: 0 if only time limits the run; the warm-up is then kept.
    """
    warnings = []
    if total and train.warmup_steps >= total:
        train = train.model_copy(update={"warmup_steps": max(1, total // 10)})
        warnings.append(f"warm-up shortened to {train.warmup_steps} of {total} steps")
    if train.min_lr > train.lr:
        train = train.model_copy(update={"min_lr": train.lr / 10})
        warnings.append(f"--train.min-lr is above --train.lr {train.lr:g}: lowered to {train.min_lr:g}")
    return train, warnings


def lr_scale(step: int, total: int, train: TrainConfig) -> float:
    """Share of the peak learning rate at update number `step` of 0..total-1.

    The first update has a rate above 0, the last one of the warm-up (`warmup_steps - 1`) the peak, the last of all
    `min_lr` (except `constant`). onecycle rises from 1/25 of the peak along a cosine (Smith & Topin 2018).
    """
    low = train.min_lr / train.lr
    # The update that has the peak rate: steps count from 0, so it is one less than the number of warm-up steps.
    peak = max(0, (min(train.warmup_steps, total) if total else train.warmup_steps) - 1)
    if step < peak:
        if train.schedule == "onecycle":
            return 1 / 25 + (1 - 1 / 25) * 0.5 * (1 - math.cos(math.pi * step / peak))
        return (step + 1) / (peak + 1)  # linear, above 0 from the first update on
    if train.schedule == "constant" or total - 1 <= peak:
        return 1.0
    if train.schedule == "wsd":  # warm-up, stable, decay (Hu et al. 2024): linear down to `low` at the last update
        first = max(peak, decay_start_step(total, train))
        return 1.0 if step <= first else low + (1 - low) * (total - 1 - step) / (total - 1 - first)
    # cosine, and onecycle after its peak: half a cosine from 1 down to `low`
    done = (step - peak) / (total - 1 - peak)
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def decay_start_step(total: int, train: TrainConfig) -> int:
    """The last update of a WSD schedule of `total` updates that still has the full rate."""
    return total - 1 - max(1, round(train.decay_fraction * total))


def time_limited_end_step(step: int, elapsed_s: float, reserve_s: float, train: TrainConfig) -> int:
    """Final step of a time-limited WSD run; 0 during the stable phase.

    Before its decay the rate of WSD does not depend on the end, so the end can be fixed once the pace is known: `step`
    steps took `elapsed_s`. `reserve_s` is kept for the last evaluation. With the returned number as --train.max-steps
    the same run is repeated, whatever its speed.
    """
    left_s = train.max_minutes * 60 - reserve_s - elapsed_s
    # At the pace so far, this many steps fit into the whole time; with no step taken the pace is unknown.
    total = step + max(1, math.floor(left_s * step / elapsed_s)) if step else 0
    if not total or decay_start_step(total, train) > step:
        return 0
    while decay_start_step(total, train) < step:  # no step already taken may fall into the decay
        total += 1
    return total
