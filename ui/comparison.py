"""Many prompts with many sampling settings: a grid of generations in the background, and its table.

>>> comparison = Comparison(backend, ["The fog", "My dear"], {"Faithful": params, "Fanciful": other}).start()
>>> comparison.done, len(comparison.cells)
"""

from __future__ import annotations

import csv
import io
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from config import GenerationParams
from ui.backends import Backend
from ui.background import BackgroundGeneration, ignore

AT_ONCE = 4
MAX_PROMPTS = 1000
COLUMNS = ("prompt", "settings", "sample", "text", "words", "tokens", "finish_reason", "seconds", "seed")


@dataclass
class ComparisonCell:
    """One prompt with one set of sampling settings."""

    prompt: str
    settings: str
    generation: BackgroundGeneration


class Comparison:
    """The cells, prompt by prompt; `cancel` stops the running ones and skips the rest."""

    def __init__(
        self,
        backend: Backend,
        prompts: Sequence[str],
        settings: Mapping[str, GenerationParams],
        *,
        on_end: Callable[[BackgroundGeneration], None] = ignore,
    ):
        self.cells = [
            ComparisonCell(prompt, name, BackgroundGeneration(backend, prompt.rstrip(" "), params, on_end=on_end))
            for prompt in prompts
            for name, params in settings.items()
        ]
        self._stopped = threading.Event()
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="comparison")

    def start(self) -> Comparison:
        for cell in self.cells:
            self._threads.submit(self._work, cell)
        self._threads.shutdown(wait=False)
        return self

    def _work(self, cell: ComparisonCell) -> None:
        if not self._stopped.is_set():
            cell.generation.start().join()

    def cancel(self) -> None:
        self._stopped.set()
        for cell in self.cells:
            cell.generation.cancel()

    @property
    def done(self) -> int:
        """Cells that are finished."""
        return sum(cell.generation.over for cell in self.cells)

    @property
    def running(self) -> bool:
        return self.done < len(self.cells) and not (self._stopped.is_set() and not self._working())

    def _working(self) -> bool:
        return any(cell.generation.started and not cell.generation.over for cell in self.cells)

    def rows(self) -> list[dict[str, Any]]:
        """A row a sample that has any words; the keys are COLUMNS."""
        return [
            {
                "prompt": cell.prompt,
                "settings": cell.settings,
                "sample": number,
                "text": sample.text,
                "words": len(sample.text.split()),
                "tokens": sample.tokens,
                "finish_reason": sample.reason,
                "seconds": round(cell.generation.seconds, 2),
                "seed": cell.generation.seed,
            }
            for cell in self.cells
            if cell.generation.started
            for number, sample in enumerate(cell.generation.samples, 1)
            if sample.text
        ]


def read_prompts(name: str, content: bytes) -> list[str]:
    """Prompts of an uploaded file: .txt a line each, .csv the column `prompt` or the first, .jsonl `prompt` or `text`.

    Raises ValueError naming the file, and the line where there is one.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{name}: not UTF-8: save it as UTF-8") from None
    if name.lower().endswith(".csv"):
        rows = list(csv.reader(io.StringIO(text)))
        if rows and "prompt" in rows[0]:
            column, rows = rows[0].index("prompt"), rows[1:]
        else:
            column = 0
        found = [row[column] for row in rows if len(row) > column]
    elif name.lower().endswith((".jsonl", ".ndjson")):
        found = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                found.append(value if isinstance(value, str) else str(value.get("prompt", value.get("text", ""))))
            except (ValueError, AttributeError):
                raise ValueError(f"{name}, line {number}: not a JSON object with a prompt") from None
    else:
        found = text.splitlines()
    kept = [prompt for prompt in found if prompt.strip()]
    if len(kept) > MAX_PROMPTS:
        raise ValueError(f"{name}: {len(kept)} prompts, at most {MAX_PROMPTS}: split the file")
    return kept


def table(rows: Sequence[Mapping[str, Any]], suffix: str) -> bytes:
    """The rows as `csv` or `jsonl`."""
    if suffix == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS)
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {key: "'" + v if isinstance(v, str) and v[:1] in "=+-@\t\r" and v else v for key, v in row.items()}
        )
    return file.getvalue().encode("utf-8-sig", "replace")
