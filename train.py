"""Train a model: on one device, or on many under torchrun.

    python train.py                                              # the sample stories, about three minutes
    python train.py --preset story-small --data data/novels --train.max-steps 200
    python train.py --resume --out runs/story-small              # go on where it stopped, exactly
    python train.py --init-from gpt2 --data data/mine             # go on training another model, on your texts
    python train.py --input my_books/ --minutes 10               # one dial: everything else is chosen for you
    torchrun --standalone --nproc_per_node=8 train.py --preset victorian

Every run is a folder: config.toml, metrics.jsonl, samples.jsonl, loss.png, tensorboard/, best/ and last/ (model folders).
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cli import flag_value, parse_flags, run_main
from config import (
    ROOT,
    Config,
    ConfigError,
    ModelConfig,
    Strict,
    TrainConfig,
    build,
    merge,
    preset_names,
    preset_values,
    read_toml,
    to_toml,
)

if TYPE_CHECKING:
    from dataset import TokenData
    from devices import Team
    from model import GPT
    from tokenizer import Tokenizer


class TrainArgs(Strict):
    """Train a GPT-2-style model. Without flags: the repository's own short stories, about three minutes."""

    preset: str = "sample"
    """Settings to start from: a name from presets/, or a .toml file; with --init-from: finetune."""
    config: Path | None = None
    """A TOML file laid over the preset."""
    data: Path | None = None
    """Folder written by prepare_data.py, or s3://…; none: the preset's own texts, prepared at first use.

    With --input: the folder to prepare them in."""
    out: Path | None = None
    """Run folder; none: runs/PRESET, numbered where that is taken."""
    resume: bool = False
    """Go on from the newest complete checkpoint in the run folder."""
    init_from: str = ""
    """Start from the weights of a model folder (ours or a GPT-2 of transformers), or of a hub id; its shape counts."""
    plan: str = ""
    """Print parameters, memory, speed, time and cost instead of training: `here`, a GPU's name, or p4d.24xlarge."""
    price_per_hour: float = 0.0
    """With --plan: what the machine costs an hour."""
    minutes: float = Field(0.0, ge=0.0)
    """One dial: measure this machine, choose everything else for the best model after so many minutes, and train it."""
    input: tuple[str, ...] = ()
    """With --minutes: the texts (files, folders, globs), prepared first; or give --data."""
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig(max_steps=1000)


def sample(model: GPT, tokenizer: Tokenizer, config: Config, step: int) -> dict[str, Any]:
    """A text from the model as it is now; its seed is fixed, so that samples of different steps compare."""
    from inference.writing import generate
    from training.step import eval_mode

    params = config.generation.model_copy(
        update={"max_tokens": config.train.sample_tokens, "seed": 1, "n": 1, "stop": ()}
    )
    with eval_mode(model):
        text = generate(model, tokenizer, config.train.sample_prompt, params)[0].text
    return {"step": step, "prompt": config.train.sample_prompt, "text": text, "seed": 1}


def read_args(argv: list[str]) -> tuple[TrainArgs, Config]:
    """Flags over `--config` over the preset; with --resume over the run's own settings. All faults at once."""
    began = time.monotonic()
    preset, file, out = (flag_value(argv, name) for name in ("preset", "config", "out"))
    origin = flag_value(argv, "init-from") or flag_value(argv, "init_from")
    preset = preset or ("finetune" if origin else "sample")
    tables, theirs = preset_values(preset), {}
    if "--resume" in argv:
        origin = None  # the run has weights of its own by now
        run = Path(out) if out else ROOT / "runs" / Path(preset).stem
        if not (run / "config.toml").is_file():
            raise ConfigError([f"--resume: {run} holds no run: give its folder with --out, or start without --resume"])
        tables = read_toml(run / "config.toml")
    if origin:
        from training.model_setup import origin_shape

        theirs = origin_shape(origin)
        own = {key: value for key, value in tables.get("model", {}).items() if key == "dropout"}
        tables["model"] = theirs | own
    elif "model" not in tables and preset in preset_names():
        raise ConfigError([f"--preset {preset} has no shape of its own: give --init-from MODEL"])
    if file:
        tables = merge(tables, read_toml(Path(file)))
    given = {"preset": preset, "model": tables.get("model", {}), "train": tables.get("train", {})}
    words = [*argv]
    if words and "--plan" in words and (words[-1] == "--plan" or words[words.index("--plan") + 1].startswith("-")):
        words.insert(words.index("--plan") + 1, "here")
    args = parse_flags(TrainArgs, words, defaults=given)
    if args.minutes or args.input:
        from training.autotune import turn

        alone = {"--preset": flag_value(argv, "preset") or "", "--init-from": origin or "", "--plan": args.plan}
        others = [name for name, on in alone.items() if on] + ["--resume"] * args.resume
        others += ["torchrun"] * ("RANK" in os.environ)
        tables, folder = turn(args.minutes, args.input, args.data, began, others)
        tables = merge(tables, read_toml(Path(file))) if file else tables
        given = {"preset": folder.name, "model": tables["model"], "train": tables["train"]}
        args = parse_flags(TrainArgs, words, defaults=given).model_copy(update={"data": folder})
    if origin:
        from training.model_setup import shape_faults

        if faults := shape_faults(origin, theirs, args.model):
            raise ConfigError(faults)
    if args.train.wandb and not find_spec("wandb"):
        raise ConfigError(["--train.wandb: the package is not installed: pip install wandb, or leave the flag out"])
    values = merge(tables, {"model": args.model.model_dump(), "train": args.train.model_dump()})
    return args, build(Config, values)


def fit(config: Config, data: TokenData, run: Path, args: TrainArgs, team: Team) -> dict[str, Any]:
    """Train until an end is reached; returns the summary that is printed. `run` is locked by the caller."""
    import torch

    from checkpoint import load_model, load_training
    from dataset import Windows, training_batches
    from devices import device_name, energy_meter, gpu_memory, peak_flops, pick_precision, seed_dropout
    from storage.atomic import replace_text
    from tokenizer import load_tokenizer
    from training.checkpointing import Progress, Saver, bits_per_byte
    from training.metrics import RunLog, announce, duration, time_left
    from training.model_setup import kept_batch, start_model, whole_model, wrapped
    from training.optimizer import Optimizer, clock_end, lr_scale
    from training.run_folder import Stop, last_good
    from training.step import bad_step, grad_accum_steps, step_seed, take_step, total_steps, training_ends, validate

    device, train = team.device, config.train
    precision, warning = pick_precision(train.precision, device)
    warnings = [warning] if warning else []
    tokenizer = load_tokenizer(data.folder)
    progress, start = Progress(), None
    state: dict[str, Any] = {}
    if args.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        start = last_good(run)
    if start is not None:
        model, kept = load_model(start)
        if kept.fingerprint != tokenizer.fingerprint:
            raise ConfigError(
                [f"--data {data.folder}: not the tokenizer this run was trained with: give the run's own data"]
            )
        state = load_training(start, verify=False)
        progress = Progress(**state["progress"])
    else:
        config = config.model_copy(update={"init_from": args.init_from or config.init_from})
        model = start_model(config, data, tokenizer)
        if args.resume:
            warnings.append(f"no checkpoint in {run} yet: beginning anew")
    config = config.model_copy(update={"model": model.config})
    block = model.config.block_size
    batch = train.batch_size or state.get("batch", 0)
    if not batch:
        from training.plan import largest_batch

        batch = team.same(largest_batch(model.config, train, block, team.size, device, precision))
    if state and not train.tokens_per_step:  # whatever the number of processes is now
        train = train.model_copy(update={"tokens_per_step": state.get("tokens_per_step", 0)})
        batch = kept_batch(train.tokens_per_step, batch, block, team.size)
    micro = grad_accum_steps(train, batch, block, team.size)
    windows = Windows(len(data.train), block, train.seed)
    per_step = micro * batch * team.size
    tokens_per_step = per_step * block
    total = total_steps(train, windows.per_epoch, per_step, block)
    if total and train.warmup_steps >= total:
        train = train.model_copy(update={"warmup_steps": max(1, total // 10)})
        warnings.append(f"warm-up shortened to {train.warmup_steps} of {total} steps")
    if train.min_lr > train.lr:
        train = train.model_copy(update={"min_lr": train.lr / 10})
        warnings.append(f"--train.min-lr is above --train.lr {train.lr:g}: lowered to {train.min_lr:g}")
    model.to(device)
    module = wrapped(model, config, team, device)
    optimizer = Optimizer(model, train)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    log = RunLog(
        run,
        total_steps=total,
        enabled=team.leader,
        tensorboard=train.tensorboard,
        wandb=run.name if train.wandb else "",
        done=progress.step if start else -1,
    )
    if start is not None:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        log.say(f"resumed at step {progress.step} from {start}")
        if state["world"] != team.size:
            log.say(
                f"note: {state['world']} processes before, {team.size} now: sums are formed in another order from here on"
            )
    if team.leader:  # of a resumed run, too: the next --resume goes on with the flags of this one
        replace_text(run / "config.toml", to_toml(config))
    save = Saver(run, config, data, tokenizer, model, optimizer, scaler, team, batch, tokens_per_step)
    for warning in warnings:
        log.say(f"warning: {warning}")
    announce(log, model, data, precision, device_name(device), tokens_per_step, total)

    batches = training_batches(
        data.train,
        windows,
        batch_size=batch,
        micro_steps=micro,
        first=progress.windows,
        rank=team.rank,
        world=team.size,
        device=device,
    )
    peak = peak_flops(device_name(device), precision)
    energy = energy_meter(device)
    stop = Stop()
    stop.install()
    began = saved_at = logged_at = time.monotonic()
    elapsed_before, energy_before, reason, stopped = progress.elapsed_s, progress.energy_j, "", False
    busy = 0.0  # seconds in steps since the last log line, without evaluation, samples and checkpoints
    session_steps = busy_steps = 0
    all_busy = all_tokens = look_s = 0.0
    by_clock = not total and train.schedule == "wsd"

    def checkpoint() -> None:
        """last/, and what the run has used so far."""
        progress.elapsed_s = elapsed_before + time.monotonic() - began
        progress.energy_j = energy_before + team.total([energy() if energy else 0.0])[0]
        save(progress, best=False)

    def look(at_epoch_end: bool) -> dict[str, Any]:
        """Validation and best/, at an interval or an epoch's end."""
        nonlocal look_s
        tick = time.monotonic()
        found = validate(module, data.val, block, batch, precision, team, train.eval_tokens)
        progress.stale = 0 if found < progress.best_val - train.min_improvement else progress.stale + 1
        progress.val_loss = found
        if found < progress.best_val:
            progress.best_val, progress.best_step = found, progress.step
            save(progress, best=True)
        row = {"val_loss": found, "val_bpb": bits_per_byte(found, data), "best_val_loss": progress.best_val}
        if at_epoch_end and progress.epoch_steps:
            mean = progress.epoch_loss / progress.epoch_steps
            progress.best_epoch_loss = min(progress.best_epoch_loss, mean)
            row |= {
                "epoch": progress.windows / windows.per_epoch,
                "epoch_loss": mean,
                "best_epoch_loss": progress.best_epoch_loss,
            }
            progress.epoch_loss, progress.epoch_steps = 0.0, 0
        look_s = time.monotonic() - tick
        return row

    def look_at_text() -> None:
        """A sample into the log; under FSDP from gathered weights."""
        plain = whole_model(model, team)
        if team.leader:
            log.sample(sample(plain, tokenizer, config, progress.step))

    try:
        if start is None and train.sample_interval:
            look_at_text()
        while True:
            now = time.monotonic()
            if by_clock:
                reserve_s = look_s + 4 * save.seconds / max(1, save.folders)  # best/ and, with its moments, last/
                total = team.same(clock_end(progress.step, now - began + elapsed_before, reserve_s, train))
                if total:  # from here on a run of so many steps
                    by_clock, log.total = False, total
                    train = train.model_copy(update={"max_steps": total, "max_minutes": 0.0})
                    save.config = config = config.model_copy(update={"train": train})
                    if team.leader:
                        replace_text(run / "config.toml", to_toml(config))
                    log.say(f"step {progress.step}: the learning rate falls from here to the end, step {total}")
            reason = training_ends(train, progress, total, (now - began + elapsed_before) / 60, stop)
            timer = team.leader and 0 < train.checkpoint_minutes * 60 < now - saved_at
            ends, stops, due = team.total([float(bool(reason)), float(bool(stop.reason)), float(timer)])
            stopped = stops > 0
            if ends:
                reason = reason or "another process stopped"
                break
            if due:
                checkpoint()
                saved_at = time.monotonic()
            tick = time.monotonic()
            seed_dropout(device, step_seed(train.seed, progress.step, team.rank))
            scale = lr_scale(progress.step, total, train)
            optimizer.set_lr(scale)
            module.train()
            loss, norm, finite = take_step(module, optimizer, scaler, batches, micro, train, precision, team)
            if not finite:
                bad_step(progress, scaler, train, loss, norm, run, log)
            epoch_before = progress.windows // windows.per_epoch
            progress.windows += per_step
            progress.step += 1
            if finite:
                if progress.spike(loss):
                    average = progress.running_loss
                    log.say(f"warning: step {progress.step}: loss {loss:.3f} is far above its average {average:.3f}")
                progress.count(loss)
            spent = time.monotonic() - tick
            if session_steps >= 2:  # the first steps compile and warm caches
                busy, busy_steps = busy + spent, busy_steps + 1
                all_busy, all_tokens = all_busy + spent, all_tokens + tokens_per_step
            session_steps += 1

            last = bool(total) and progress.step == total
            epoch_end = train.each_epoch and progress.windows // windows.per_epoch > epoch_before
            due = epoch_end or last or bool(train.eval_interval and progress.step % train.eval_interval == 0)
            speed = busy_steps * tokens_per_step / busy if busy else None
            pace = speed or tokens_per_step / spent
            used_s = elapsed_before + time.monotonic() - began
            eta = time_left((total or math.inf) - progress.step, pace / tokens_per_step, train.max_minutes, used_s)
            if due or progress.step % train.log_interval == 0 or progress.step == 1:
                row: dict[str, Any] = {
                    "step": progress.step,
                    "tokens": progress.windows * block,
                    "train_loss": sum(progress.losses) / len(progress.losses) if progress.losses else None,
                    "avg_loss": progress.running_loss if math.isfinite(progress.running_loss) else None,
                    "best_avg_loss": progress.best_average if math.isfinite(progress.best_average) else None,
                    "lr": train.lr * scale,
                    "grad_norm": norm if math.isfinite(norm) else None,
                    "tokens_per_s": speed,
                    "seconds_per_batch": tokens_per_step / speed if speed else None,
                    "mfu": speed * model.flops_per_token() / (peak * team.size) if peak and speed else None,
                    "gpu_memory_gb": gpu_memory(device),
                    "elapsed_s": round(used_s, 3),
                }
                progress.losses = []
                if due:
                    row |= look(epoch_end)
                log.metrics(row, eta_s=eta)
                busy, busy_steps = 0.0, 0
            elif time.monotonic() - logged_at > 0.3:
                logged_at = time.monotonic()
                log.live(progress.step, progress.running_loss, pace, eta)
            if epoch_end or (train.sample_interval and progress.step % train.sample_interval == 0):
                look_at_text()
            if train.checkpoint_interval and progress.step % train.checkpoint_interval == 0:
                checkpoint()
                saved_at = time.monotonic()
        if progress.step not in (save.step, state.get("step")):
            checkpoint()
        if not math.isfinite(progress.best_val):  # never evaluated: the last weights are the best known
            save(progress, best=True)
    finally:
        stop.restore()
        log.close()
    return {
        "reason": reason,
        "run": str(run),
        "steps": progress.step,
        "tokens": progress.windows * block,
        "best_val_loss": progress.best_val if math.isfinite(progress.best_val) else None,
        "best_step": progress.best_step,
        "time": duration(progress.elapsed_s),
        "tokens_per_s": round(all_tokens / all_busy) if all_busy else None,
        "gpu_memory_gb": gpu_memory(device),
        "energy_kwh": progress.energy_j / 3.6e6 if energy else None,
        "checkpoint_s": round(save.seconds, 2),
        "folders_written": save.folders,
        "done": not stopped,
    }


def main(argv: list[str] | None = None) -> int:
    """Train; exit code 0 when done or stopped on request, 1 when training failed, 2 for bad settings."""
    words = sys.argv[1:] if argv is None else list(argv)
    return run_main(lambda: _main(words))


def _main(words: list[str]) -> int:
    args, config = read_args(words)
    if args.plan:
        from training.plan import main_plan

        return main_plan(args.preset, config, args.data, args.plan, args.price_per_hour)
    from corpus.preparation import default_out
    from devices import Team, keep_memory, pick_device
    from training.run_folder import free_run_folder, locked, prepared

    device = pick_device(config.train.device)
    if device.type == "cpu":
        keep_memory()
    restart = bool(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
    team = Team.join(config.train.parallel, device)
    try:
        folder = args.data
        if args.resume and folder is None and config.data_folder:
            folder = Path(config.data_folder)
        if team.leader:
            folder = prepared(folder, args.preset)
        team.barrier()
        folder = folder or default_out(args.preset)
        from dataset import TokenData

        data = TokenData.open(folder)
        run = args.out or (
            ROOT / "runs" / Path(args.preset).stem if args.resume else free_run_folder(args.preset, restart)
        )
        run = team.same(run)
        if (run / "config.toml").exists() and not (args.resume or restart):
            raise ConfigError(
                [f"--out {run}: already holds a run: add --resume to go on with it, or give another --out"]
            )
        team.barrier()  # all have looked before the leader writes there
        config = config.model_copy(update={"data_folder": str(folder)})
        with locked(run) if team.leader else contextlib.nullcontext():
            summary = fit(config, data, run, args, team)
        if team.leader:
            from training.metrics import finish

            finish(summary)
    finally:
        team.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
