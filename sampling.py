"""From logits to the next token: filters, seeds and stop strings.

    >>> history = History(prompt_ids, len(prompt_ids), tokenizer)       # the caller appends to its list of ids
    >>> values, ids = candidates(logits, GenerationParams(top_k=40), history)     # what may still be drawn
    >>> token = sample(logits, params, torch.Generator().manual_seed(seed_of(7, 0)), history)

All of it runs on the CPU in float32, for one text at a time, so that a text does not depend on what is written beside it.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from config import GenerationParams

if TYPE_CHECKING:
    from tokenizer import Tokenizer

COLD = 1e-6  # temperatures below it are 0: the likeliest token
BLOCK = 64  # logits of which `largest` looks at the maximum first
MASK = 2**64 - 1


class LogitsError(RuntimeError):
    """The model computed something that is no probability."""


def fresh_seed() -> int:
    """A new seed; of 53 bits, which every JSON reader keeps exactly."""
    return secrets.randbits(53)


def seed_of(seed: int, index: int) -> int:
    """The generator's seed of sample `index`: SplitMix64 (Steele et al. 2014), so that samples share nothing."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


class GrowingArray:
    """Ids in an int64 array that grows at its end without being copied each time."""

    def __init__(self) -> None:
        self.store, self.size = np.empty(64, dtype=np.int64), 0

    def extend(self, ids: Sequence[int]) -> None:
        end = self.size + len(ids)
        if end > len(self.store):
            self.store = np.concatenate((self.store[: self.size], np.empty(end, dtype=np.int64)))
        self.store[self.size : end] = ids
        self.size = end

    def array(self) -> np.ndarray:
        return self.store[: self.size]


class History:
    """The ids of one text so far, as the filters need them. `ids` is the caller's list, which grows at its end.

    prompt_tokens: how many of them are the prompt's; the rest are written. tokenizer: for filters that look at what
    the ids spell.
    """

    def __init__(self, ids: list[int], prompt_tokens: int = 0, tokenizer: Tokenizer | None = None):
        self.ids, self.prompt_tokens, self.tokenizer = ids, prompt_tokens, tokenizer
        self._known: set[int] = set()
        self._distinct, self._counted = GrowingArray(), 0

    def distinct(self) -> np.ndarray:
        """Each id of the text once, in no particular order."""
        if self._counted < len(self.ids):
            new = set(self.ids[self._counted :]) - self._known
            self._known |= new
            self._distinct.extend(sorted(new))
            self._counted = len(self.ids)
        return self._distinct.array()


NOTHING = History([])


def penalised(logits: np.ndarray, penalty: float, history: History) -> np.ndarray:
    """logits [N] with those of ids in the text divided by `penalty`, or multiplied where negative (Keskar et al. 2019)."""
    if penalty == 1.0 or not history.ids:
        return logits
    ids = history.distinct()
    held, logits = logits[ids], logits.copy()
    logits[ids] = np.where(held < 0, held * np.float32(penalty), held / np.float32(penalty))
    return logits


def _check(top: np.ndarray) -> None:
    """Raise LogitsError unless the largest logit (NaN counts as larger than all) is a number."""
    if not math.isfinite(top):
        raise LogitsError(
            f"the model's logits hold {float(top)}: its weights are damaged, or too large for their number format; "
            "check the checkpoint, or try --dtype float32"
        )


def largest(logits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(values [count], ids [count]) of the largest of logits [N], falling, NaN first; in less than half of topk's time.

    Of blocks of BLOCK logits, `count` have maxima of at least the count-th largest: what lies below it is not looked at.
    """
    whole = len(logits) // BLOCK * BLOCK
    maxima = logits
    if whole >= 4 * count * BLOCK:
        maxima = torch.from_numpy(logits[:whole]).view(-1, BLOCK).amax(1).numpy()
    least = np.partition(maxima, len(maxima) - count)[len(maxima) - count]
    ids = np.flatnonzero(~(logits < least))
    ids = ids[logits[ids].argsort(kind="stable")[::-1][:count]]
    return logits[ids], ids


def candidates(logits: Tensor, params: GenerationParams, history: History = NOTHING) -> tuple[Tensor, Tensor]:
    """(logits [M], ids [M]) of the tokens that may be drawn from logits [N], after temperature; greedy leaves one.

    The same set and the same values as transformers' processors in the order repetition penalty, temperature, top-k,
    top-p, min-p; of equal logits at the edge of top-p those with larger ids stay (there it is left open). Raises
    LogitsError where the logits hold NaN or plus infinity.
    """
    values, ids = _candidates(logits, params, history)
    return torch.from_numpy(values), torch.from_numpy(ids)


def _candidates(logits: Tensor, params: GenerationParams, history: History) -> tuple[np.ndarray, np.ndarray]:
    """`candidates` in NumPy, whose calls cost a fifth of torch's: with top-k, what follows works on k numbers."""
    values = penalised(logits.numpy(), params.repetition_penalty, history)
    N, temperature = len(values), np.float32(params.temperature)
    if params.temperature < COLD:
        best = np.argmax(values, keepdims=True)
        _check(values[best[0]])
        return values[best], best
    if 0 < params.top_k < N:
        top, ids = largest(values, params.top_k + 1)  # one more, to see whether the last place is shared
        _check(top[0])
        scaled = top / temperature
        if scaled[-1] == scaled[-2]:
            least, values = scaled[-2], values / temperature
            ids = np.flatnonzero(values >= least)
            values = values[ids]
        else:
            values, ids = scaled[:-1], ids[:-1]
    else:
        _check(values.max())
        values, ids = values / temperature, np.arange(N)
    if params.top_p < 1:
        order = np.lexsort((ids, values))
        values, ids = values[order], ids[order]
        kept = shares(values).cumsum() > np.float32(1 - params.top_p)
        kept[-1] = True
        values, ids = values[kept], ids[kept]
    if params.min_p > 0:
        likely = shares(values)
        kept = likely >= np.float32(params.min_p) * likely.max()
        values, ids = values[kept], ids[kept]
    return values, ids


def shares(values: np.ndarray) -> np.ndarray:
    """softmax of values [M], float32"""
    powers = np.exp(values - values.max())
    return cast(np.ndarray, powers / powers.sum())


def filter_logits(logits: Tensor, params: GenerationParams, history: History = NOTHING) -> Tensor:
    """logits [N] after penalty and temperature, -inf where a token may not be drawn; for comparison and display."""
    values, ids = candidates(logits, params, history)
    return torch.full_like(logits, float("-inf")).index_put((ids,), values)


def sample(logits: Tensor, params: GenerationParams, generator: torch.Generator, history: History = NOTHING) -> int:
    """Draw an id from logits [N] (float32, CPU), taking one number from `generator` unless temperature is 0."""
    values, ids = _candidates(logits, params, history)
    if len(ids) == 1 and params.temperature < COLD:
        return int(ids[0])
    summed = shares(values).cumsum(dtype=np.float64)
    drawn = float(torch.rand((), generator=generator, dtype=torch.float64)) * summed[-1]
    return int(ids[min(int(summed.searchsorted(drawn, side="right")), len(ids) - 1)])


def likelihoods(logits: Tensor, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """(log-probability of `token`, the `top` likeliest as (id, log-probability)) under logits [N], unfiltered."""
    total = logits.logsumexp(-1)
    values, ids = logits.topk(min(top, len(logits)))
    return float(logits[token] - total), list(zip(ids.tolist(), (values - total).tolist(), strict=True))


class Stopper:
    """Cuts a growing text before the first stop string that it completes, and holds back what may begin one.

    One matcher of Knuth, Morris & Pratt (1977) a stop string, so that it does not matter how the text is cut in pieces.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops = [(stop, self._table(stop)) for stop in stops]
        self.matched = [0] * len(stops)  # characters of each stop string that the text ends with
        self.held = ""

    @staticmethod
    def _table(stop: str) -> list[int]:
        """For each prefix the length of its longest end that is also its beginning."""
        table = [0] * len(stop)
        for at in range(1, len(stop)):
            length = table[at - 1]
            while length and stop[at] != stop[length]:
                length = table[length - 1]
            table[at] = length + (stop[at] == stop[length])
        return table

    def feed(self, piece: str) -> tuple[str, bool]:
        """(text that is safe to show, whether a stop string has ended it)"""
        if not self.stops:
            return piece, False
        text = self.held + piece
        for at in range(len(self.held), len(text)):
            longest = 0
            for which, (stop, table) in enumerate(self.stops):
                length = self.matched[which]
                while length and text[at] != stop[length]:
                    length = table[length - 1]
                length += text[at] == stop[length]
                if length == len(stop):
                    longest = max(longest, length)
                self.matched[which] = length
            if longest:
                self.held = ""
                return text[: at + 1 - longest], True
        safe = len(text) - max(self.matched)
        self.held = text[safe:]
        return text[:safe], False

    def rest(self) -> str:
        """What was held back, when no more text will come."""
        rest, self.held = self.held, ""
        return rest
