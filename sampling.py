"""From logits to the next token: filters and seeds; and where a text ends: stop strings, sentences.

    >>> history = TokenHistory(prompt_ids, len(prompt_ids), tokenizer)  # the caller appends to its list of ids
    >>> values, ids = candidates(logits, GenerationParams(top_k=40), history)     # what may still be drawn
    >>> token = sample(logits, params, torch.Generator().manual_seed(sample_seed(7, 0)), history)

All of it runs on the CPU in float32, for one text at a time, so that a text does not depend on what is written beside it.
"""

from __future__ import annotations

import contextlib
import math
import re
import secrets
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from config import SETTINGS, GenerationParams

if TYPE_CHECKING:
    from tokenizer import Tokenizer

ZERO_TEMPERATURE = 1e-6  # temperatures below it count as 0: the most likely token
BLOCK = 64  # logits of which `top_k` looks at the maximum first
LARGEST_K = 256  # beyond it the compiled `largest` is not faster: it keeps its candidates in order by insertion
DRY_MOST = 1e6  # DRY's largest penalty: with it no token is drawn, however likely
DRY_LONGEST = 200  # ids beyond the allowed length at which DRY stops to compare: the penalty is enormous long before
MASK = 2**64 - 1


def __getattr__(name: str) -> Any:
    """Names of earlier systems' functions answer with the name here."""
    here = {"top_p": "keep_top_p", "nucleus_sampling": "keep_top_p", "repetition_penalty": "penalise_repetition"}
    if name in here:
        raise ImportError(f"sampling.{name} is sampling.{here[name]}: `from sampling import {here[name]}`")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class LogitsError(RuntimeError):
    """Logits are NaN or infinite."""


def random_seed() -> int:
    """A new seed; of 53 bits, which every JSON reader keeps exactly."""
    return secrets.randbits(53)


def sample_seed(seed: int, index: int) -> int:
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


class TokenHistory:
    """The ids of one text so far, as the filters need them. `ids` is the caller's list, which grows at its end.

    prompt_tokens: how many of them are the prompt's; the rest are written. tokenizer: for filters that look at what
    the ids spell. largest: see `with_largest`; may be set later.
    """

    def __init__(
        self,
        ids: list[int],
        prompt_tokens: int = 0,
        tokenizer: Tokenizer | None = None,
        largest: Largest | None = None,
    ):
        self.ids, self.prompt_tokens, self.tokenizer, self.largest = ids, prompt_tokens, tokenizer, largest
        self._known: set[int] = set()
        self._distinct, self._counted = GrowingArray(), 0
        self._all = GrowingArray()
        self._filters: tuple[GenerationParams | None, list[Filter]] = (None, [])

    def filters(self, params: GenerationParams) -> list[Filter]:
        """`active_filters(params)`, worked out once for a text, so that a filter that is off costs nothing."""
        known, found = self._filters
        if known is not params:
            found = active_filters(params)
            if self.largest is not None:
                found = with_largest(found, params, self.largest)
            self._filters = params, found
        return found

    def array(self, last: int = 0) -> np.ndarray:
        """The last ids in order; 0: all of them."""
        self._all.extend(self.ids[self._all.size :])
        return self._all.array()[-last:]

    def written(self, last: int = 0) -> np.ndarray:
        """Those of the `last` ids (0: of all) that come after the prompt, in order."""
        whole = self.array()
        return whole[max(self.prompt_tokens, len(whole) - last if last else 0) :]

    def distinct(self, last: int = 0) -> np.ndarray:
        """Each of the `last` ids (0: of all) once, in no particular order."""
        if last:
            return np.unique(self.array(last))
        if self._counted < len(self.ids):
            new = set(self.ids[self._counted :]) - self._known
            self._known |= new
            self._distinct.extend(sorted(new))
            self._counted = len(self.ids)
        return self._distinct.array()


NOTHING = TokenHistory([])


@lru_cache(maxsize=8)
def _all_ids(count: int) -> np.ndarray:
    ids = np.arange(count)
    ids.setflags(write=False)
    return ids


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities [M] of logits [M], float32."""
    powers = np.exp(logits - logits.max())
    return cast(np.ndarray, powers / powers.sum())


def _check(top: np.ndarray) -> None:
    """Raise LogitsError unless the largest logit (NaN counts as larger than all) is a number."""
    if not math.isfinite(top):
        raise LogitsError(
            f"the model's logits hold {float(top)}: its weights are damaged, or too large for their number format; "
            "check the checkpoint, or try --dtype float32"
        )


def top_k(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(values [k], places [k]) of the largest of logits [M], falling, NaN first; in less than half of torch.topk's time.

    Of blocks of BLOCK logits, k have maxima of at least the k-th largest: what lies below it is not looked at.
    """
    whole = len(logits) // BLOCK * BLOCK
    maxima = logits
    if whole >= 4 * k * BLOCK:
        maxima = torch.from_numpy(logits[:whole]).view(-1, BLOCK).amax(1).numpy()
    least = np.partition(maxima, len(maxima) - k)[len(maxima) - k]
    places = np.flatnonzero(~(logits < least))
    places = places[logits[places].argsort(kind="stable")[::-1][:k]]
    return logits[places], places


Logits = np.ndarray | Tensor  # float32, on the CPU

# A filter takes candidates, logits [M] with their ids [M], and returns those that are left, in any order. It changes
# neither array in place. Penalties come first and get all N ids: to them the logit of id i is logits[i].
Candidates = tuple[np.ndarray, np.ndarray]
Filter = Callable[[np.ndarray, np.ndarray, GenerationParams, TokenHistory, torch.Generator | None], Candidates]
# `inference/candidates.py: largest`, which is compiled
Largest = Callable[[np.ndarray, np.ndarray, np.float32, np.float32, int, np.ndarray, np.ndarray], bool]


def add_bias(logits: np.ndarray, ids: np.ndarray, params: GenerationParams, *_: Any) -> Candidates:
    """Add the values of `logit_bias` to the logits of its ids (OpenAI's API reference); ids from N on are skipped."""
    bias = {id: value for id, value in params.logit_bias.items() if id < len(logits)}
    logits = logits.copy()
    logits[list(bias)] += np.array(list(bias.values()), dtype=np.float32)
    return logits, ids


def penalise_repetition(
    logits: np.ndarray, ids: np.ndarray, params: GenerationParams, text: TokenHistory, *_: Any
) -> Candidates:
    """Divide the logits of ids in the text by `repetition_penalty`, or multiply negative ones (Keskar et al. 2019)."""
    if not text.ids:
        return logits, ids
    seen, penalty = text.distinct(params.penalty_last_n), np.float32(params.repetition_penalty)
    held, logits = logits[seen], logits.copy()
    logits[seen] = np.where(held < 0, held * penalty, held / penalty)
    return logits, ids


def penalise_frequency(
    logits: np.ndarray, ids: np.ndarray, params: GenerationParams, text: TokenHistory, *_: Any
) -> Candidates:
    """Subtract `frequency_penalty` from an id's logit as often as it was written (OpenAI's API reference)."""
    written, counts = np.unique(text.written(params.penalty_last_n), return_counts=True)
    logits = logits.copy()
    logits[written] -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
    return logits, ids


def penalise_presence(
    logits: np.ndarray, ids: np.ndarray, params: GenerationParams, text: TokenHistory, *_: Any
) -> Candidates:
    """Subtract `presence_penalty` from the logits of ids that were written at least once (OpenAI's API reference)."""
    logits = logits.copy()
    logits[np.unique(text.written(params.penalty_last_n))] -= np.float32(params.presence_penalty)
    return logits, ids


@lru_cache(maxsize=32)
def breaker_ids(tokenizer: Tokenizer, breakers: tuple[str, ...]) -> np.ndarray:
    """Ids, rising, whose bytes hold one of `breakers`; of a string that no single id holds, the last id it encodes to."""
    found: set[int] = set()
    for breaker in breakers:
        ids = {id for id in range(tokenizer.vocab_size) if breaker.encode() in tokenizer.piece(id)}
        if not ids:
            with contextlib.suppress(ValueError):  # a small alphabet may lack its characters: it never occurs then
                ids = set(tokenizer.encode(breaker)[-1:])
        found |= ids
    return np.array(sorted(found), dtype=np.int64)


def penalise_dry(
    logits: np.ndarray, ids: np.ndarray, params: GenerationParams, text: TokenHistory, *_: Any
) -> Candidates:
    """DRY ("don't repeat yourself", P. E. Weidmann 2024, text-generation-webui pull request 5677).

    For an id that followed, somewhere in the text, the same L ids with which the text now ends (the longest such L),
    the logit falls by `dry_multiplier` x `dry_base` ^ (L - `dry_allowed_length`), if L is at least the allowed length;
    that exponent is DRY_LONGEST at most, and the penalty DRY_MOST. No repeated passage extends across an id of
    `dry_sequence_breakers`, and none of these ids is penalised.
    """
    whole = text.array(params.penalty_last_n)
    none = np.empty(0, dtype=np.int64)
    breakers = breaker_ids(text.tokenizer, params.dry_sequence_breakers) if text.tokenizer else none
    broken = np.isin(whole, breakers)
    end = len(whole) - 1
    if end < 1 or broken[end]:
        return logits, ids
    ends = np.flatnonzero((whole[:end] == whole[end]) & ~broken[1:])  # where an earlier occurrence ends
    allowed, base = params.dry_allowed_length, params.dry_base
    penalties: dict[int, float] = {}
    length = 1
    while len(ends):
        if length >= allowed:  # longer passages come later and overwrite the penalty
            penalty = min(params.dry_multiplier * base ** (length - allowed), DRY_MOST)
            penalties |= dict.fromkeys(whole[ends + 1].tolist(), penalty)
        if length >= min(allowed + DRY_LONGEST, end) or broken[end - length]:
            break
        ends = ends[ends >= length]
        ends = ends[whole[ends - length] == whole[end - length]]
        length += 1
    if penalties:
        logits = logits.copy()
        logits[list(penalties)] -= np.array(list(penalties.values()), dtype=np.float32)
    return logits, ids


def keep_top_n_sigma(logits: np.ndarray, ids: np.ndarray, params: GenerationParams, *_: Any) -> Candidates:
    """Ids whose logit is at least the largest minus `top_n_sigma` standard deviations of all finite logits.

    Top-n-sigma (Tang et al. 2024, https://arxiv.org/abs/2411.07641): it comes before the temperature, on which the set
    does not depend; the deviation is the population's, as in llama.cpp.
    """
    top = logits.max()
    _check(top)
    kept = logits >= top - np.float32(params.top_n_sigma) * logits[np.isfinite(logits)].std()
    return logits[kept], ids[kept]


def apply_temperature(logits: np.ndarray, ids: np.ndarray, params: GenerationParams, *_: Any) -> Candidates:
    """Divide by the temperature and keep the `top_k` largest, with all that equal the last; temperature 0 keeps one.

    The two are one filter because it is much cheaper to look for the largest first and to divide k numbers. Raises
    LogitsError where the logits hold NaN or plus infinity.
    """
    if params.temperature < ZERO_TEMPERATURE:
        best = np.argmax(logits, keepdims=True)
        _check(logits[best[0]])
        return logits[best], ids[best]
    k, temperature = params.top_k, np.float32(params.temperature)
    if not 0 < k < len(logits):
        _check(logits.max())
        return logits / temperature, ids
    largest, places = top_k(logits, k + 1)  # one more, to see whether the last place is shared
    _check(largest[0])
    scaled = largest / temperature
    if scaled[-1] == scaled[-2]:
        logits = logits / temperature
        places = np.flatnonzero(logits >= scaled[-2])
        return logits[places], ids[places]
    return scaled[:-1], ids[places[:-1]]


def keep_top_p(logits: np.ndarray, ids: np.ndarray, params: GenerationParams, *_: Any) -> Candidates:
    """The smallest set of most likely ids whose probabilities sum to `top_p` (Holtzman et al. 2020, nucleus sampling).

    Of equal logits at the edge those with larger ids stay, which transformers leaves open.
    """
    order = np.lexsort((ids, logits))
    logits, ids = logits[order], ids[order]
    first = int(softmax(logits).cumsum().searchsorted(np.float32(1 - params.top_p), side="right"))
    first = min(first, len(ids) - 1)
    return logits[first:], ids[first:]


def keep_min_p(logits: np.ndarray, ids: np.ndarray, params: GenerationParams, *_: Any) -> Candidates:
    """Ids at least `min_p` times as likely as the most likely one (Nguyen et al. 2024)."""
    probs = softmax(logits)
    kept = probs >= np.float32(params.min_p) * probs.max()
    return logits[kept], ids[kept]


def keep_typical(logits: np.ndarray, ids: np.ndarray, params: GenerationParams, *_: Any) -> Candidates:
    """The smallest set of ids of probability `typical_p` whose surprise, -log p, is nearest to its mean, the entropy.

    Locally typical sampling (Meister et al. 2023, https://arxiv.org/abs/2202.00666). Ids as near as the last one stay.
    """
    probs = softmax(logits)
    surprise = -np.log(probs, where=probs > 0, out=np.full_like(probs, -np.inf))
    entropy = (probs * np.where(probs > 0, surprise, 0)).sum()
    distance = np.abs(surprise - entropy)
    order = np.lexsort((ids, distance))
    short = int((probs[order].cumsum() < np.float32(params.typical_p)).sum())
    kept = distance <= distance[order[min(short, len(order) - 1)]]
    return logits[kept], ids[kept]


def apply_xtc(
    logits: np.ndarray, ids: np.ndarray, params: GenerationParams, text: TokenHistory, generator: torch.Generator | None
) -> Candidates:
    """With probability `xtc_probability`, drop the ids of at least `xtc_threshold` except the least likely of them.

    XTC, exclude top choices (P. E. Weidmann 2024, text-generation-webui pull request 6335). Of equally unlikely ones all
    stay. It draws one number a token from the text's generator; without a generator, or with one candidate, it
    changes nothing.
    """
    if generator is None or len(ids) == 1:
        return logits, ids
    if float(torch.rand((), generator=generator, dtype=torch.float64)) >= params.xtc_probability:
        return logits, ids
    probs = softmax(logits)
    top = probs >= np.float32(params.xtc_threshold)
    kept = ~top | (probs == probs[top].min(initial=np.inf))
    return logits[kept], ids[kept]


# In this order, as in transformers: penalties on the logits of all ids, temperature, then what cuts off the unlikely.
# A filter runs unless the setting beside it has its `off` value; the temperature's always runs.
FILTERS: tuple[tuple[str, Filter], ...] = (
    ("logit_bias", add_bias),
    ("repetition_penalty", penalise_repetition),
    ("frequency_penalty", penalise_frequency),
    ("presence_penalty", penalise_presence),
    ("dry_multiplier", penalise_dry),
    ("top_n_sigma", keep_top_n_sigma),
    ("temperature", apply_temperature),
    ("top_p", keep_top_p),
    ("min_p", keep_min_p),
    ("typical_p", keep_typical),
    ("xtc_probability", apply_xtc),
)


def active_filters(params: GenerationParams) -> list[Filter]:
    """Those of FILTERS that `params` switch on, in order."""
    return [
        function for name, function in FILTERS if name == "temperature" or getattr(params, name) != SETTINGS[name].off
    ]


def with_largest(filters: list[Filter], params: GenerationParams, largest: Largest) -> list[Filter]:
    """`filters`, the first of them done by the compiled `largest` where it can: repetition penalty, temperature, top-k.

    The same numbers in less than half of the time.
    """
    penalised = filters[0] is penalise_repetition
    penalty = np.float32(params.repetition_penalty) if penalised else np.float32(1)
    k, temperature = params.top_k, np.float32(params.temperature)
    if filters[penalised] is not apply_temperature or not 0 < k <= LARGEST_K or temperature < ZERO_TEMPERATURE:
        return filters

    def first_filters(
        logits: np.ndarray,
        ids: np.ndarray,
        params: GenerationParams,
        text: TokenHistory,
        generator: torch.Generator | None,
    ) -> Candidates:
        seen = text.distinct(params.penalty_last_n) if penalised else text.array()[:0]
        values, places = np.empty(k + 1, dtype=np.float32), np.empty(k + 1, dtype=np.int64)
        if k < len(ids) and largest(logits, seen, penalty, temperature, k, values, places):
            return values[:-1], places[:-1]
        for function in filters[: penalised + 1]:
            logits, ids = function(logits, ids, params, text, generator)
        return logits, ids

    return [first_filters, *filters[penalised + 1 :]]


def _candidates(
    logits: Logits, params: GenerationParams, history: TokenHistory, generator: torch.Generator | None
) -> Candidates:
    """All ids of logits [N] through FILTERS; in NumPy, whose calls cost a fifth of torch's."""
    values = logits if isinstance(logits, np.ndarray) else logits.numpy()
    ids = _all_ids(len(values))
    for function in history.filters(params):
        values, ids = function(values, ids, params, history, generator)
    return values, ids


def candidates(
    logits: Tensor, params: GenerationParams, history: TokenHistory = NOTHING, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """(logits [M], ids [M]) of the tokens that may be drawn from logits [N] after all FILTERS; at temperature 0 one.

    The same set and the same values as transformers' processors leave. Raises LogitsError where the logits hold NaN or
    plus infinity.
    """
    values, ids = _candidates(logits, params, history, generator)
    return torch.from_numpy(values), torch.from_numpy(np.array(ids))


def filter_logits(
    logits: Tensor, params: GenerationParams, history: TokenHistory = NOTHING, generator: torch.Generator | None = None
) -> Tensor:
    """logits [N] after all FILTERS, -inf where a token may not be drawn; for comparison and display."""
    values, ids = candidates(logits, params, history, generator)
    return torch.full_like(logits, float("-inf")).index_put((ids,), values)


def sample(
    logits: Logits, params: GenerationParams, generator: torch.Generator, history: TokenHistory = NOTHING
) -> int:
    """Draw an id from logits [N] (float32, CPU), taking one number from `generator` (with XTC two) unless temperature is 0."""
    values, ids = _candidates(logits, params, history, generator)
    if len(ids) == 1 and params.temperature < ZERO_TEMPERATURE:
        return int(ids[0])
    summed = softmax(values).cumsum(dtype=np.float64)
    drawn = float(torch.rand((), generator=generator, dtype=torch.float64)) * summed[-1]
    return int(ids[min(int(summed.searchsorted(drawn, side="right")), len(ids) - 1)])


def likelihoods(logits: Logits, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """(log-probability of `token`, the `top` most likely as (id, log-probability)) under logits [N], unfiltered."""
    logits = torch.as_tensor(logits)
    total = logits.logsumexp(-1)
    values, ids = logits.topk(min(top, len(logits)))
    return float(logits[token] - total), list(zip(ids.tolist(), (values - total).tolist(), strict=True))


# What a sentence ends with: its mark and what closes a quotation or bracket behind it.
_SENTENCE_END = re.compile(r"""[.!?…]+[”’"'»)\]]*(?=\s|$)""")
# A point that ends no sentence: behind a title, a number's name, or an initial (but `said I.` is an end).
_ABBREVIATION = re.compile(
    r"\b(?:Mr|Mrs|Ms|Mme|Mlle|Messrs|Dr|Prof|Rev|Hon|St|Capt|Col|Gen|Lieut|Sergt|Esq|No|Vol|vol|viz|[A-HJ-Z])\.$"
)
SENTENCE_TAIL = 24  # characters that `sentence_end` needs to see of a sentence to know whether it has ended


def sentence_end(text: str) -> int:
    """Length of `text` up to its last finished sentence, closing quotation marks included; 0 if none is finished."""
    end = 0
    for found in _SENTENCE_END.finditer(text):
        if not _ABBREVIATION.search(text[max(0, found.start() - SENTENCE_TAIL) : found.end()]):
            end = found.end()
    return end


class StopStringMatcher:
    """Cuts a growing text before the first stop string that it completes, and holds back what may begin one.

    One matcher of Knuth, Morris & Pratt (1977) a stop string, so that it does not matter how the text is cut in pieces.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops = [(stop, self._table(stop)) for stop in stops]
        self.matched = [0] * len(stops)  # characters of each stop string that the text ends with
        self.held = ""

    @staticmethod
    def _table(stop: str) -> list[int]:
        """KMP failure table: for each prefix the length of its longest proper prefix that is also a suffix."""
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
