"""One model's part of `evaluate.py`'s report: loss by text and by author, calibration, styles, generated texts.

>>> report = evaluate_model(Path("runs/novels/best"), texts, params=GenerationParams(n=2, seed=0))
>>> report["total"]["bits_per_byte"], report["authors"][0]["perplexity"]
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from checkpoint import load_model
from config import ConfigError, GenerationParams
from devices import pick_device
from evaluation.generated import generated_report
from evaluation.held_out import HeldOutTexts
from evaluation.metrics import MetricSums
from evaluation.originality import Index
from evaluation.perplexity import score, score_text
from evaluation.style_report import style_report
from evaluation.yardstick import Counted
from tokenizer import Tokenizer

ProgressBar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]  # (title, total) -> what counts on


def no_progress(title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda size: None)


def evaluate_model(
    folder: Path,
    texts: HeldOutTexts,
    *,
    device: str = "auto",
    dtype: str = "float32",
    stride: int = 0,
    limit_tokens: int = 0,
    style_tokens: int = 0,
    params: GenerationParams | None = None,
    index: Index | None = None,
    min_tokens: int = 0,
    counted: Callable[[Tokenizer], Counted | None] = lambda _: None,
    progress: ProgressBar = no_progress,
) -> dict[str, Any]:
    """stride, limit_tokens, style_tokens, min_tokens: as the flags of `evaluate.py`. params: None: nothing is written.

    counted: what an n-gram model of the training text says of ids of a tokenizer, None if it has counted other ids.

    Raises ConfigError for a stride beyond the context, a text that the tokenizer cannot read, and no text at all.
    """
    # 1. The model.
    model, tokenizer = load_model(folder, device=pick_device(device), dtype=getattr(torch, dtype))
    context = model.config.block_size
    stride = stride or max(1, context // 2)
    if stride > context:
        raise ConfigError(
            [f"--stride {stride} is more than the context of {folder}, {context}: tokens would be left out"]
        )

    # 2. The loss of each text, summed by author and in all.
    total, authors, documents = MetricSums(), dict[str, MetricSums](), []
    compared = counted(tokenizer)
    size = sum(len(text.text.encode()) for text in texts)
    with progress(f"scoring {folder}", size) as advance:
        for text in texts:
            try:
                tally = score_text(model, tokenizer, text.text, stride, limit_tokens, compared)
            except ValueError as error:
                raise ConfigError([f"{text.name}: the tokenizer of {folder} cannot read it: {error}"]) from None
            advance(len(text.text.encode()))
            if not tally.tokens:
                continue
            documents.append({"name": text.name, "author": text.author} | tally.figures())
            authors.setdefault(text.author, MetricSums())
            authors[text.author] += tally
            total += tally
    if not total.tokens:
        raise ConfigError([f"{texts.name}: no text to score"])
    report = {
        "model": str(folder),
        "parameters": model.num_parameters(),
        "context": context,
        "stride": stride,
        "tokenizer": {"kind": tokenizer.kind, "ids": tokenizer.vocab_size},
        "total": total.figures(),
        "authors": [{"author": name} | tally.figures() for name, tally in sorted(authors.items())],
        "documents": documents,
        "calibration": total.calibration(),
    }
    if compared is not None:
        report["yardstick"] = total.yardstick.figures(total.bytes)

    # 3. Of a model with styles, whether they work.
    if tokenizer.styles and style_tokens:
        with progress(f"styles of {folder}", size) as advance:
            report["dial"] = style_report(
                lambda ids, control: score(model, ids, stride, control), tokenizer, texts, style_tokens, advance
            )

    # 4. What it writes.
    if params is not None:
        report["written"] = generated_report(model, tokenizer, params, texts, index, min_tokens)
    return report
