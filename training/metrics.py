"""Records of a run: metrics.jsonl, samples.jsonl, loss.png, TensorBoard, the lines on the screen; and its speed.

log = RunLog(Path("runs/novels"), total_steps=2000)
log.metrics({"step": 10, "train_loss": 4.2})
log.close()
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evaluation.yardstick import yardstick_line
from storage.atomic import atomic_write_text
from training.console import Console, line

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line cut off by a crash is skipped, a missing file is empty."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)


def truncate_after_step(path: Path, step: int) -> None:
    """Drop lines after `step`: a resumed run writes them again. The file is replaced atomically."""
    if not path.is_file():
        return
    kept = [row for row in read_jsonl(path) if row.get("step", 0) <= step]
    atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def time_left(steps: float, steps_per_s: float, minutes: float, used_s: float) -> float | None:
    """Seconds until `steps` more are done or `minutes` in all (0: no limit) are over; None if neither ends the run."""
    left = steps / steps_per_s
    if minutes:
        left = min(left, max(0.0, minutes * 60 - used_s))
    return left if math.isfinite(left) else None


class Throughput:
    """A run's clock, and the tokens per second of its steps alone.

    Left out are evaluation, samples and checkpoints, and the first steps of a session, which compile and warm caches.
    tokens_per_step: over all ranks. elapsed_before: seconds of the run's earlier sessions.
    """

    WARMUP_STEPS = 2

    def __init__(self, tokens_per_step: int, elapsed_before: float = 0.0):
        self.tokens_per_step, self.elapsed_before = tokens_per_step, elapsed_before
        self.began = time.monotonic()
        self.steps = 0  # of this session
        self.last_s = 0.0  # seconds of the last step
        self.recent_steps = self.all_steps = 0
        self.recent_s = self.all_s = 0.0

    def elapsed_s(self) -> float:
        """Wall-clock seconds of the run, earlier sessions included."""
        return self.elapsed_before + time.monotonic() - self.began

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Time one optimizer step."""
        began = time.monotonic()
        yield
        self.last_s = time.monotonic() - began
        if self.steps >= self.WARMUP_STEPS:
            self.recent_s, self.recent_steps = self.recent_s + self.last_s, self.recent_steps + 1
            self.all_s, self.all_steps = self.all_s + self.last_s, self.all_steps + 1
        self.steps += 1

    def restart(self) -> None:
        """Reset the recent-throughput window."""
        self.recent_s, self.recent_steps = 0.0, 0

    def recent(self) -> float | None:
        """Tokens per second since `restart`; None if no step counts yet."""
        return self.recent_steps * self.tokens_per_step / self.recent_s if self.recent_s else None

    def overall(self) -> float | None:
        """Tokens per second of this session; None if no step counts yet."""
        return self.all_steps * self.tokens_per_step / self.all_s if self.all_s else None

    def pace(self) -> float:
        """Throughput used for the ETA: `recent`, or at first that of the last step."""
        return self.recent() or self.tokens_per_step / max(self.last_s, 1e-9)


class RunLog:
    """Writes one run's records. `enabled=False` (ranks other than 0) makes every method a no-op.

    done: steps that a resumed run has done, -1 for a new one; records of later steps are dropped, as those are repeated.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        enabled: bool = True,
        tensorboard: bool = True,
        wandb: str = "",
        done: int = -1,
    ):
        self.folder, self.total, self.enabled = folder, total_steps, enabled
        self.console = Console(enabled)
        self._writer: Any = None
        self._wandb: Any = None
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, SAMPLES):
            truncate_after_step(folder / name, done)
        if tensorboard:
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard.writer import SummaryWriter

                self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        if wandb:
            import wandb as client  # type: ignore[import-not-found, unused-ignore]

            known = folder / "wandb_id.txt"  # a resumed run continues the same record
            if not known.is_file():
                known.write_text(uuid.uuid4().hex, encoding="utf-8")
            project, key = "victorian-literature-generator", known.read_text(encoding="utf-8")
            self._wandb = client.init(project=project, name=wandb, id=key, resume="allow", dir=str(folder))

    def say(self, text: str) -> None:
        """A line on standard error."""
        self.console.say(text)

    def live(self, step: int, loss: float, tokens_per_s: float, eta_s: float | None) -> None:
        """The bar of a terminal, which changes in place a few times a second."""
        self.console.bar(step, self.total, loss=loss, tokens_per_s=tokens_per_s, eta_s=eta_s)

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self, row: Mapping[str, Any], *, eta_s: float | None = None) -> None:
        """One row of metrics.jsonl (None values left out), the same values to TensorBoard and as a log line."""
        if not self.enabled:
            return
        kept = {key: value for key, value in row.items() if value is not None}
        self._append(METRICS, kept)
        numbers = {k: v for k, v in kept.items() if k != "step" and isinstance(v, (int, float))}
        if self._writer:
            for key, value in numbers.items():
                self._writer.add_scalar(key, value, kept["step"])
        if self._wandb:
            self._wandb.log(numbers, step=kept["step"])
        self.console.row(kept, eta_s)

    def sample(self, row: Mapping[str, Any]) -> None:
        """One sample: {"step", "prompt", "text", "seed"} to samples.jsonl, TensorBoard and the screen."""
        if not self.enabled:
            return
        self._append(SAMPLES, row)
        if self._writer:
            self._writer.add_text("sample", row["prompt"] + row["text"], row["step"])
        self.console.sample(row["step"], row["prompt"] + row["text"])

    def close(self) -> None:
        """Flush everything and draw loss.png."""
        if not self.enabled:
            return
        self.console.clear()
        if self._writer:
            self._writer.close()
        if self._wandb:
            self._wandb.finish()
        with contextlib.suppress(ImportError):
            draw_losses(self.folder)


def draw_losses(folder: Path) -> Path | None:
    """Draw training and validation loss over steps into loss.png; None if nothing has been logged yet."""
    rows = list(read_jsonl(folder / METRICS))
    train = [(r["step"], r["train_loss"]) for r in rows if "train_loss" in r]
    val = [(r["step"], r["val_loss"]) for r in rows if "val_loss" in r]
    if not train and not val:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="#9c8b73", linewidth=1, label="training")
    if val:
        axes.plot(*zip(*val, strict=True), color="#7a1f2b", linewidth=2, marker="o", markersize=3, label="validation")
    counted = [r["counted_loss"] for r in rows if "counted_loss" in r]
    if counted:
        axes.axhline(counted[-1], color="#555555", linewidth=1, linestyle="--", label="counting alone")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    draft = folder / "loss.tmp.png"
    figure.savefig(draft, dpi=130)
    os.replace(draft, folder / "loss.png")
    return folder / "loss.png"


def finish(summary: dict[str, Any]) -> None:
    """Print the summary on standard error, with the commands to use next."""
    done, yardstick = summary.pop("done"), summary.pop("yardstick")
    console, reason = Console(), summary.pop("reason")
    console.note(closing(reason, summary), f"{reason}: {line(summary)}")
    console.note(yardstick_line(yardstick), yardstick_line(yardstick))
    run = Path(summary["run"])
    where = run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run
    if done:
        console.say(f'write with it:  python generate.py --model {where}/best --prompt "…"')
        console.say(f"share it:       python export.py --model {where}/best --to html  (or --to gguf, for llama.cpp)")
    else:
        console.say(f"resume with:    python train.py --resume --out {where}")


def closing(reason: str, summary: Mapping[str, Any]) -> str:
    """A run's summary in words."""
    speed, loss = summary["tokens_per_s"], summary["best_val_loss"]
    parts = [f"{summary['steps']:,} steps, {summary['tokens']:,} tokens in {summary['time']}"]
    parts += [f"{speed:,} tokens/s"] if speed else []
    parts += [f"best validation loss {loss:.4f} at step {summary['best_step']:,}"] if loss is not None else []
    return f"\n{reason}: {', '.join(parts)}"
