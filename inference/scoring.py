"""How likely the model finds each token of a given text, computed in chunks so that other work fits in between.

    >>> for scores in score_in_chunks(model, tokenizer, ids, top=5): ...     # None after each chunk, the scores at the end

Up to the model's context every token is scored with all tokens before it. Beyond it the window moves on by half the
context, so a token has at least that many before it. `engine.Engine.score` runs this between steps of the decoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.decoder import CHUNK
from model import GPT
from tokenizer import Tokenizer

Likelihood = tuple[float | None, int | None, list[tuple[int, str, float]]]  # log-probability, rank, most likely tokens


@dataclass(frozen=True)
class TokenScore:
    """One token of a text: its log-probability in nats (None for the first) and its rank, 1 for the most likely."""

    id: int
    text: str
    start: int  # character of the text at which it begins
    logprob: float | None
    rank: int | None
    top: list[tuple[int, str, float]]  # the most likely tokens in its place: id, text, log-probability


def score_in_chunks(model: GPT, tokenizer: Tokenizer, ids: list[int], top: int) -> Iterator[list[TokenScore] | None]:
    """Yields None after each chunk and, at last, a score for each of `ids`. top: number of most likely tokens reported."""
    context, cache = model.config.block_size, model.new_cache(1)
    likelihoods: list[Likelihood] = [(None, None, [])]  # nothing comes before the first token
    at = 0
    while at < len(ids) - 1:
        if cache.length[0] == context:  # full: read the last half context again
            cache.reset(0)
            for start in range(at - context // 2, at, CHUNK):
                model.prefill(ids[start : min(start + CHUNK, at)], cache, 0)
                yield None
        stop = min(at + CHUNK, at + context - cache.length[0], len(ids) - 1)
        logits = model.prefill(ids[at:stop], cache, 0, every=True)  # [stop - at, N]
        likelihoods += _likelihoods(tokenizer, logits.cpu(), ids[at + 1 : stop + 1], top)
        at = stop
        yield None
    yield _with_text(tokenizer, ids, likelihoods)


@torch.inference_mode()
def _likelihoods(tokenizer: Tokenizer, logits: Tensor, ids: list[int], top: int) -> list[Likelihood]:
    """The likelihood of each of `ids` under its row of logits [T, N]."""
    logprobs = logits.log_softmax(-1)  # [T, N]
    own = logprobs.gather(1, torch.tensor(ids)[:, None])  # [T, 1]
    ranks = (logprobs > own).sum(1) + 1
    values, others = logprobs.topk(min(top, logprobs.size(1)))  # [T, top]
    return [
        (value, rank, [(id, tokenizer.decode([id]), other) for id, other in zip(row, likeliest, strict=True)])
        for value, rank, row, likeliest in zip(
            own[:, 0].tolist(), ranks.tolist(), others.tolist(), values.tolist(), strict=True
        )
    ]


def _with_text(tokenizer: Tokenizer, ids: list[int], likelihoods: list[Likelihood]) -> list[TokenScore]:
    """Scores with the characters that each token completes."""
    detokenizer = tokenizer.detokenizer()
    scores, start = [], 0
    for number, (id, (logprob, rank, top)) in enumerate(zip(ids, likelihoods, strict=True)):
        text = detokenizer.feed(id) + (detokenizer.flush() if number == len(ids) - 1 else "")
        scores.append(TokenScore(id, text, start, logprob, rank, top))
        start += len(text)
    return scores
