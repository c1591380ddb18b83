"""Training runs in the app: reading what they log; starting, stopping and resuming `train.py` processes.

    >>> run = start("novels", preset="story-nano", texts={"emma.txt": b"..."})
    >>> run = start("novels", minutes=10, texts={"emma.txt": b"..."})         # train.py --minutes
    >>> runs(folder)[0].rows[-1]["train_loss"]

A process continues when the tab or the app is closed; everything about it is read from its run folder.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import ROOT, ConfigError, read_toml
from training.console import duration
from training.metrics import METRICS, SAMPLES, read_jsonl, time_left

LOG = "app.log"
PROCESS = "process.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")


class TrainingError(ValueError):
    """A run cannot be started, stopped or resumed; the message gives the reason."""


@dataclass(frozen=True)
class Run:
    """A run folder."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def rows(self) -> list[dict[str, Any]]:
        """The logged rows (keys with units: see docs/training.md)."""
        return list(read_jsonl(self.path / METRICS))

    def samples(self) -> list[dict[str, Any]]:
        return list(read_jsonl(self.path / SAMPLES))

    def config(self) -> dict[str, Any]:
        """The run's config.toml; empty before it is written."""
        with contextlib.suppress(ConfigError):
            return read_toml(self.path / "config.toml")
        return {}

    def total_steps(self) -> int:
        """Steps of the whole run; 0 where only a time limit ends it."""
        return int(self.config().get("train", {}).get("max_steps", 0))

    def progress(self, last: Mapping[str, Any]) -> tuple[float, float | None]:
        """(share done, seconds left or None) at the logged row `last`, by steps or by time, whichever ends first."""
        train = self.config().get("train", {})
        total, minutes = int(train.get("max_steps", 0)), float(train.get("max_minutes", 0))
        step, used_s = int(last.get("step", 0)), float(last.get("elapsed_s", 0.0))
        share = max(step / total if total else 0.0, used_s / (minutes * 60) if minutes else 0.0)
        left = None
        if step and used_s:
            left = time_left(max(0, total - step) if total else math.inf, step / used_s, minutes, used_s)
        return min(1.0, share), left

    def position(self, last: Mapping[str, Any]) -> str:
        """How far the logged row `last` is, in words, by what the share of `progress` counts."""
        train = self.config().get("train", {})
        total, limit_s = int(train.get("max_steps", 0)), float(train.get("max_minutes", 0)) * 60
        step, used_s = int(last.get("step", 0)), float(last.get("elapsed_s", 0.0))
        if limit_s and used_s / limit_s > (step / total if total else 0.0):
            return f"step {step:,}, {duration(used_s)} of {duration(limit_s)}"
        return f"step {step:,}" + (f" of {total:,}" if total else "")

    def running(self) -> bool:
        """Whether a process has locked the run folder, or one that the app started has not got that far yet."""
        return self.locked() or self.process() is not None

    def locked(self) -> bool:
        """Whether a training process holds the lock of the run folder."""
        import filelock

        path = self.path / ".lock"
        if not path.is_file():
            return False
        try:
            with filelock.FileLock(path).acquire(timeout=0):
                return False
        except filelock.Timeout:
            return True

    def process(self) -> Any:
        """The process that the app started for this run, if it is still alive (a psutil.Process)."""
        import psutil

        try:
            kept = json.loads((self.path / PROCESS).read_text("utf-8"))
            found = psutil.Process(kept["pid"])
            if abs(found.create_time() - kept["created"]) > 1.0 or found.status() == psutil.STATUS_ZOMBIE:
                return None
        except (OSError, ValueError, KeyError, psutil.Error):
            return None
        return found

    def resumable(self) -> bool:
        """Whether there is a checkpoint to resume from and steps are left."""
        if self.running() or not any(self.path.glob("last*/training_state*")):
            return False
        rows = self.rows()
        return not rows or not self.total_steps() or rows[-1]["step"] < self.total_steps()

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of the process's output."""
        path = self.path / LOG
        if not path.is_file():
            return ""
        text = path.read_bytes()[-20_000:].decode("utf-8", "replace")
        return "\n".join(text.replace("\r", "\n").rstrip().split("\n")[-lines:])

    def last_change(self) -> float:
        """When it last logged something, in seconds since 1970."""
        files = [self.path / name for name in (METRICS, LOG, "config.toml")]
        return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def runs(folder: Path) -> list[Run]:
    """All runs, the newest first."""
    marks = (METRICS, "config.toml", LOG)
    found = [Run(path) for path in folder.glob("*/") if any((path / mark).is_file() for mark in marks)]
    return sorted(found, key=Run.last_change, reverse=True)


# Suffixes of books that can be uploaded: those of `corpus.readers.registry`, which takes a second to load.
BOOKS = (".txt", ".md", ".epub", ".docx", ".html", ".htm", ".xhtml", ".fb2", ".odt", ".rtf")


def free_name(folder: Path, name: str) -> str:
    """`name`, or `name-2`, `name-3` … if a folder or text of that name exists."""
    taken = {name for path in folder.glob("*") for name in (path.name, path.stem)}
    candidates = [name, *(f"{name}-{number}" for number in range(2, 1000))]
    return next(candidate for candidate in candidates if candidate not in taken)


def save_texts(folder: Path, texts: Mapping[str, bytes]) -> None:
    """Write uploaded texts into `folder` under safe names. Raises TrainingError where there are none."""
    if not any(content.strip() for content in texts.values()):
        raise TrainingError("no texts were given: choose at least one file that is not empty")
    folder.mkdir(parents=True, exist_ok=True)
    for original, content in texts.items():
        path = Path(original.replace("\\", "/"))
        stem = re.sub(r"[^\w.-]+", "_", path.stem).strip("._") or "text"
        suffix = path.suffix.lower() if path.suffix.lower() in BOOKS else ".txt"
        (folder / f"{free_name(folder, stem)}{suffix}").write_bytes(content)


def start(
    name: str,
    *,
    preset: str = "",
    minutes: float = 0.0,
    runs_folder: Path = ROOT / "runs",
    data_folder: Path = ROOT / "data",
    texts: Mapping[str, bytes] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Run:
    """Start `train.py` on uploaded texts, or without any on the preset's own (with `minutes`: on the sample stories).

    minutes: how long to train; `train.py --minutes` chooses everything else. Raises TrainingError or ConfigError before
    anything starts.
    """
    if not NAME.fullmatch(name):
        raise TrainingError(f"{name!r}: a run's name may have letters, digits, dots, dashes and underscores")
    if bool(preset) == bool(minutes):
        raise TrainingError("give a preset, or the minutes to train for")
    run = Run(runs_folder / free_name(runs_folder, name))
    words = ["--preset", preset] if preset else ["--minutes", f"{minutes:g}"]
    words += ["--out", str(run.path)]
    words += [word for key, value in (flags or {}).items() for word in (f"--{key}", str(value))]
    if texts is None:
        return _spawn(run, [str(ROOT / "train.py"), *words])
    folder = data_folder / free_name(data_folder, run.name)
    save_texts(folder, texts)
    if minutes:
        return _spawn(run, [str(ROOT / "train.py"), *words, "--input", str(folder), "--data", str(folder / "tokens")])
    prepare = ["--preset", preset, "--input", str(folder), "--out", str(folder / "tokens")]
    words += ["--data", str(folder / "tokens")]
    return _spawn(run, ["-m", "ui.training_runs", *prepare, "--then-train", *words])


def resume(run: Run) -> Run:
    """Continue a stopped run from its newest checkpoint."""
    if run.running():
        raise TrainingError(f"{run.name} is running")
    return _spawn(run, [str(ROOT / "train.py"), "--resume", "--out", str(run.path)])


def stop(run: Run) -> None:
    """Ask the run to save and exit; it does so after its current step."""
    process = run.process()
    if process is None:
        raise TrainingError(f"{run.name} was not started from the app: stop it where it was started, with Ctrl-C")
    process.terminate()


def _spawn(run: Run, arguments: list[str]) -> Run:
    import psutil

    run.path.mkdir(parents=True, exist_ok=True)
    with (run.path / LOG).open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    created = psutil.Process(child.pid).create_time()
    (run.path / PROCESS).write_text(json.dumps({"pid": child.pid, "created": created}), encoding="utf-8")
    return run


def main(argv: list[str] | None = None) -> int:
    """`python -m ui.training_runs PREPARE-FLAGS --then-train TRAIN-FLAGS`: prepare texts, then become `train.py`."""
    import prepare_data
    from cli import help_alone

    help_alone(main.__doc__)
    words = sys.argv[1:] if argv is None else argv
    at = words.index("--then-train")
    code = prepare_data.main(words[:at])
    if code == 0:
        os.execv(sys.executable, [sys.executable, str(ROOT / "train.py"), *words[at + 1 :]])
    return code


if __name__ == "__main__":
    sys.exit(main())
