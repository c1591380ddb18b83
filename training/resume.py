"""What a resumed run may change: every setting given beside `--resume` is applied, or refused by name before anything is written.

>>> faults = refused_settings(own, given, model, train)               # own: the run's config.toml
>>> anew, notes = check_texts(state, data.manifest, folder, False)    # raises ConfigError for other texts
>>> notes += schedule_notes(own_train, train, step, total_before, total)
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import ConfigError, ModelConfig, TrainConfig, preset_values
from training.schedule import lr_scale

if TYPE_CHECKING:
    from storage.shards import Manifest

FREE_SHAPE = ("dropout", "vocab_used")  # settings of the model that have no weights
FIXED_TRAIN = (
    "optimizer",
    "seed",
    "ngram_start",
)  # moments, the order of the texts and the first weights are what they are


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
            if fixed and value != before[name] and (name, value) != ("vocab_size", 0):  # 0: the tokenizer's
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


def content_of(manifest: Manifest) -> str:
    """sha256 (hex) over the shards: prepared anew, the same texts are the same, whenever and wherever they were."""
    splits = (manifest.splits.train, manifest.splits.val)
    return hashlib.sha256(
        json.dumps([[shard.sha256 for shard in split.shards] for split in splits]).encode()
    ).hexdigest()


def check_texts(state: dict[str, Any], manifest: Manifest, folder: Path, accepted: bool) -> tuple[bool, list[str]]:
    """(whether the progress has to begin anew, since the texts are others than the checkpoint's, notes for the log).

    state: the checkpoint's training state. Raises ConfigError where they are others and not `accepted`.
    """
    held = state.get("texts", "")
    if not held or held == content_of(manifest):
        return False, ["--new-texts: these are the run's own texts, and nothing begins anew"] if accepted else []
    if not accepted:
        raise ConfigError(
            [
                f"--data {folder}: other texts than this run was trained on ({manifest.splits.train.tokens:,} training tokens, "
                f"before {state.get('train_tokens', 0):,}): give its own, or add --new-texts, with which the position in "
                "the texts, epochs, best/ and patience begin anew"
            ]
        )
    return True, ["--new-texts: the position in the texts, epochs, best/ and patience begin anew"]


def thread_notes(state: dict[str, Any], device: str, threads: int) -> list[str]:
    """A note where a run on processors goes on with another number of threads, which changes the order of sums."""
    before = state.get("threads") or threads
    if device != "cpu" or before == threads:
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
