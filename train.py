"""Train a model: on one device, or on many under torchrun.

    python train.py                                              # the sample stories, three minutes on two idle cores
    python train.py --preset story-small --data data/novels --train.max-steps 200
    python train.py --resume --out runs/story-small              # resume exactly where it stopped
    python train.py --init-from gpt2 --data data/mine            # fine-tune another model on your texts
    python train.py --input my_books/ --minutes 10               # give the time, all other settings are chosen
    torchrun --standalone --nproc_per_node=8 train.py --preset victorian

Every run is a folder: config.toml, metrics.jsonl, samples.jsonl, loss.png, tensorboard/, best/ and last/ (model folders).

The file reads from top to bottom: flags, how they become settings, then `fit` in four stages (data, model, optimizer,
loop), and `main`. The parts of a stage are in training/.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cli import flag_given, flag_value, parse_flags, run_main
from config import (
    ROOT,
    Config,
    ConfigError,
    FrozenSettings,
    ModelConfig,
    TrainConfig,
    build,
    merge,
    preset_names,
    preset_values,
    read_toml,
)

if TYPE_CHECKING:
    from dataset import TokenData
    from devices import DistributedContext
    from training.state import TrainState


class TrainArgs(FrozenSettings):
    """Train a GPT-2-style model. Without flags: the repository's own short stories, three minutes on two idle cores."""

    preset: str = "sample"
    """Settings to start from: a name from presets/, or a .toml file; with --init-from: finetune."""
    config: Path | None = None
    """A TOML file whose settings replace those of the preset."""
    data: Path | None = None
    """Folder written by prepare_data.py, or s3://…; default: the preset's own texts, prepared at first use.

    With --input: the folder to prepare them in."""
    out: Path | None = None
    """Run folder; default: runs/PRESET, or runs/PRESET-2, -3 … if that exists."""
    resume: bool = False
    """Continue from the newest complete checkpoint in the run folder."""
    new_texts: bool = False
    """With --resume: go on with other texts than before; the position in them, epochs, best/ and patience begin anew."""
    init_from: str = ""
    """Start from the weights and shape of a model: a folder (ours or a GPT-2 of transformers) or a name on the hub."""
    plan: str = Field("", json_schema_extra={"bare": "here"})
    """Print parameters, memory, speed, time and cost instead of training: `here`, a GPU's name, or p4d.24xlarge."""
    price_per_hour: float = 0.0
    """With --plan: what the machine costs per hour."""
    minutes: float = Field(0.0, ge=0.0)
    """Measure this machine, choose all other settings for the best model after this many minutes, and train it."""
    input: tuple[str, ...] = ()
    """With --minutes: the texts (files, folders, globs), prepared first; or give --data."""
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig(max_steps=1000)


@dataclass(frozen=True)
class Base:
    """Base settings that command-line flags override, and their origin."""

    preset: str
    tables: dict[str, Any]  # as in a TOML file
    origin: str = ""  # the model that --init-from names
    origin_shape: dict[str, Any] = field(default_factory=dict)  # its [model] table
    own: dict[str, Any] = field(default_factory=dict)  # with --resume: the run's config.toml


def read_base(argv: list[str]) -> Base:
    """Base settings that command-line flags override: `--config` over the preset, or with --resume over the run's own.

    With --init-from the [model] table is that of the model named. Raises ConfigError.
    """
    preset, file, out, origin = (flag_value(argv, name) for name in ("preset", "config", "out", "init-from"))
    resume = flag_given(argv, "resume")
    preset = preset or ("finetune" if origin else "sample")
    tables, shape, own = preset_values(preset), {}, {}
    if resume:
        origin = None  # the run has weights of its own by now, and config.toml holds all its settings
        run = Path(out) if out else ROOT / "runs" / Path(preset).stem
        if not (run / "config.toml").is_file():
            raise ConfigError([f"--resume: {run} holds no run: give its folder with --out, or start without --resume"])
        tables = own = read_toml(run / "config.toml")
    if origin:
        from training.model_setup import origin_shape

        # The shape must be that of the weights; dropout has no weights, so the preset sets it.
        shape = origin_shape(origin)
        own = {key: value for key, value in tables.get("model", {}).items() if key == "dropout"}
        tables["model"] = shape | own
    elif "model" not in tables and preset in preset_names():
        raise ConfigError([f"--preset {preset} has no model shape: give --init-from MODEL"])
    tables = merge(tables, read_toml(Path(file))) if file else tables
    return Base(preset, tables, origin or "", shape, own)


def with_flags(argv: list[str], preset: str, tables: dict[str, Any]) -> TrainArgs:
    """Command-line flags, over the tables of a preset."""
    defaults = {"preset": preset, "model": tables.get("model", {}), "train": tables.get("train", {})}
    return parse_flags(TrainArgs, argv, defaults=defaults, examples=__doc__)


def read_args(argv: list[str]) -> tuple[TrainArgs, Config]:
    """Flags over `--config` over the preset; with --resume over the run's own settings. Reports all errors together."""
    began = time.monotonic()
    base = read_base(argv)
    tables, args = base.tables, with_flags(argv, base.preset, base.tables)
    if args.minutes or args.input:  # the machine, the time and the text choose the preset
        from training.autotune import autotune

        others: dict[str, object] = {
            "--preset": flag_value(argv, "preset"),
            "--init-from": base.origin,
            "--plan": args.plan,
        }
        others |= {"--resume": args.resume, "torchrun": "RANK" in os.environ}
        choice = autotune(args.minutes, args.input, args.data, began, [name for name, on in others.items() if on])
        print(choice.described(), file=sys.stderr)
        tables = merge(choice.tables, read_toml(args.config)) if args.config else choice.tables
        args = with_flags(argv, choice.data.name, tables).model_copy(update={"data": choice.data})
    if base.origin:  # no flag may change the shape that the weights have, or the weights
        from training.model_setup import shape_faults

        if faults := shape_faults(base.origin, base.origin_shape, args.model, args.train.ngram_start):
            raise ConfigError(faults)
    if base.own:
        from training.resume import refused_settings

        given = {name: flag_value(argv, name) for name in ("preset", "init-from")}
        if faults := refused_settings(base.own, given, args.model, args.train):
            raise ConfigError(faults)
    elif args.new_texts:
        raise ConfigError(["--new-texts goes with --resume"])
    if args.train.wandb and not find_spec("wandb"):
        raise ConfigError(["--train.wandb: the package is not installed: pip install wandb, or leave the flag out"])
    values = merge(tables, {"model": args.model.model_dump(), "train": args.train.model_dump()})
    values["preset"] = base.own.get("preset", "") if base.own else Path(args.preset).stem
    return args, build(Config, values)


def fit(config: Config, data: TokenData, run: Path, args: TrainArgs, distributed: DistributedContext) -> dict[str, Any]:
    """Train until an end condition is met; returns the summary that is printed. `run` is locked by the caller."""
    # Imported here and in `loop`: torch takes seconds to load, which --help and flag errors need not wait for.
    import torch

    from dataset import WindowSampler
    from devices import device_name, energy_meter, peak_flops, pick_precision
    from tokenizer import load_tokenizer
    from training.checkpointing import CheckpointWriter, InitialState, resumed_run
    from training.counting import Counting
    from training.metrics import RunLog, Throughput
    from training.model_setup import start_model, wrapped
    from training.optimizer import Optimizer
    from training.run_folder import newest_valid_checkpoint
    from training.schedule import clamp_schedule, total_steps
    from training.split import step_threads
    from training.state import TrainState, announce, step_settings

    # 1 data: the shards, the tokenizer they were encoded with, and the n-grams in them, which every rank counts alike
    device, tokenizer, counting = distributed.device, load_tokenizer(data.folder), Counting.of(data)
    precision, *warnings = pick_precision(config.train.precision, device)  # auto: bf16 where the hardware has it
    checkpoint = newest_valid_checkpoint(run) if args.resume or restarted() else None

    # 2 model: new, from --init-from, or from the checkpoint; the batch is sized while the device's memory is still free
    if checkpoint is None:
        config = config.model_copy(update={"init_from": args.init_from or config.init_from})
        start = InitialState(start_model(config, data, tokenizer, counting))  # random weights: by --train.seed alone
        warnings += [f"no checkpoint in {run} yet: starting from the beginning"] if args.resume else []
    else:
        start = resumed_run(checkpoint, data, tokenizer, device.type, config.model.dropout, args.new_texts)
    model, progress = start.model, start.progress
    config, train, sizes, unsplit = step_settings(config, model.config, start.state, distributed, precision)
    sampler = WindowSampler(len(data.train), sizes.block_size, train.seed)
    total = total_steps(train, sampler.per_epoch, sizes.windows_per_step, sizes.block_size)  # 0: until time is up
    train, clamped = clamp_schedule(train, total)
    module = wrapped(model.to(device), config, distributed, device)  # for the steps; `model` itself is what is saved

    # 3 optimizer: AdamW, or Muon beside it, and for fp16 a loss scaler against gradient underflow.
    optimizer = Optimizer(model, train)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    log = RunLog(
        run,
        total_steps=total,
        enabled=distributed.leader,
        tensorboard=train.tensorboard,
        wandb=run.name if train.wandb else "",
        done=progress.step if checkpoint else -1,  # rows of later steps, from before a crash, are dropped
    )
    start.restore(optimizer, scaler)  # AdamW's moments and Muon's momentum: from zero, the next updates would differ

    # 4 loop: collect its state in one object, then train step by step
    save = CheckpointWriter(run, config, data, tokenizer, model, optimizer, scaler, distributed, *sizes.per_step)
    save.step = start.state.get("step", -1)  # last/ of this step is on the disk already
    state = TrainState(
        run=run,
        config=config,
        train=train,
        precision=precision,
        data=data,
        tokenizer=tokenizer,
        counting=counting,
        distributed=distributed,
        model=model,
        module=module,
        optimizer=optimizer,
        scaler=scaler,
        sampler=sampler,
        sizes=sizes,
        total_steps=total,
        progress=progress,
        log=log,
        save=save,
        meter=Throughput(sizes.tokens_per_step, progress.elapsed_s),
        peak_flops=peak_flops(device_name(device), precision),
        energy=energy_meter(device),
    )
    announce(state, start, [*warnings, *clamped, unsplit])
    with step_threads(module):
        return loop(state, new=checkpoint is None)


def loop(state: TrainState, new: bool) -> dict[str, Any]:
    """Training loop: steps, with logging, evaluation and checkpoints at their intervals; returns the summary."""
    from training.run_folder import Stop
    from training.schedule import lr_scale
    from training.state import checkpoint, count_step, evaluate, log_sample, metrics_row, schedule_final_decay, summary
    from training.state import sync_stop_and_checkpoint as sync
    from training.step import bad_step, seed_step, take_step, training_ends

    distributed, progress, log, meter = state.distributed, state.progress, state.log, state.meter
    module, optimizer, scaler = state.module, state.optimizer, state.scaler
    batches = state.batches()  # endless, from the run's next window on
    stop = Stop()  # SIGTERM or Ctrl-C only set a flag: the current step is finished and a checkpoint saved
    stop.install()
    try:
        if new and state.train.sample_interval:
            log_sample(state)  # step 0: a sample from the untrained weights, to compare later ones with
        while True:
            # Time-limited WSD run: once the decay has to begin, the final step is computed from the measured speed.
            if state.is_time_limited:
                schedule_final_decay(state)
            train = state.train

            # Does the run end here? Clocks and signals differ between ranks, and a rank that stopped alone would leave
            # the others waiting for its gradients in all-reduce: so the ranks exchange their answers first.
            reason = training_ends(train, progress, state.total_steps, meter.elapsed_s() / 60, stop)
            reason, save_now = sync(state, reason, stop)
            if reason:
                break
            if save_now:
                checkpoint(state)

            # One step. Dropout is seeded by step and rank: a resumed run draws the masks of an uninterrupted one.
            epoch = state.epoch  # before the step: compared below to detect the end of an epoch
            with meter.step():
                seed_step(module, train, progress.step, distributed)
                scale = lr_scale(progress.step, state.total_steps, train)  # 0 to 1: share of each peak rate
                optimizer.set_lr(scale)
                module.train()  # dropout on; an evaluation may have switched it off
                loss, norm, finite = take_step(
                    module,
                    optimizer,
                    scaler,
                    batches,
                    state.sizes.grad_accum_steps,
                    train,
                    state.precision,
                    distributed,
                    state.soft_targets(),  # None unless counted n-grams teach
                )
                if not finite:  # no weight has changed: skip the step, or raise TrainingFailed after too many
                    bad_step(progress, scaler, train, loss, norm, state.run, log)
                count_step(state, loss, finite)  # progress.step and .windows now count this step

            # Due after the step, if anything: a row of metrics (with validation at its interval), sample, checkpoint.
            epoch_end = train.each_epoch and state.epoch > epoch
            eval_due = epoch_end or progress.step == state.total_steps or state.due(train.eval_interval)
            eta_s = state.eta_s()
            if eval_due or progress.step == 1 or state.due(train.log_interval):  # the first loss should be near ln(V)
                row = metrics_row(state, train.lr * scale, norm)
                progress.losses.clear()  # train_loss is the mean since the last row
                log.metrics(row | evaluate(state, epoch_end) if eval_due else row, eta_s=eta_s)
                meter.restart()  # tokens_per_s is the speed since the last row
            else:
                log.live(progress.step, progress.running_loss, meter.pace(), eta_s)  # a terminal's progress line
            if epoch_end or state.due(train.sample_interval):
                log_sample(state)
            if state.due(train.checkpoint_interval):
                checkpoint(state)

        # The end: last/ for --resume, and best/ even if no validation has run, as other commands read best/.
        if progress.step != state.save.step:
            checkpoint(state)
        if not math.isfinite(progress.best_val):
            state.save(progress, best=True)
    finally:  # also after a failed step or a second Ctrl-C: metrics so far are flushed
        stop.restore()
        log.close()
    return summary(state, reason)


def restarted() -> bool:
    """Whether torchrun has restarted this process after a failure; it then resumes even without --resume."""
    return bool(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))


def main(argv: list[str] | None = None) -> int:
    """Train; exit code 0 when done or stopped on request, 1 when training failed, 2 for bad settings."""
    words = sys.argv[1:] if argv is None else list(argv)
    return run_main(lambda: _main(words))


def _main(words: list[str]) -> int:
    args, config = read_args(words)
    if args.plan:
        from training.plan_report import show_plan

        show_plan(args.preset, config, args.data, args.plan, args.price_per_hour)
        return 0
    from devices import DistributedContext, keep_memory, pick_device
    from training.metrics import finish
    from training.run_folder import unread_texts

    if not any(flag_given(words, name) for name in ("preset", "config", "data", "input", "resume", "init-from")):
        print(unread_texts(), end="", file=sys.stderr)
    device = pick_device(config.train.device)
    if device.type == "cpu":
        keep_memory()  # saves a tenth of each step's time
    distributed = DistributedContext.join(config.train.parallel, device)
    try:
        summary = train_in_folder(args, config, distributed)
        if distributed.leader:
            finish(summary)
    finally:
        distributed.leave()
    return 0


def train_in_folder(args: TrainArgs, config: Config, distributed: DistributedContext) -> dict[str, Any]:
    """Find or prepare the data, choose and lock the run folder, train. Raises ConfigError if it already holds a run."""
    from corpus.preparation import default_out
    from dataset import TokenData
    from training.checkpointing import description
    from training.run_folder import free_run_folder, locked, prepared

    folder = args.data
    if args.resume and folder is None and config.data_folder:
        folder = Path(config.data_folder)
    if distributed.leader:  # the other ranks wait at the barrier until the data is there
        folder = prepared(folder, args.preset)
    distributed.barrier()
    folder = folder or default_out(args.preset)
    data = TokenData.open(folder)
    named = ROOT / "runs" / Path(args.preset).stem
    run = args.out or (named if args.resume else free_run_folder(args.preset, restarted()))
    run = distributed.broadcast(run)
    if (run / "config.toml").exists() and not (args.resume or restarted()):
        raise ConfigError([f"--out {run}: already holds a run: add --resume to continue it, or give another --out"])
    distributed.barrier()  # all ranks have looked before the leader writes there
    config = config.model_copy(update={"data_folder": str(folder.absolute())})
    if not args.resume and folder.absolute() != default_out(args.preset).absolute():  # not the preset's own texts
        config = config.model_copy(update={"description": description(args.init_from, data.manifest.source.name)})
    with locked(run) if distributed.leader else contextlib.nullcontext():
        return fit(config, data, run, args, distributed)


if __name__ == "__main__":
    sys.exit(main())
