"""Statistics of generated passages: a table with their speed, settings, variety and repetition.

>>> frame = passage_frame(history.passages())
>>> frame["distinct_2"].mean()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from config import SETTINGS
from ui.history import PassageRow

if TYPE_CHECKING:
    import pandas as pd


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]


def distinct(text: str, n: int) -> float | None:
    """Different n-word groups over all of them (Li et al. 2016, distinct-n); None where the text is too short."""
    groups = ngrams(text.lower().split(), n)
    return len(set(groups)) / len(groups) if groups else None


def repetition(text: str, n: int = 4) -> float | None:
    """Share of n-word groups that occurred before in the text (Welleck et al. 2020, seq-rep-n)."""
    share = distinct(text, n)
    return None if share is None else 1 - share


def passage_frame(rows: Sequence[PassageRow]) -> pd.DataFrame:
    """A row a passage."""
    import pandas as pd

    table = pd.DataFrame(
        [
            {
                "written": row.created,
                "model": row.model,
                "words": len(row.text.split()),
                "tokens": row.tokens,
                "seconds": row.seconds,
                "first_s": row.first_s,
                "tokens_per_s": row.tokens / row.seconds if row.seconds > 0 else None,
                **{
                    name: row.params.get(name)
                    for name, setting in SETTINGS.items()
                    if setting.in_presets and setting.slider
                },
                "n": row.params.get("n", 1),
                "ended": row.finish_reason,
                "distinct_1": distinct(row.text, 1),
                "distinct_2": distinct(row.text, 2),
                "repetition_4": repetition(row.text),
            }
            for row in rows
        ]
    )
    if len(table):
        table["written"] = pd.to_datetime(table["written"], unit="s").dt.round("s")
        table["day"] = table["written"].dt.strftime("%Y-%m-%d")
        table["tokens_per_s"] = table["tokens_per_s"] * table["n"]
    return table
