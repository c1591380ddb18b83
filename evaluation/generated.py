"""What can be measured on texts that a model writes: variety, repetition, likeness to real texts, copied passages.

>>> report = generated_report(model, tokenizer, GenerationParams(n=2, seed=0), texts, index=None)
>>> report["distinct_2"], report["bleu"]["score"]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from config import ConfigError, GenerationParams
from evaluation.held_out import HeldOutTexts
from evaluation.metrics import bleu, distinct, repetition, self_bleu
from evaluation.originality import Index
from inference.prompts import GALLERY
from inference.writing import generate
from model import GPT
from tokenizer import Tokenizer

OPENING, CONTINUATION = 400, 600  # characters of a held-out text to continue, and to compare the continuation with
CONTINUED = 8  # held-out texts that are continued
REPORTED = 20  # copied runs in a report


def generated_report(
    model: GPT,
    tokenizer: Tokenizer,
    params: GenerationParams,
    texts: HeldOutTexts,
    index: Index | None,
    min_tokens: int = 0,
) -> dict[str, Any]:
    """Measures of `params.n` texts for each kind of opening, and of continuations of held-out texts.

    index: what to look for copied passages in. min_tokens: length from which one counts; default 0: the index's own.
    """
    prompts, written = [], []
    for openings in GALLERY.values():
        try:
            results = generate(model, tokenizer, openings[0], params)
        except ValueError:  # a small alphabet may lack a character
            continue
        prompts += [openings[0]] * len(results)
        written += [result.text for result in results]
    continued, real = continuations(model, tokenizer, params.model_copy(update={"n": 1}), texts)
    report: dict[str, Any] = {
        "texts": len(written),
        "params": params.model_dump(mode="json"),
        "distinct_1": distinct(written, 1),
        "distinct_2": distinct(written, 2),
        "distinct_3": distinct(written, 3),
        "repetition_4": sum(map(repetition, written)) / max(len(written), 1),
        "self_bleu": self_bleu(written),
        "bleu": bleu(continued, real),
        "samples": [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, written, strict=True)],
    }
    if index is not None:
        report["originality"] = copied_passages(index, written + continued, min_tokens)
    return report


def continuations(
    model: GPT, tokenizer: Tokenizer, params: GenerationParams, texts: HeldOutTexts
) -> tuple[list[str], list[str]]:
    """The model's continuations from the middle of held-out texts, and the real ones, cut to the same length."""
    continued, real = [], []
    for held_out in texts:
        at = len(held_out.text) // 2 if len(held_out.text) >= 2 * OPENING else len(held_out.text) // 3
        opening = held_out.text[max(0, at - OPENING) : at]
        opening, _, rest = opening.rpartition(" ")
        follows = (" " + rest + held_out.text[at : at + CONTINUATION]) if opening else ""
        if not follows.strip():
            continue
        try:
            text = generate(model, tokenizer, opening, params)[0].text
        except ValueError:
            continue
        continued.append(text[: len(follows)])
        real.append(follows[: max(len(text), 1)])
        if len(continued) == CONTINUED:
            break
    return continued, real


def copied_passages(index: Index, texts: Sequence[str], min_tokens: int) -> dict[str, Any]:
    """How much of all `texts` together occurs in the training text, and the longest copied runs."""
    reports = []
    for text in texts:
        try:
            reports.append(index.check(text, min_tokens))
        except ValueError as error:  # a character that the training text does not have
            raise ConfigError(
                [f"--index {index.folder}: its tokenizer cannot read what the model wrote: {error}"]
            ) from None
    tokens, copied = sum(report.tokens for report in reports), sum(report.copied_tokens for report in reports)
    runs = [asdict(run) | {"text_number": number} for number, report in enumerate(reports) for run in report.runs]
    return {
        "index": str(index.folder),
        "tokens": tokens,
        "copied_tokens": copied,
        "share": copied / max(tokens, 1),
        "longest": max((report.longest for report in reports), default=0),
        "min_tokens": min_tokens or index.min_tokens,
        "runs": sorted(runs, key=lambda run: -run["tokens"])[:REPORTED],
    }
