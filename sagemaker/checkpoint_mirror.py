"""Checkpoints in the folder that SageMaker copies to S3: each is written once, and never renamed or changed.

    mirror = Mirror(Path("/opt/ml/checkpoints/run"), drafts=Path("/opt/ml/drafts"), arrived=in_s3("s3://bucket/run"))
    mirror.restore(run)                     # before training: the newest whole checkpoint becomes last/
    with mirror.following(run): train()     # during it: every new last/ and best/ is copied

SageMaker copies file by file and promises no order
(https://docs.aws.amazon.com/sagemaker/latest/dg/model-checkpoints.html), so what is in S3 when a machine is taken away may be
any mixture of files. A run folder cannot be restored from that: it renames `last`. Here a checkpoint is `step-000650/`,
filled from a draft outside the copied folder, with `complete.json` as its last file: the size and sha256 of all others.
A folder counts if all of them match. An older one is removed only once a newer one is whole in S3.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if str(HERE.parent) not in sys.path:
    sys.path.append(str(HERE.parent))

from storage import atomic, s3  # noqa: E402

MARKER = "complete.json"
NAME = re.compile(r"(?P<kind>step|best)-(?P<number>\d{6,})")
RUN_FILES = "run"  # in a checkpoint: files of the run folder itself (settings, metrics)
KEEP = 2  # whole checkpoints kept
POLL_S = 2.0  # interval at which the run folder is looked at

Facts = dict[str, Any]


def marker(folder: Path) -> Facts | None:
    """What a whole checkpoint says about itself: `files`, `step`, `elapsed_s`, `max_steps`; None if it is not whole."""
    try:
        facts: Facts = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        for name, (size, digest) in facts["files"].items():
            path = folder / name
            if path.stat().st_size != size or atomic.sha256(path) != digest:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts


def named(folder: Path, kind: str) -> list[Path]:
    """The checkpoints of a kind, whole or not, newest first."""
    found = ((NAME.fullmatch(path.name), path) for path in folder.glob(f"{kind}-*"))
    return [path for _, path in sorted(((int(match["number"]), path) for match, path in found if match), reverse=True)]


def progress(checkpoint: Path) -> Facts:
    """Step and seconds trained, from a checkpoint's training state."""
    state = json.loads((checkpoint / "training_state.json").read_text(encoding="utf-8"))
    return {"step": int(state["step"]), "elapsed_s": float(state["progress"]["elapsed_s"])}


def in_s3(url: str) -> Callable[[str], bool]:
    """A test whether the checkpoint of a name lies in S3 under `url` with all its files."""
    bucket, prefix = s3.split(url)

    def arrived(name: str) -> bool:
        try:
            there = s3.list_objects(s3.client(), bucket, f"{prefix}{name}/")
            body = s3.client().get_object(Bucket=bucket, Key=f"{prefix}{name}/{MARKER}")["Body"].read()
            files = json.loads(body)["files"]
        except Exception:  # no right, no network, not there yet: nothing is removed
            return False
        return all(there.get(f"{prefix}{name}/{file}") == size for file, (size, _) in files.items())

    return arrived


def newest_in_s3(url: str) -> Facts | None:
    """What the newest checkpoint that is whole in S3 says about itself."""
    bucket, prefix = s3.split(url)
    listed = (key[len(prefix) :].split("/")[0] for key in s3.list_objects(s3.client(), bucket, prefix))
    arrived = in_s3(url)
    for name in sorted(
        {name for name in listed if name.startswith("step-")}, key=lambda name: int(name[5:]), reverse=True
    ):
        if arrived(name):
            body = s3.client().get_object(Bucket=bucket, Key=f"{prefix}{name}/{MARKER}")["Body"].read()
            facts: Facts = json.loads(body)
            return facts
    return None


class Mirror:
    """The checkpoints of one run in the folder that is copied. Only the leader's process writes."""

    def __init__(self, folder: Path, drafts: Path, arrived: Callable[[str], bool] = lambda name: False):
        self.folder, self.drafts, self.arrived = folder, drafts, arrived
        self.seen: dict[str, tuple[int, int]] = {}
        self.lock = threading.Lock()

    def restore(self, run: Path) -> Facts | None:
        """Make a run folder of the newest whole checkpoint and the newest whole best model; None if there is none."""
        checkpoint, facts = self._newest("step")
        if checkpoint is None or facts is None:
            return None
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(checkpoint, run / "last", ignore=shutil.ignore_patterns(MARKER, RUN_FILES))
        for path in (checkpoint / RUN_FILES).iterdir():
            shutil.copy2(path, run / path.name)
        best, _ = self._newest("best", facts["step"])
        if best is not None:
            shutil.copytree(best, run / "best", ignore=shutil.ignore_patterns(MARKER))
        print(f"restored {checkpoint.name}: {facts['elapsed_s'] / 60:.0f} minutes trained so far", flush=True)
        return facts

    def _newest(self, kind: str, limit: int = sys.maxsize) -> tuple[Path | None, Facts | None]:
        for path in named(self.folder, kind):
            facts = marker(path)
            if facts is None:
                print(f"checkpoint {path.name} is incomplete: skipped", flush=True)
            elif facts["step"] <= limit:
                return path, facts
        return None, None

    def save(self, run: Path) -> None:
        """Copy last/ and best/ if they are new. What is exchanged meanwhile is left for the next call."""
        with self.lock:
            with contextlib.suppress(OSError, ValueError, KeyError):
                if self._is_new(run / "last" / atomic.SUMS) and not atomic.faults(run / "last"):
                    facts = {**progress(run / "last"), "max_steps": max_steps(run)}
                    own = [path for path in run.iterdir() if path.is_file() and not path.name.startswith(".")]
                    self._write("step", run / "last", facts, own)
                    self._prune("step")
            with contextlib.suppress(OSError, ValueError, KeyError):
                if self._is_new(run / "best" / "config.json"):
                    steps = json.loads((run / "best" / "config.json").read_text(encoding="utf-8"))
                    self._write("best", run / "best", {"step": int(steps["victorian_gpt"]["card"]["steps"])}, [])
                    self._prune("best")

    def _is_new(self, path: Path) -> bool:
        found = path.stat()
        return self.seen.get(str(path)) != (found.st_mtime_ns, found.st_ino)

    def _write(self, kind: str, source: Path, facts: Facts, more: list[Path]) -> None:
        watched = source / (atomic.SUMS if kind == "step" else "config.json")
        before = watched.stat()
        target = self.folder / f"{kind}-{facts['step']:06d}"
        if not (target / MARKER).exists():
            draft = self.drafts / target.name
            shutil.rmtree(draft, ignore_errors=True)
            shutil.copytree(source, draft, copy_function=link)
            if (kind == "step" and atomic.faults(draft)) or watched.stat().st_ino != before.st_ino:
                return  # exchanged while it was read
            if more:
                (draft / RUN_FILES).mkdir()
                for path in more:
                    shutil.copy2(path, draft / RUN_FILES / path.name)
            files = {
                path.relative_to(draft).as_posix(): (path.stat().st_size, atomic.sha256(path))
                for path in sorted(draft.rglob("*"))
                if path.is_file()
            }
            shutil.rmtree(target, ignore_errors=True)  # what a job before this one left unfinished
            for name in files:
                self.place(draft / name, target / name)
            (draft / MARKER).write_text(json.dumps({"files": files, **facts}), encoding="utf-8")
            self.place(draft / MARKER, target / MARKER)
            shutil.rmtree(draft)
        self.seen[str(watched)] = (before.st_mtime_ns, before.st_ino)

    def place(self, draft: Path, target: Path) -> None:
        """Move one whole file into the copied folder."""
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(draft, target)

    def _prune(self, kind: str) -> None:
        """Remove what is older than KEEP checkpoints and than the newest that is whole in S3."""
        found = named(self.folder, kind)
        safe = next((number for number, path in enumerate(found) if self.arrived(path.name)), len(found))
        for path in found[max(KEEP, safe + 1) :]:
            shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def following(self, run: Path, seconds: float = POLL_S) -> Iterator[None]:
        """Save whatever is new in the run folder, in a thread, and once more at the end."""
        over = threading.Event()

        def follow() -> None:
            while not over.wait(seconds):
                self.save(run)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.save(run)


def link(source: str, target: str) -> None:
    """The file under another name without copying its bytes, where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def max_steps(run: Path) -> int:
    """The steps that the run is to have; 0 without such a limit."""
    import tomllib

    train = tomllib.loads((run / "config.toml").read_text(encoding="utf-8")).get("train", {})
    return int(train.get("max_steps", 0))
