"""Do the styles work? Held-out texts scored under the right style, under each of the others, and under none.

    >>> report = style_report(score, tokenizer, texts, limit=4096)   # what `evaluate.py` reports of a model with styles
    >>> report["summary"]["right"] < report["summary"]["wrong"]

The same tokens are scored each time, with the control id in front of every window, as in training and in writing. Loss is
in nats a token. Gains are differences within one text, so that hard texts do not hide them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from statistics import fmean, stdev
from typing import Any

import numpy as np

from evaluation.held_out import HeldOutText
from evaluation.metrics import MetricSums
from tokenizer import Tokenizer

NONE = "none"


def style_report(
    score: Callable[[np.ndarray, int], MetricSums],
    tokenizer: Tokenizer,
    texts: Iterable[HeldOutText],
    limit: int,
    advance: Callable[[int], None] = lambda size: None,
) -> dict[str, Any] | None:
    """The table and its summary; None where no text has a style of the model.

    score: (ids [n], a style's control id to put in front or -1) -> tally. limit: tokens scored of each text, from its
    middle, past title pages and tables of contents. advance: called with each text's bytes.
    """
    columns = {NONE: -1, **tokenizer.styles}
    rows: list[dict[str, Any]] = []
    for text in texts:
        advance(len(text.text.encode()))
        if text.style not in tokenizer.styles:
            continue
        ids = tokenizer.encode_array(text.text).astype(np.int64)
        begin = max(0, (len(ids) - limit - 1) // 2)
        ids = ids[begin : begin + limit + 1]
        if len(ids) < 2:
            continue
        losses = {}
        for name, control in columns.items():
            tally = score(ids, control)
            losses[name] = tally.nats / tally.tokens
        rows.append({"name": text.name, "style": text.style, "tokens": len(ids) - 1, "losses": losses})
    if not rows:
        return None
    styles = [style for style in tokenizer.styles if any(row["style"] == style for row in rows)]
    matrix = {style: _mean_losses([row for row in rows if row["style"] == style], list(columns)) for style in styles}
    return {"styles": list(tokenizer.styles), "texts": rows, "matrix": matrix, "summary": summary(rows)}


def _mean_losses(rows: list[dict[str, Any]], columns: list[str]) -> dict[str, float]:
    """Loss a token under each of `columns`, over all tokens of the texts."""
    tokens = sum(row["tokens"] for row in rows)
    return {name: math.fsum(row["losses"][name] * row["tokens"] for row in rows) / tokens for name in columns}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean loss over the texts: right, wrong (mean of the others) and no style; the gains with their standard errors.

    first: texts of which the right style has the lowest loss of all styles. chance: what guessing would give.
    """
    right = [row["losses"][row["style"]] for row in rows]
    none = [row["losses"][NONE] for row in rows]
    others = [[loss for name, loss in row["losses"].items() if name not in (NONE, row["style"])] for row in rows]
    wrong = [fmean(losses) if losses else math.nan for losses in others]
    count = len(others[0]) + 1
    found: dict[str, Any] = {"texts": len(rows), "styles": count, "right": fmean(right), "none": fmean(none)}
    found["wrong"] = fmean(wrong) if count > 1 else None
    gains = {"none": [a - b for a, b in zip(none, right, strict=True)]}
    if count > 1:
        gains["wrong"] = [a - b for a, b in zip(wrong, right, strict=True)]
    for name, gain in gains.items():
        error = stdev(gain) / math.sqrt(len(gain)) if len(gain) > 1 else None
        found[f"gain_over_{name}"] = {"mean": fmean(gain), "standard_error": error}
    found["first"] = sum(all(own < loss for loss in losses) for own, losses in zip(right, others, strict=True))
    found["chance"] = len(rows) / count
    return found
