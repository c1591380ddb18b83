"""What a run prints on standard error: aligned columns and a bar on a terminal, `key=value` lines anywhere else.

>>> console = Console()
>>> console.say("device cpu")
>>> console.row({"step": 10, "train_loss": 4.2, "tokens_per_s": 9000.0}, eta_s=80)
>>> console.bar(12, 100, loss=4.1, tokens_per_s=9000.0, eta_s=78)

Files, pipes, CloudWatch and SageMaker get one line for each row of metrics.jsonl, which patterns can read.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from typing import Any

FORMS = {
    "lr": "{:.3g}",
    "tokens_per_s": "{:.0f}",
    "tokens": "{:d}",
    "step": "{:d}",
    "mfu": "{:.3f}",
    "seconds_per_batch": "{:.3f}",
    "gpu_memory_gb": "{:.2f}",
}
# Columns of a terminal: key of metrics.jsonl, heading, width, form.
COLUMNS = (
    ("step", "step", 7, "{:,d}"),
    ("train_loss", "loss", 8, "{:.4f}"),
    ("val_loss", "val", 8, "{:.4f}"),
    ("val_bpb", "bits/byte", 10, "{:.4f}"),
    ("tokens_per_s", "tok/s", 9, "{:,.0f}"),
    ("eta_s", "time left", 10, ""),
)
# With room for them, before the time left.
MORE_COLUMNS = (
    ("avg_loss", "average", 9, "{:.4f}"),
    ("best_avg_loss", "best", 8, "{:.4f}"),
    ("lr", "lr", 10, "{:.3g}"),
    ("seconds_per_batch", "s/step", 9, "{:.3f}"),
)
ROWS_A_HEADING = 20  # rows after which the headings are printed again
BAR_S = 0.3  # seconds between two pictures of the bar


def duration(seconds: float) -> str:
    """Seconds as `45s`, `3m20s` or `5h07m`."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def line(values: Mapping[str, Any]) -> str:
    """One log line, `key=value` pairs that CloudWatch's and SageMaker's patterns can read."""
    parts = []
    for key, value in values.items():
        if value is None or key == "elapsed_s":
            continue
        form = FORMS.get(key, "{:.4f}" if isinstance(value, float) else "{}")
        parts.append(f"{key}={form.format(value)}")
    return " ".join(parts)


def terminal_width() -> int:
    """Columns of the terminal, less one: a line of full width would wrap on some consoles."""
    return max(20, shutil.get_terminal_size().columns - 1)


def columns(width: int) -> list[tuple[str, str, int, str]]:
    """The columns that fit into `width` characters, in order; the rightmost of the usual ones are left out first."""
    chosen = list(COLUMNS)
    if sum(part[2] for part in (*COLUMNS, *MORE_COLUMNS)) <= width:
        chosen[-1:-1] = MORE_COLUMNS
    while sum(part[2] for part in chosen) > width and len(chosen) > 2:
        chosen.pop()
    return chosen


def aligned(values: Mapping[str, Any], width: int) -> str:
    """A row of metrics under the headings of `columns`; a value that the row lacks leaves its place empty."""
    cells = []
    for key, _, size, form in columns(width):
        value = values.get(key)
        shown = "" if value is None else form.format(value) if form else duration(value)
        cells.append(shown.rjust(size))
    return "".join(cells).rstrip()


def headings(width: int) -> str:
    """The line above the rows."""
    return "".join(name.rjust(size) for _, name, size, _ in columns(width))


class Console:
    """Standard error of one run. Each method is a no-op where `enabled` is False (ranks other than 0)."""

    def __init__(self, enabled: bool = True):
        self.enabled, self.terminal = enabled, sys.stderr.isatty()
        self._bar, self._bar_at = "", time.monotonic()
        self._rows = 0  # since the headings were printed; 0: they are due

    def say(self, text: str) -> None:
        """A line above the bar; the next row gets its headings again."""
        if self.enabled:
            self._rows = 0
            self._print(text)

    def _print(self, text: str) -> None:
        self.clear()
        print(text, file=sys.stderr, flush=True)

    def note(self, text: str, plain: str) -> None:
        """`text` on a terminal, wrapped to its width; `plain` elsewhere."""
        if self.terminal:
            lines = text.split("\n")
            text = "\n".join(textwrap.fill(part, terminal_width(), subsequent_indent=" " * 9) for part in lines)
        self.say(text if self.terminal else plain)

    def row(self, values: Mapping[str, Any], eta_s: float | None) -> None:
        """A row of metrics. eta_s: seconds left, where they are known."""
        if not self.enabled:
            return
        if not self.terminal:
            tail = f" eta={duration(eta_s)}" if eta_s is not None else ""
            self._print(f"{line(values)}{tail}")
            return
        width = terminal_width()
        if self._rows % ROWS_A_HEADING == 0:
            self._print(("\n" if self._rows == 0 else "") + headings(width))
        self._rows += 1
        self._print(aligned({**values, "eta_s": eta_s}, width))
        if "epoch_loss" in values:
            best = f", the best {values['best_epoch_loss']:.4f}, after {duration(values['elapsed_s'])}"
            words = f"  epoch {values['epoch']:.0f}: average loss {values['epoch_loss']:.4f}{best}"
            self._print(textwrap.fill(words, width, subsequent_indent="  "))

    def sample(self, step: int, text: str) -> None:
        """A text that the model has written, set apart from the rows."""
        if not self.terminal:
            body = text.strip().replace("\n", "\n    ")
            self.say(f"  sample at step {step}:\n    {body}")
            return
        width = terminal_width()
        indent = {"initial_indent": "    ", "subsequent_indent": "    "}
        lines = [textwrap.fill(part, width, **indent) for part in text.strip().split("\n")]  # type: ignore[arg-type]
        self.say("\n".join(["", f"  -- sample at step {step:,} --", *lines]))

    def bar(self, step: int, total: int, *, loss: float, tokens_per_s: float, eta_s: float | None) -> None:
        """The line that changes in place, a few times a second; only on a terminal. total: 0 where it is unknown."""
        if not (self.enabled and self.terminal) or time.monotonic() - self._bar_at <= BAR_S:
            return
        from tqdm import tqdm

        width = terminal_width()
        left = f"  {duration(eta_s)} left" if eta_s is not None else ""
        words = f" step {step:,}{f'/{total:,}' if total else ''}  loss {loss:.3f}{left}"
        if len(words) + 30 <= width:
            words += f"  {tokens_per_s:,.0f} tok/s"
        unicode = "utf" in (getattr(sys.stderr, "encoding", None) or "").lower()
        drawn = tqdm.format_meter(
            step,
            total or None,
            0.0,
            ncols=min(width, 100),
            ascii=False if unicode else " #",
            bar_format="{percentage:3.0f}% |{bar}|" + words.replace("{", "{{") if total else words,
        )
        self.clear()
        self._bar = drawn[:width]
        print(self._bar, end="\r", file=sys.stderr, flush=True)
        self._bar_at = time.monotonic()

    def clear(self) -> None:
        """Take the bar away."""
        if self._bar:
            print(" " * len(self._bar), end="\r", file=sys.stderr)
            self._bar = ""

    def waiting(self, text: str) -> Callable[[], None]:
        """Show `text` with the seconds that it has taken until the returned function is called; on a terminal alone."""
        import threading

        if not (self.enabled and self.terminal):
            return lambda: None
        over, began = threading.Event(), time.monotonic()

        def show() -> None:
            while not over.wait(BAR_S):
                self.clear()
                self._bar = f"{text} … {time.monotonic() - began:.0f} s"[: terminal_width()]
                print(self._bar, end="\r", file=sys.stderr, flush=True)

        thread = threading.Thread(target=show, daemon=True)
        thread.start()

        def stop() -> None:
            over.set()
            thread.join()
            self.clear()

        return stop
