"""What a training run holds between two steps, and what the loop does with it besides stepping.

>>> train, sizes = batch_sizes(config.train, model.config, {}, team, "fp32")
>>> state = TrainState(…, sizes=sizes, total_steps=1000)
>>> state.log.metrics(metrics_row(state, lr=1e-3, grad_norm=0.9) | evaluate(state))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from config import Config, ModelConfig, TrainConfig, to_toml
from dataset import TokenData, WindowSampler, training_batches
from devices import Team, device_name, gpu_memory
from inference.writing import generate
from model import GPT
from storage.atomic import replace_text
from tokenizer import Tokenizer
from training import plan
from training.checkpointing import Progress, Saver, Start, bits_per_byte
from training.metrics import RunLog, Throughput, duration, time_left
from training.model_setup import dividing_batch, unsharded_model
from training.optimizer import Optimizer, clock_end
from training.run_folder import Stop
from training.step import grad_accum_steps, total_steps, validate


@dataclass(frozen=True)
class Sizes:
    """How one optimizer step is put together. A window is one sequence of block_size tokens and their successors."""

    batch_size: int  # windows in a micro-batch: one forward and backward pass on one device
    grad_accum_steps: int  # micro-batches of a device
    world: int  # devices
    block_size: int

    @property
    def windows_per_step(self) -> int:
        return self.batch_size * self.grad_accum_steps * self.world

    @property
    def tokens_per_step(self) -> int:
        return self.windows_per_step * self.block_size


def batch_sizes(
    train: TrainConfig, model: ModelConfig, saved: dict[str, Any], team: Team, precision: str
) -> tuple[TrainConfig, Sizes]:
    """The sizes that the settings ask for, and the settings with `tokens_per_step` filled in for a resumed run.

    saved: the training state of the checkpoint that the run goes on from, or {}. A resumed run keeps its batch, and its
    tokens per step on any number of processes. Raises ConfigError where not even one window fits into memory.
    """
    block = model.block_size
    batch = train.batch_size or saved.get("batch", 0)
    if not batch:
        batch = team.same(plan.largest_batch(model, train, block, team.size, team.device, precision))
    if saved and not train.tokens_per_step:
        train = train.model_copy(update={"tokens_per_step": saved.get("tokens_per_step", 0)})
        batch = dividing_batch(train.tokens_per_step, batch, block, team.size)
    return train, Sizes(batch, grad_accum_steps(train, batch, block, team.size), team.size, block)


def fitted_schedule(train: TrainConfig, sizes: Sizes, per_epoch: int) -> tuple[TrainConfig, int, list[str]]:
    """(settings whose warm-up and lowest rate fit the run, its steps or 0 where only the clock ends it, warnings).

    per_epoch: windows in one pass over the training text.
    """
    warnings = []
    total = total_steps(train, per_epoch, sizes.windows_per_step, sizes.block_size)
    if total and train.warmup_steps >= total:
        train = train.model_copy(update={"warmup_steps": max(1, total // 10)})
        warnings.append(f"warm-up shortened to {train.warmup_steps} of {total} steps")
    if train.min_lr > train.lr:
        train = train.model_copy(update={"min_lr": train.lr / 10})
        warnings.append(f"--train.min-lr is above --train.lr {train.lr:g}: lowered to {train.min_lr:g}")
    return train, total, warnings


@dataclass
class TrainState:
    """All that the training loop works on."""

    run: Path
    config: Config  # what config.toml says
    train: TrainConfig  # the training settings in effect: what config.toml says, made to fit
    precision: str
    data: TokenData
    tokenizer: Tokenizer
    team: Team
    model: GPT
    module: torch.nn.Module  # the model compiled and distributed: what a step calls
    optimizer: Optimizer
    scaler: Any  # torch.amp.GradScaler: multiplies the loss in fp16, does nothing in other formats
    sampler: WindowSampler
    sizes: Sizes
    total_steps: int  # 0 where only the clock ends the run
    progress: Progress
    log: RunLog
    save: Saver
    meter: Throughput
    peak_flops: float | None = None  # FLOP/s of one device in this format, where its data sheet is known
    energy: Callable[[], float] | None = None  # joules since the start, where the GPU tells
    eval_s: float = 0.0  # seconds of the last evaluation
    stopped: bool = False  # by a signal: there is something to resume
    energy_before: float = field(init=False)  # joules of earlier sessions
    saved_s: float = field(init=False)  # the meter's time at the last checkpoint

    def __post_init__(self) -> None:
        self.energy_before, self.saved_s = self.progress.energy_j, self.meter.elapsed_s()

    @property
    def epoch(self) -> int:
        """Whole passes over the training text so far."""
        return self.progress.windows // self.sampler.per_epoch

    @property
    def open_end(self) -> bool:
        """Whether the last step is still to be fixed: a wsd run that only the clock ends, before its decay."""
        return not self.total_steps and self.train.schedule == "wsd"

    def due(self, interval: int) -> bool:
        """Whether something that happens every `interval` steps (0: never) is due after this one."""
        return bool(interval) and self.progress.step % interval == 0

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's micro-batches (x, y), each [batch_size, T], from where the run stands."""
        return training_batches(
            self.data.train,
            self.sampler,
            batch_size=self.sizes.batch_size,
            grad_accum_steps=self.sizes.grad_accum_steps,
            first=self.progress.windows,
            rank=self.team.rank,
            world=self.team.size,
            device=self.team.device,
        )

    def eta_s(self) -> float | None:
        """Seconds until the run ends at its present pace; None if nothing but a signal ends it."""
        left = (self.total_steps or math.inf) - self.progress.step
        steps_per_s = self.meter.pace() / self.sizes.tokens_per_step
        return time_left(left, steps_per_s, self.train.max_minutes, self.meter.elapsed_s())


def announce(state: TrainState, start: Start, warnings: list[str]) -> None:
    """Write config.toml, and say what is about to be trained, on what, and for how long."""
    data, log, sizes = state.data, state.log, state.sizes
    if start.checkpoint is not None:
        world = start.state["world"]
        log.say(f"resumed at step {state.progress.step} from {start.checkpoint}")
        if world != sizes.world:
            log.say(f"note: {world} processes before, {sizes.world} now: sums are formed in another order from here on")
    write_config(state)
    for warning in filter(None, warnings):
        log.say(f"warning: {warning}")
    splits, steps = data.manifest.splits, f"{state.total_steps:,}" if state.total_steps else "unlimited"
    log.say(
        f"run {log.folder}   data {data.folder}: {splits.train.tokens:,} training and {splits.val.tokens:,} validation tokens\n"
        f"device {device_name(state.team.device)}, {state.precision}   {sizes.tokens_per_step:,} tokens a step, {steps} "
        f"steps, context {sizes.block_size}"
    )
    for name, count, size in state.model.report():
        log.say(f"  {name:<20} {count:>13,} parameters {size / 1e6:>9.1f} MB")


def write_config(state: TrainState) -> None:
    """config.toml, by the leader: what the next --resume goes on with."""
    if state.team.leader:
        replace_text(state.run / "config.toml", to_toml(state.config))


def fix_last_step(state: TrainState) -> None:
    """Where only the clock ends a wsd run: once the decay has to begin, settle at which step the run ends.

    Time is kept for the last evaluation and for writing best/ and, with the optimizer's moments, last/.
    """
    reserve_s = state.eval_s + 4 * state.save.seconds / max(1, state.save.folders)
    total = state.team.same(clock_end(state.progress.step, state.meter.elapsed_s(), reserve_s, state.train))
    if not total:
        return
    state.total_steps = state.log.total = total
    state.train = state.train.model_copy(update={"max_steps": total, "max_minutes": 0.0})
    state.config = state.save.config = state.config.model_copy(update={"train": state.train})
    write_config(state)
    state.log.say(f"step {state.progress.step}: the learning rate falls from here to the end, step {total}")


def agree(state: TrainState, reason: str, stop: Stop) -> tuple[str, bool]:
    """(why all ranks end now, or ""; whether a checkpoint is due by the clock): the same on every rank.

    reason: why this rank would end. One rank is enough to end all; the leader's clock decides about checkpoints.
    """
    since_s = state.meter.elapsed_s() - state.saved_s
    timer = state.team.leader and 0 < state.train.checkpoint_minutes * 60 < since_s
    ends, stops, due = state.team.total([float(bool(reason)), float(bool(stop.reason)), float(timer)])
    state.stopped = stops > 0
    return (reason or "another process stopped" if ends else ""), due > 0


def count_step(state: TrainState, loss: float, finite: bool) -> None:
    """Move the run's position one step on; a loss that is finite goes into the averages."""
    progress = state.progress
    progress.windows += state.sizes.windows_per_step
    progress.step += 1
    if not finite:
        return
    if progress.is_spike(loss):
        average = progress.running_loss
        state.log.say(f"warning: step {progress.step}: loss {loss:.3f} is far above its average {average:.3f}")
    progress.add_loss(loss)


def metrics_row(state: TrainState, lr: float, grad_norm: float) -> dict[str, Any]:
    """The row of metrics.jsonl for the step just taken; what is not known is None."""
    progress, meter, device = state.progress, state.meter, state.team.device
    tokens_per_step, speed = state.sizes.tokens_per_step, meter.recent()
    peak = state.peak_flops * state.team.size if state.peak_flops else None
    return {
        "step": progress.step,
        "tokens": progress.windows * state.sizes.block_size,
        "train_loss": sum(progress.losses) / len(progress.losses) if progress.losses else None,
        "avg_loss": _finite(progress.running_loss),
        "best_avg_loss": _finite(progress.best_average),
        "lr": lr,
        "grad_norm": _finite(grad_norm),
        "tokens_per_s": speed,
        "seconds_per_batch": tokens_per_step / speed if speed else None,
        "mfu": speed * state.model.flops_per_token() / peak if peak and speed else None,
        "gpu_memory_gb": gpu_memory(device),
        "elapsed_s": round(meter.elapsed_s(), 3),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def evaluate(state: TrainState, epoch_end: bool = False) -> dict[str, Any]:
    """Validate, and write best/ where the loss is the lowest so far; the columns it adds to a row of metrics.

    epoch_end: also the mean training loss of the epoch that has just ended.
    """
    began, progress, sizes = state.meter.elapsed_s(), state.progress, state.sizes
    loss = validate(
        state.module,
        state.data.val,
        sizes.block_size,
        sizes.batch_size,
        state.precision,
        state.team,
        state.train.eval_tokens,
    )
    # patience counts from the last improvement that is large enough, best/ takes any
    better = loss < progress.best_val - state.train.min_improvement
    progress.evals_since_best = 0 if better else progress.evals_since_best + 1
    progress.val_loss = loss
    if loss < progress.best_val:
        progress.best_val, progress.best_step = loss, progress.step
        state.save(progress, best=True)
    row = {"val_loss": loss, "val_bpb": bits_per_byte(loss, state.data), "best_val_loss": progress.best_val}
    if epoch_end and progress.epoch_steps:
        mean = progress.epoch_loss / progress.epoch_steps
        progress.best_epoch_loss = min(progress.best_epoch_loss, mean)
        progress.epoch_loss, progress.epoch_steps = 0.0, 0
        epoch = progress.windows / state.sampler.per_epoch
        row |= {"epoch": epoch, "epoch_loss": mean, "best_epoch_loss": progress.best_epoch_loss}
    state.eval_s = state.meter.elapsed_s() - began
    return row


def log_sample(state: TrainState) -> None:
    """A text from the model as it is now into the log; its seed is fixed, so that samples of different steps compare."""
    model, train = unsharded_model(state.model, state.team), state.train  # a joint call under FSDP
    if not state.team.leader:
        return
    params = state.config.generation.model_copy(
        update={"max_tokens": train.sample_tokens, "seed": 1, "n": 1, "stop": ()}
    )
    text = generate(model, state.tokenizer, train.sample_prompt, params)[0].text
    state.log.sample({"step": state.progress.step, "prompt": train.sample_prompt, "text": text, "seed": 1})


def checkpoint(state: TrainState) -> None:
    """Write last/, with the time and the energy that the run has used so far."""
    state.progress.elapsed_s = state.meter.elapsed_s()
    used = state.energy() if state.energy else 0.0
    state.progress.energy_j = state.energy_before + state.team.total([used])[0]
    state.save(state.progress, best=False)
    state.saved_s = state.meter.elapsed_s()


def summary(state: TrainState, reason: str) -> dict[str, Any]:
    """What is printed when a run ends, as `metrics.finish` takes it."""
    progress, speed = state.progress, state.meter.overall()
    return {
        "reason": reason,
        "run": str(state.run),
        "steps": progress.step,
        "tokens": progress.windows * state.sizes.block_size,
        "best_val_loss": _finite(progress.best_val),
        "best_step": progress.best_step,
        "time": duration(progress.elapsed_s),
        "tokens_per_s": round(speed) if speed else None,
        "gpu_memory_gb": gpu_memory(state.team.device),
        "energy_kwh": progress.energy_j / 3.6e6 if state.energy else None,
        "checkpoint_s": round(state.save.seconds, 2),
        "folders_written": state.save.folders,
        "done": not state.stopped,
    }
