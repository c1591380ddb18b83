"""The loss of whole texts by a sliding window: every token is scored once, with enough of the text before it.

    >>> tally = score_text(model, tokenizer, text, stride=512)
    >>> tally.figures()["perplexity"]

The window moves on by `stride` tokens: in the first window a token has all that comes before it, later at least
block_size - stride tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from evaluation.metrics import MetricSums
from evaluation.yardstick import Counted
from model import GPT
from tokenizer import Tokenizer

MAX_LOGITS = 1 << 26  # numbers of logits in memory at once
ROWS = 512  # positions whose probabilities are computed at once


def sliding_windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first scored) of each window over `length` tokens; inputs are start..stop-1, targets one further.

    Targets from `first` (counted in the window) on are scored; over all windows that is each token but the first once.
    """
    start, scored = 0, 1
    while scored < length:
        stop = min(start + context, length - 1)
        yield start, stop, scored - start - 1
        scored, start = stop + 1, start + stride


def score(model: GPT, ids: np.ndarray, stride: int, control: int = -1, counted: np.ndarray | None = None) -> MetricSums:
    """Score tokens 1.. of `ids`. The tally counts tokens; its bytes and words are the caller's to fill in.

    control: an id put in the first place of every window, as training does with a style's; -1: none. counted: an n-gram
    model's probabilities of tokens 1.. [len(ids) - 1], to be compared with the model's.
    """
    tally = MetricSums()
    rows = max(1, MAX_LOGITS // (model.config.block_size * model.config.tokens))
    batch: list[tuple[int, int, int]] = []
    with torch.inference_mode():
        for window in sliding_windows(len(ids), model.config.block_size, stride):
            if batch and (len(batch) == rows or window[1] - window[0] != batch[0][1] - batch[0][0]):
                _score_batch(model, ids, batch, control, tally, counted)
                batch = []
            batch.append(window)
        if batch:
            _score_batch(model, ids, batch, control, tally, counted)
    return tally


def _score_batch(
    model: GPT,
    ids: np.ndarray,
    batch: list[tuple[int, int, int]],
    control: int,
    tally: MetricSums,
    counted: np.ndarray | None,
) -> None:
    """Add windows of one length to the tally, all of them in one forward pass."""
    inputs = np.stack([ids[start : stop + 1] for start, stop, _ in batch]).astype(np.int64)
    if control >= 0:
        inputs[:, 0] = control
    tokens = torch.from_numpy(inputs).to(model.wte.weight.device)  # [B, T + 1]
    logits = model(tokens[:, :-1])  # [B, T, N]
    for row, (start, _, first) in enumerate(batch):
        for at in range(first, logits.size(1), ROWS):
            part, target = logits[row, at : at + ROWS], tokens[row, at + 1 : at + ROWS + 1]
            logprobs = part.log_softmax(dim=-1)  # [ROWS, N]
            likeliest = logprobs.topk(min(5, logprobs.size(-1)), dim=-1)
            hit = likeliest.indices == target[:, None]
            nats = -logprobs.gather(1, target[:, None])[:, 0]
            columns = (nats, likeliest.values[:, 0].exp(), hit[:, 0], hit.any(dim=1))
            nats, confidence, top1, top5 = (column.cpu().numpy() for column in columns)
            tally.add(nats.astype(np.float64), confidence.astype(np.float64), top1, top5)
            if counted is not None:
                begin = start + at
                tally.yardstick.add(np.exp(-nats.astype(np.float64)), counted[begin : begin + len(nats)])


def score_text(
    model: GPT, tokenizer: Tokenizer, text: str, stride: int, limit: int = 0, counted: Counted | None = None
) -> MetricSums:
    """Score all of a text, its first token after end-of-text; without such an id the first token is only read.

    limit: score only so many tokens from the beginning; 0: all. counted: an n-gram model over the same ids, to compare
    with. Raises TokenizerError for what the tokenizer lacks.
    """
    ids = tokenizer.encode_array(text).astype(np.int64)
    if limit and len(ids) > limit:
        ids = ids[:limit]
        text = tokenizer.decode(ids.tolist())
    skipped = 0  # bytes of a first token that is only read
    if tokenizer.eot is not None:
        ids = np.concatenate(([tokenizer.eot], ids))
    elif len(ids):
        skipped = len(tokenizer.piece(int(ids[0])))
    tally = score(model, ids, stride, counted=counted(ids) if counted is not None else None)
    tally.documents, tally.bytes, tally.words = 1, len(text.encode()) - skipped, len(text.split())
    return tally
