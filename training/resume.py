"""What a resumed run may change: every setting given beside `--resume` is applied, or refused by name before anything is written.

>>> faults = refused_settings(own, given, args)                       # own: the run's config.toml
>>> start = resumed_run(checkpoint, data, tokenizer, "cpu", dropout, new_texts=False)    # exactly as saved
>>> notes += schedule_notes(own_train, train, step, total_before, total)
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import ConfigError, ModelConfig, TrainConfig, preset_values
from training.checkpointing import InitialState, Progress, content_of
from training.schedule import lr_scale

if TYPE_CHECKING:
    from dataset import TokenData
    from storage.shards import Manifest
    from tokenizer import Tokenizer

FREE_SHAPE = ("dropout", "vocab_used")  # settings of the model that have no weights
FIXED_TRAIN = ("optimizer", "seed")  # the moments are one optimizer's, and the seed orders the texts
KEPT = ("step", "elapsed_s", "energy_j", "skipped")  # what progress keeps where the texts are others


def refused_settings(
    own: dict[str, Any], given: dict[str, str | None], model: ModelConfig, train: TrainConfig
) -> list[str]:
    """What cannot go on from the run's checkpoint, each with its flag.

    own: the run's config.toml. given: `--preset` and `--init-from` as they were given. model, train: the settings asked for.
    """
    faults = []
    if (preset := given["preset"]) and not _is_preset(preset, own):
        faults.append(f"--preset {preset}: this run was begun with other settings: leave it out, or give single flags")
    if (origin := given["init-from"]) and origin != own.get("init_from"):
        faults.append(f"--init-from {origin}: this run has weights of its own: leave it out, or give another --out")
    tables = (("model", model, ModelConfig, None), ("train", train, TrainConfig, FIXED_TRAIN))
    for table, wanted, kind, names in tables:
        before = kind(**own.get(table, {})).model_dump()
        for name, value in wanted.model_dump().items():
            fixed = name in names if names else name not in FREE_SHAPE
            if fixed and value != before[name]:
                faults.append(
                    f"--{table}.{name.replace('_', '-')} {value}: this run has {before[name]}, which cannot change: leave it "
                    "out, or begin another run with --init-from and another --out"
                )
    return faults


def _is_preset(preset: str, own: dict[str, Any]) -> bool:
    """Whether a run was begun with this preset; of runs that do not say, whether it has its shape."""
    if own.get("preset"):
        return Path(preset).stem == Path(str(own["preset"])).stem
    shape = preset_values(preset).get("model", {})
    held = own.get("model", {})
    return all(held.get(name) == value for name, value in shape.items() if name not in ("dropout", "vocab_size"))


def resumed_run(
    checkpoint: Path, data: TokenData, tokenizer: Tokenizer, device: str, dropout: float, new_texts: bool
) -> InitialState:
    """Model, progress and training state of a checkpoint, with this rate of dropout.

    Raises ConfigError if the data has another tokenizer, or, unless they are `new_texts`, other texts.
    """
    import torch

    from checkpoint import load_model, load_training

    model, kept = load_model(checkpoint, dropout=dropout)
    if kept.fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            [f"--data {data.folder}: not the tokenizer this run was trained with: give the run's own data"]
        )
    state = load_training(checkpoint, verify=False)  # its checksums were compared when it was found
    start = InitialState(model, Progress.from_state(state["progress"]), checkpoint, state)
    start.notes = check_texts(start, data.manifest, data.folder, new_texts)
    start.notes += thread_notes(state, device, torch.get_num_threads())
    return start


def check_texts(start: InitialState, manifest: Manifest, folder: Path, accepted: bool) -> list[str]:
    """Whether a run goes on with its own texts; notes for the log. With other texts, which have to be `accepted`, the
    progress begins anew where it speaks of them. Raises ConfigError."""
    held = start.state.get("texts", "")
    if not held or held == content_of(manifest):
        return ["--new-texts: these are the run's own texts, and nothing begins anew"] if held and accepted else []
    if not accepted:
        raise ConfigError(
            [
                f"--data {folder}: other texts than this run was trained on ({manifest.splits.train.tokens:,} training tokens, "
                f"before {start.state.get('train_tokens', 0):,}): give its own, or add --new-texts, with which the position in "
                "the texts, epochs, best/ and patience begin anew"
            ]
        )
    start.progress = begun_anew(start.progress)
    return ["--new-texts: the position in the texts, epochs, best/ and patience begin anew"]


def begun_anew(progress: Progress) -> Progress:
    """Progress that keeps steps and time, and nothing of what was measured on the old texts."""
    kept = {field.name: getattr(progress, field.name) for field in fields(progress) if field.name in KEPT}
    return replace(type(progress)(), **kept)


def thread_notes(state: dict[str, Any], device: str, threads: int) -> list[str]:
    """A note where a run on processors goes on with another number of threads, which changes the order of sums.

    Steps in parts (`--train.parts`) are summed in the order of the parts, however many threads there are.
    """
    before = state.get("threads", threads)
    if device != "cpu" or before == threads or state.get("parts", 1) > 1:
        return []
    return [
        f"{before} threads before, {threads} now: sums are formed in another order, and the weights will not be those of an "
        f"uninterrupted run bit for bit (OMP_NUM_THREADS={before} would keep them)"
    ]


def schedule_notes(before: TrainConfig, now: TrainConfig, step: int, total_before: int, total: int) -> list[str]:
    """What becomes of the learning rate where a run goes on with another end or another schedule."""
    if not step or (total_before, _schedule(before)) == (total, _schedule(now)):
        return []
    last = before.lr * lr_scale(min(step, total_before or step) - 1, total_before, before)
    first = (
        now.lr * lr_scale(step, total, now) if not total or step < total else now.lr * lr_scale(total - 1, total, now)
    )
    if math.isclose(last, first, rel_tol=0.05):
        return []
    end = f"{now.lr * lr_scale(total - 1, total, now):.3g} at step {total:,}" if total else "its end, when time is up"
    return [
        f"the learning rate goes from {last:.3g} to {first:.3g} and then by --train.schedule {now.schedule} to {end}"
        + (
            f": to go on without a jump, give --train.schedule constant --train.lr {last:.3g}, or wsd with the same rate for a "
            "new decay"
            if first > last
            else ""
        )
    ]


def _schedule(train: TrainConfig) -> tuple[Any, ...]:
    return train.schedule, train.lr, train.min_lr, train.warmup_steps, train.decay_fraction
