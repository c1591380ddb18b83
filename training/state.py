"""State of a training run, and what the loop does between steps: logging, evaluation, samples, checkpoints.

>>> train, sizes = batch_sizes(config.train, model.config, {}, distributed, "fp32")
>>> state = TrainState(…, sizes=sizes, total_steps=1000)
>>> state.log.metrics(metrics_row(state, lr=1e-3, grad_norm=0.9) | evaluate(state))
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoint import SUMMARY
from config import Config, ModelConfig, TrainConfig, read_toml, to_toml
from dataset import TokenData, WindowSampler, training_batches, validation_batches
from devices import DistributedContext, autocast, device_name, gpu_memory
from evaluation.yardstick import YardstickSums
from inference.writing import eval_mode, generate
from model import GPT
from storage.atomic import atomic_write_text
from tokenizer import Tokenizer
from training import plan
from training.checkpointing import CheckpointWriter, InitialState, Progress, bits_per_byte
from training.console import duration
from training.counting import Counting, rows_of
from training.metrics import RunLog, Throughput, time_left
from training.model_setup import dividing_batch, unsharded_model
from training.ngram_teacher import SoftTargets, Teacher, teacher_weight
from training.optimizer import Optimizer
from training.resume import schedule_notes
from training.run_folder import Stop
from training.schedule import clamp_schedule, time_limited_end_step, total_steps
from training.split import with_parts
from training.step import grad_accum_steps, step_seed, validate

COMPARED_TOKENS = 50_000  # tokens at most that the model and counting are compared on at the end of a run
MAX_LOGITS = 1 << 26  # numbers of logits in memory at once


@dataclass(frozen=True)
class BatchSizes:
    """Sizes of one optimizer step. A window is one sequence of block_size tokens and their successors."""

    batch_size: int  # windows in a micro-batch: one forward and backward pass on one device
    grad_accum_steps: int  # micro-batches per device in one step
    world: int  # devices
    block_size: int

    @property
    def per_step(self) -> tuple[int, int]:
        """batch_size and tokens_per_step, which a checkpoint keeps."""
        return self.batch_size, self.tokens_per_step

    @property
    def windows_per_step(self) -> int:
        return self.batch_size * self.grad_accum_steps * self.world

    @property
    def tokens_per_step(self) -> int:
        return self.windows_per_step * self.block_size


def batch_sizes(
    train: TrainConfig, model: ModelConfig, saved: dict[str, Any], distributed: DistributedContext, precision: str
) -> tuple[TrainConfig, BatchSizes]:
    """The sizes that the settings request, and the settings with `tokens_per_step` filled in for a resumed run.

    saved: the training state of the checkpoint that the run resumes from, or {}. A resumed run keeps its batch, and its
    tokens per step on any number of processes. Raises ConfigError if not even one window fits into memory.
    """
    block = model.block_size
    batch = train.batch_size or saved.get("batch", 0)
    if not batch:
        batch = distributed.broadcast(
            plan.largest_batch(model, train, block, distributed.size, distributed.device, precision)
        )
    if saved and not train.tokens_per_step:
        train = train.model_copy(update={"tokens_per_step": saved.get("tokens_per_step", 0)})
        batch = dividing_batch(train.tokens_per_step, batch, block, distributed.size)
    return train, BatchSizes(batch, grad_accum_steps(train, batch, block, distributed.size), distributed.size, block)


def step_settings(
    config: Config, model: ModelConfig, saved: dict[str, Any], distributed: DistributedContext, precision: str
) -> tuple[Config, TrainConfig, BatchSizes, str]:
    """(settings for config.toml, settings of the steps, their sizes, a warning or ""), with what is chosen filled in.

    config.toml keeps the shape of `model` and the parts of a step, which a resumed run must not choose anew; saved: see
    `batch_sizes`. Raises ConfigError as that does.
    """
    train, sizes = batch_sizes(config.train, model, saved, distributed, precision)
    train, warning = with_parts(train, model, sizes.batch_size, distributed)
    kept = config.train.model_copy(update={"parts": train.parts})
    return config.model_copy(update={"model": model, "train": kept}), train, sizes, warning


@dataclass
class TrainState:
    """Everything the training loop uses."""

    run: Path
    config: Config  # as written to config.toml
    train: TrainConfig  # the training settings in effect, after batch_sizes and clamp_schedule
    precision: str
    data: TokenData
    tokenizer: Tokenizer
    counting: Counting
    distributed: DistributedContext
    model: GPT
    module: torch.nn.Module  # the model compiled and distributed: what a step calls
    optimizer: Optimizer
    scaler: Any  # torch.amp.GradScaler: multiplies the loss in fp16, does nothing in other formats
    sampler: WindowSampler
    sizes: BatchSizes
    total_steps: int  # 0 if only time limits the run
    progress: Progress
    log: RunLog
    save: CheckpointWriter
    meter: Throughput
    peak_flops: float | None = None  # FLOP/s of one device in this precision; None if not in the table
    energy: Callable[[], float] | None = None  # joules since the start, if the GPU reports it
    eval_s: float = 0.0  # seconds of the last evaluation
    stopped: bool = False  # by a signal: there is something to resume
    energy_before: float = field(init=False)  # joules of earlier sessions
    saved_s: float = field(init=False)  # the meter's time at the last checkpoint

    teacher: Teacher | None = field(init=False, default=None)  # set as long as it has a share in the targets

    def __post_init__(self) -> None:
        if self.teacher_weight or self.train.sampled_softmax:
            sampled = self.train.sampled_softmax
            self.teacher = Teacher(self.counting.model, self.distributed.device, sampled=sampled)
        self.energy_before, self.saved_s = self.progress.energy_j, self.meter.elapsed_s()

    @property
    def epoch(self) -> int:
        """Complete passes over the training text so far."""
        return self.progress.windows // self.sampler.per_epoch

    @property
    def teacher_weight(self) -> float:
        """Share of the counted n-grams in the targets of the next step; it depends on the tokens seen alone."""
        return teacher_weight(self.progress.windows * self.sizes.block_size, self.train.ngram_teacher)

    def soft_targets(self) -> Callable[[torch.Tensor, torch.Tensor], SoftTargets] | None:
        """What makes the soft targets of a micro-batch in the next step; None if the n-grams neither teach nor sample any more."""
        weight = self.teacher_weight
        if self.teacher is None or not (weight or self.teacher.sampled):
            self.teacher = None  # gives its memory back
            return None
        seed = step_seed(self.train.seed, self.progress.step, 0)
        return functools.partial(self.teacher.targets, weight=weight, seed=seed)

    @property
    def is_time_limited(self) -> bool:
        """True while a time-limited WSD run has not yet scheduled its decay."""
        return not self.total_steps and self.train.schedule == "wsd"

    def due(self, interval: int) -> bool:
        """Whether something that happens every `interval` steps (0: never) is due after this one."""
        return bool(interval) and self.progress.step % interval == 0

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's micro-batches (x, y), each [batch_size, T], from the run's next window on."""
        return training_batches(
            self.data.train,
            self.sampler,
            batch_size=self.sizes.batch_size,
            grad_accum_steps=self.sizes.grad_accum_steps,
            first=self.progress.windows,
            rank=self.distributed.rank,
            world=self.distributed.size,
            device=self.distributed.device,
        )

    def eta_s(self) -> float | None:
        """Seconds until the run ends at its current speed; None if only a signal ends it."""
        left = (self.total_steps or math.inf) - self.progress.step
        steps_per_s = self.meter.pace() / self.sizes.tokens_per_step
        return time_left(left, steps_per_s, self.train.max_minutes, self.meter.elapsed_s())


def announce(state: TrainState, start: InitialState, warnings: list[str]) -> None:
    """Write config.toml, and log data, device, sizes and parameters of the run, with any warnings.

    A summary.json of before is removed: until the run ends again it counts as unfinished.
    """
    data, log, sizes = state.data, state.log, state.sizes
    if start.checkpoint is not None:
        world = start.state["world"]
        log.say(f"resumed at step {state.progress.step} from {start.checkpoint}")
        if world != sizes.world:
            log.say(f"note: {world} processes before, {sizes.world} now: sums are formed in another order from here on")
        for note in [*start.notes, *_schedule_notes(state)]:
            log.say(f"note: {note}")
    write_config(state)
    if state.distributed.leader:
        (state.run / SUMMARY).unlink(missing_ok=True)
    for warning in filter(None, warnings):
        log.say(f"warning: {warning}")
    parts = f"steps in {state.train.parts} parts" if state.train.parts > 1 else "whole steps"
    splits, steps = data.manifest.splits, f"{state.total_steps:,}" if state.total_steps else "unlimited"
    texts = f"{data.folder}: {splits.train.tokens:,} training and {splits.val.tokens:,} validation tokens"
    device = f"{device_name(state.distributed.device)}, {state.precision}, {parts}"
    work = f"{sizes.tokens_per_step:,} tokens a step, {steps} steps, context {sizes.block_size}"
    log.console.note(
        f"run      {log.folder}\ndata     {texts}\ndevice   {device}\nsteps    {work}",
        f"run {log.folder}   data {texts}\ndevice {device}   {work}",
    )
    for name, count, size in state.model.report():
        log.say(f"  {name:<20} {count:>13,} parameters {size / 1e6:>9.1f} MB")


def _schedule_notes(state: TrainState) -> list[str]:
    """What becomes of the learning rate, compared with the settings that the run had before this session."""
    path = state.run / "config.toml"
    before = TrainConfig(**read_toml(path)["train"]) if path.is_file() else state.train
    sizes = (state.sampler.per_epoch, state.sizes.windows_per_step, state.sizes.block_size)
    total = total_steps(before, *sizes)
    return schedule_notes(clamp_schedule(before, total)[0], state.train, state.progress.step, total, state.total_steps)


def write_config(state: TrainState) -> None:
    """Write config.toml (rank 0 only), from which --resume takes the settings."""
    if state.distributed.leader:
        atomic_write_text(state.run / "config.toml", to_toml(state.config))


def schedule_final_decay(state: TrainState) -> None:
    """For a time-limited WSD run, start the decay and fix the final step.

    Does nothing during the stable phase. Time is reserved for the last evaluation and for writing best/ and, with the optimizer's moments, last/.
    """
    reserve_s = state.eval_s + 4 * state.save.seconds / max(1, state.save.folders)
    total = state.distributed.broadcast(
        time_limited_end_step(state.progress.step, state.meter.elapsed_s(), reserve_s, state.train)
    )
    if not total:
        return
    state.total_steps = state.log.total = total
    state.train = state.train.model_copy(update={"max_steps": total, "max_minutes": 0.0})
    state.config = state.save.config = state.config.model_copy(update={"train": state.train})
    write_config(state)
    state.log.say(f"step {state.progress.step}: the learning rate falls from here to the end, step {total}")


def sync_stop_and_checkpoint(state: TrainState, reason: str, stop: Stop) -> tuple[str, bool]:
    """Synchronise the stop reason and checkpoint flag across ranks: (reason or "", whether a timed checkpoint is due).

    reason: why this rank would stop. If one rank stops, all do; the timer of rank 0 decides about checkpoints.
    """
    since_s = state.meter.elapsed_s() - state.saved_s
    timer = state.distributed.leader and 0 < state.train.checkpoint_minutes * 60 < since_s
    ends, stops, due = state.distributed.sum_over_ranks([float(bool(reason)), float(bool(stop.reason)), float(timer)])
    state.stopped = stops > 0
    return (reason or "another process stopped" if ends else ""), due > 0


def count_step(state: TrainState, loss: float, finite: bool) -> None:
    """Advance the run's position by one step, and add the loss to the averages if it is finite."""
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
    """The row of metrics.jsonl for the step just taken; unknown values are None."""
    progress, meter, device = state.progress, state.meter, state.distributed.device
    tokens_per_step, speed = state.sizes.tokens_per_step, meter.recent()
    peak = state.peak_flops * state.distributed.size if state.peak_flops else None
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
    """Validate, and write best/ if the loss is the lowest so far; returns the columns for a row of metrics.

    epoch_end: also the mean training loss of the epoch that has just ended.
    """
    began, progress, sizes = state.meter.elapsed_s(), state.progress, state.sizes
    loss = validate(
        state.module,
        state.data.val,
        sizes.block_size,
        sizes.batch_size,
        state.precision,
        state.distributed,
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
    row |= counted_columns(state)
    if epoch_end and progress.epoch_steps:
        mean = progress.epoch_loss / progress.epoch_steps
        progress.best_epoch_loss = min(progress.best_epoch_loss, mean)
        progress.epoch_loss, progress.epoch_steps = 0.0, 0
        epoch = progress.windows / state.sampler.per_epoch
        row |= {"epoch": epoch, "epoch_loss": mean, "best_epoch_loss": progress.best_epoch_loss}
    state.eval_s = state.meter.elapsed_s() - began
    return row


def counted_columns(state: TrainState) -> dict[str, float]:
    """Columns of a row of metrics with a validation loss: the loss of counting alone, the same in every row."""
    limit = state.train.eval_tokens
    loss = state.counting.validation_loss(state.data.val, state.sizes.block_size, limit)
    return {"counted_loss": loss, "counted_bpb": bits_per_byte(loss, state.data)}


@torch.no_grad()
def compare(state: TrainState) -> dict[str, float]:
    """Bits a byte of counting, of the model, and of the best mixture, over the first tokens of the validation pass.

    A joint call of all ranks.
    """
    config, distributed, sums = state.model.config, state.distributed, YardstickSums()
    # as in `validate`: under FSDP all ranks must run the same batches
    rank, world = (0, 1) if distributed.mode == "fsdp" else (distributed.rank, distributed.size)
    batch = max(1, MAX_LOGITS // (config.block_size * config.vocab_size))
    limit = min(state.train.eval_tokens or COMPARED_TOKENS, COMPARED_TOKENS)
    with eval_mode(state.model), autocast(distributed.device, state.precision):
        for x, y in validation_batches(state.data.val, config.block_size, batch, limit, rank, world):
            logits = state.model(x.to(distributed.device)).float()
            found = logits.log_softmax(dim=-1).gather(-1, y.to(distributed.device)[:, :, None])[:, :, 0].exp()
            counted = state.counting.model.probabilities(rows_of(x, y))
            sums.add(found.flatten().cpu().double().numpy(), counted.ravel())
    tokens, *nats = distributed.sum_over_ranks([float(sums.tokens), *sums.nats.tolist()])
    total = YardstickSums(int(tokens), np.array(nats))
    split = state.data.manifest.splits.val
    return total.figures(size=tokens * split.bytes / split.tokens)


def log_sample(state: TrainState) -> None:
    """Log a text sampled from the current weights, with a fixed seed, so that samples of different steps are comparable."""
    model, train = unsharded_model(state.model, state.distributed), state.train  # a joint call under FSDP
    if not state.distributed.leader:
        return
    params = state.config.generation.model_copy(
        update={"max_tokens": train.sample_tokens, "seed": 1, "n": 1, "stop": ()}
    )
    state.log.console.clear()  # what is said meanwhile (`CompiledStep`) must not stand on the rest of the bar
    text = generate(model, state.tokenizer, train.sample_prompt, params)[0].text
    state.log.sample({"step": state.progress.step, "prompt": train.sample_prompt, "text": text, "seed": 1})


def checkpoint(state: TrainState) -> None:
    """Write last/, with the elapsed time and energy of the run."""
    state.progress.elapsed_s = state.meter.elapsed_s()
    used = state.energy() if state.energy else 0.0
    state.progress.energy_j = state.energy_before + state.distributed.sum_over_ranks([used])[0]
    state.save(state.progress, best=False)
    state.saved_s = state.meter.elapsed_s()


def summary(state: TrainState, reason: str) -> dict[str, Any]:
    """What is printed when a run ends, as `metrics.finish` takes it; also written to summary.json."""
    progress, speed = state.progress, state.meter.overall()
    found = {
        "reason": reason,
        "run": str(state.run),
        "steps": progress.step,
        "tokens": progress.windows * state.sizes.block_size,
        "best_val_loss": _finite(progress.best_val),
        "best_step": progress.best_step,
        "time": duration(progress.elapsed_s),
        "tokens_per_s": round(speed) if speed else None,
        "gpu_memory_gb": gpu_memory(state.distributed.device),
        "energy_kwh": progress.energy_j / 3.6e6 if state.energy else None,
        "checkpoint_s": round(state.save.seconds, 2),
        "folders_written": state.save.folders,
        "yardstick": compare(state),
        "done": not state.stopped,
    }
    if state.distributed.leader:
        atomic_write_text(state.run / SUMMARY, json.dumps(found, indent=2) + "\n")
    return found
