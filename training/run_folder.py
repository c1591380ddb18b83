"""A run's folder: its name, its lock, its newest checkpoint; the texts it trains on; and the request to stop.

>>> with locked(run):
...     stop = Stop()
...     stop.install()
"""

from __future__ import annotations

import contextlib
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config import ROOT, ConfigError, preset_values
from storage.atomic import exclusive_lock


def newest_valid_checkpoint(run: Path) -> Path | None:
    """The newest undamaged checkpoint of a run; None if it was stopped before its first one.

    Raises CheckpointError if all are damaged: starting over would overwrite files that may be recoverable.
    """
    from checkpoint import CHECKPOINT_NAME, CheckpointError, newest_checkpoint

    found = newest_checkpoint(run)
    if found is None and run.is_dir() and any(CHECKPOINT_NAME.fullmatch(path.name) for path in run.iterdir()):
        raise CheckpointError(
            f"--resume: no intact checkpoint in {run}: copy one back there, or continue from the weights of a model folder: "
            f"--init-from {run / 'best'} with another --out"
        )
    return found


def free_run_folder(preset: str, restart: bool) -> Path:
    """runs/PRESET, or the first of runs/PRESET-2, -3 … that is free; after an elastic restart the newest taken one."""
    base = ROOT / "runs" / Path(preset).stem
    names = [base, *(base.with_name(f"{base.name}-{number}") for number in range(2, 10_000))]
    taken = [name for name in names if (name / "config.toml").exists()]
    if restart and taken:
        return max(taken, key=lambda path: (path / "config.toml").stat().st_mtime)
    return next(name for name in names if not (name / "config.toml").exists())


@dataclass
class Stop:
    """Set by SIGTERM or Ctrl-C: finish the step, save, end. A second Ctrl-C stops at once."""

    reason: str = ""
    previous: dict[int, Any] = field(default_factory=dict)

    def install(self) -> None:
        def handle(number: int, frame: Any) -> None:
            if self.reason and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.reason = signal.Signals(number).name

        with contextlib.suppress(ValueError):  # only the main thread may install handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous[number] = signal.signal(number, handle)

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def locked(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Hold the run folder: a second train.py on it gets an error. The lock is released when the process exits, even after a crash."""
    refusal = f"--out {folder}: another train.py is writing there: stop it, or give another --out"
    return exclusive_lock(folder / ".lock", refusal)


def unread_texts() -> str:
    """A line for those who expect `python train.py` to read the files they put into data/; empty if there are none."""
    found = sorted(path.name for path in (ROOT / "data").glob("*.txt"))
    if not found:
        return ""
    names = ", ".join(f"data/{name}" for name in found[:3]) + (" …" if len(found) > 3 else "")
    return (
        f"found {names}, which this run does not read: it learns the sample stories. Train on your own with\n"
        "    python train.py --preset starter\n"
    )


def prepared(folder: Path | None, preset: str) -> Path:
    """The data folder to train on; the preset's own texts are prepared first if need be (by the leader alone)."""
    if folder is not None and str(folder).startswith("s3:"):
        from storage.s3 import download_folder, s3_url

        target = ROOT / "data" / "s3" / s3_url(folder).removeprefix("s3://")
        download_folder(s3_url(folder), target)
        return target
    if folder is not None:
        if not (folder / "manifest.json").is_file():
            raise ConfigError(
                [
                    f"--data {folder}: no manifest.json there: prepare it with `python prepare_data.py --input my_books/ --out {folder}`"
                ]
            )
        return folder
    from corpus.preparation import default_out, prepare_preset

    target = default_out(preset)
    source = str(preset_values(preset).get("data", {}).get("source", ""))
    if not source and not (target / "manifest.json").is_file():
        raise ConfigError(
            [
                f"--preset {preset} has no texts of its own: prepare yours with `python prepare_data.py "
                f"--input my_books/ --out data/mine` and add --data data/mine"
            ]
        )
    local = source.endswith(".txt")
    if local or not (target / "manifest.json").is_file():  # local texts may have changed since
        prepare_preset(preset, target)
    return target
