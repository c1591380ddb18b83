"""From logits to text: filters, seeds, stop strings, and the loop that every surface writes with.

    >>> values, ids = candidates(logits, GenerationParams(top_k=40), seen=None)    # what may still be drawn
    >>> token = sample(logits, params, torch.Generator().manual_seed(seed_of(7, 0)), seen)
    >>> writer = Writer(model, slots=4)
    >>> writer.add(Text(tokenizer, ids, params, seed=7, index=0, context=model.config.block_size))
    >>> while writer.texts: print(writer.step())

One seed, one text. Whether a text is written alone or beside others, by `generate.py` or by the server, its bits are the
same, because nothing about it depends on its neighbours:
- A prompt is read alone, in chunks of CHUNK tokens counted from the start of its window. What one text has read may be
  copied for another that begins with the same chunks: reading them again would give the same bits.
- Then all texts take a step together. The matrices see one of the row counts that `quantize.row_counts` found to
  agree bit for bit; attention goes text by text.
- Each text draws from its own generator, on the CPU in float32, one number a token.
- When a text has filled its context, its window is read anew: a rule of its own tokens only (`Text.roll`).
- A text in a style has the style's control id in front of every window. In a blend of styles it is read in several slots,
  one a style, and drawn from the mixture of their logits (`Text.mixture`).
"""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch
from torch import Tensor

from config import GenerationParams
from graphs import graphed
from model import GPT
from quantize import row_counts

if TYPE_CHECKING:
    from tokenizer import Tokenizer

COLD = 1e-6  # temperatures below it are 0: the likeliest token
CHUNK = 256  # tokens of a prompt read at a time; more of them do not multiply faster, and others wait for a chunk
BLOCK = 64  # logits of which `largest` looks at the maximum first
MASK = 2**64 - 1


class LogitsError(RuntimeError):
    """The model computed something that is no probability."""


@dataclass
class Event:
    """Something that happened to sample `index` of a request. `seq` counts the request's events."""

    index: int
    kind: Literal["started", "token", "done", "error"]
    text: str = ""
    token_id: int | None = None
    logprob: float | None = None
    top: list[tuple[int, str, float]] = field(default_factory=list)
    finish_reason: str | None = None
    message: str | None = None
    seq: int = 0
    usage: dict[str, int] | None = None


@dataclass
class Result:
    """A sample, completed. `seed` with the same settings writes all of the request's samples again."""

    text: str
    finish_reason: str
    tokens: int
    ids: list[int]
    seed: int
    prompt_tokens: int
    truncated: bool

    def add(self, event: Event) -> None:
        """Take in an event of this sample."""
        self.text += event.text
        if event.token_id is not None:
            self.tokens += 1
            self.ids.append(event.token_id)
        self.finish_reason = event.finish_reason or self.finish_reason


def fresh_seed() -> int:
    """A new seed; of 53 bits, which every JSON reader keeps exactly."""
    return secrets.randbits(53)


def seed_of(seed: int, index: int) -> int:
    """The generator's seed of sample `index`: SplitMix64 (Steele et al. 2014), so that samples share nothing."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def penalised(logits: np.ndarray, penalty: float, seen: Tensor | None) -> np.ndarray:
    """logits [N] with those of the ids `seen` divided by `penalty`, or multiplied where negative (Keskar et al. 2019)."""
    if penalty == 1.0 or seen is None or not len(seen):
        return logits
    ids = seen.numpy()
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


def candidates(logits: Tensor, params: GenerationParams, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(logits [M], ids [M]) of the tokens that may be drawn from logits [N], after temperature; greedy leaves one.

    The same set and the same values as transformers' processors in the order repetition penalty, temperature, top-k,
    top-p, min-p; of equal logits at the edge of top-p those with larger ids stay (there it is left open). Raises
    LogitsError where the logits hold NaN or plus infinity.
    """
    values, ids = _candidates(logits, params, seen)
    return torch.from_numpy(values), torch.from_numpy(ids)


def _candidates(logits: Tensor, params: GenerationParams, seen: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """`candidates` in NumPy, whose calls cost a fifth of torch's: with top-k, what follows works on k numbers."""
    values = penalised(logits.numpy(), params.repetition_penalty, seen)
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


def filter_logits(logits: Tensor, params: GenerationParams, seen: Tensor | None = None) -> Tensor:
    """logits [N] after penalty and temperature, -inf where a token may not be drawn; for comparison and display."""
    values, ids = candidates(logits, params, seen)
    return torch.full_like(logits, float("-inf")).index_put((ids,), values)


def sample(logits: Tensor, params: GenerationParams, generator: torch.Generator, seen: Tensor | None = None) -> int:
    """Draw an id from logits [N] (float32, CPU), taking one number from `generator` unless temperature is 0."""
    values, ids = _candidates(logits, params, seen)
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


class Seen:
    """The distinct ids of a text as a tensor that grows in place, for the repetition penalty."""

    def __init__(self, ids: Sequence[int]):
        self.ids = set(ids)
        self.store = torch.tensor(sorted(self.ids), dtype=torch.int64)

    def add(self, token: int) -> None:
        if token not in self.ids:
            if len(self.ids) == len(self.store):
                self.store = torch.cat((self.store, self.store.new_empty(64 + len(self.store))))
            self.store[len(self.ids)] = token
            self.ids.add(token)

    def tensor(self) -> Tensor:
        return self.store[: len(self.ids)]


@dataclass(eq=False)
class Reading:
    """A text in one cache slot, behind the control id of a style (or none)."""

    front: list[int]
    weight: float
    unread: list[int]  # a window still to be read, or one token to go on from
    slot: int = -1
    reading: bool = True
    begun: bool = False
    logits: Tensor | None = None  # of the next token, once computed

    def restart(self, ids: list[int]) -> None:
        """Read a window anew."""
        self.unread, self.reading, self.begun = self.front + ids, True, False


class Text:
    """One sample in the making. All of it follows from its prompt, settings, seed and index."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        params: GenerationParams,
        *,
        seed: int,
        index: int,
        context: int,
        logprobs: int | None = None,
    ):
        """prompt: ids as `generate.prompt_window` leaves them, empty only with a style. context: the model's. logprobs:
        alternatives wanted. Raises StyleError for a style that the tokenizer does not know.
        """
        self.tokenizer, self.params, self.index, self.context = tokenizer, params, index, context
        self.logprobs = logprobs
        self.ids, self.prompt_tokens = list(prompt), len(prompt)
        self.generator = torch.Generator().manual_seed(seed_of(seed, index))
        self.seen = Seen(prompt) if params.repetition_penalty != 1 else None
        self.stream, self.stopper = tokenizer.stream(), Stopper(params.stop)
        blend = [([control], share) for control, share in tokenizer.blend(params.style)] or [([], 1.0)]
        self.readings = [Reading(front, share, front + self.ids) for front, share in blend]
        self.banned = torch.tensor(list(tokenizer.controls.values()), dtype=torch.int64) if tokenizer.controls else None
        self.paused = False
        self.reason: str | None = None
        self.error: Exception | None = None

    @property
    def reading(self) -> bool:
        """Whether its prompt, or after a roll its window, is still being read."""
        return any(reading.reading for reading in self.readings)

    @property
    def slot(self) -> int:
        """The cache slot, of a blend the first."""
        return self.readings[0].slot

    @property
    def written(self) -> list[int]:
        """The ids written so far."""
        return self.ids[self.prompt_tokens :]

    def usage(self) -> dict[str, int]:
        written = len(self.ids) - self.prompt_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
        }

    def roll(self) -> None:
        """The context is full: go on from the style, the `keep` first tokens and the newest, three quarters of it together."""
        window = self.context * 3 // 4 - len(self.readings[0].front)
        keep = min(self.params.keep, window // 2)
        for reading in self.readings:
            reading.restart(self.ids[:keep] + self.ids[keep - window :])

    def mixture(self) -> Tensor:
        """The next token's logits [N], as soon as all readings have theirs; taken out of them.

        A blend is the weighted sum of its styles' logits. That is the weighted sum of their log-probabilities up to a
        constant, on which nothing depends: what all styles find likely stays likely. Control ids are never drawn.
        """
        parts = [(reading.weight, cast(Tensor, reading.logits)) for reading in self.readings]
        for reading in self.readings:
            reading.logits = None
        logits = parts[0][1]
        if len(parts) > 1:
            logits = torch.stack([weight * part for weight, part in parts]).sum(0)
        return logits if self.banned is None else logits.index_fill(0, self.banned, float("-inf"))

    def choose(self, logits: Tensor) -> list[Event]:
        """Draw the next token from logits [N]; the events that follow from it, the last of them `done` at the end."""
        token = sample(logits, self.params, self.generator, self.seen.tensor() if self.seen else None)
        if token == self.tokenizer.eot:
            return [self.finish("stop")]
        self.ids.append(token)
        for reading in self.readings:
            reading.unread = [token]
        if self.seen:
            self.seen.add(token)
        text, stopped = self.stopper.feed(self.stream.feed(token))
        event = Event(self.index, "token", text, token)
        if self.logprobs is not None:
            event.logprob, others = likelihoods(logits, token, self.logprobs)
            event.top = [(id, self.tokenizer.decode([id]), value) for id, value in others]
        if stopped:
            return [event, self.finish("stop", flush=False)]
        if len(self.ids) - self.prompt_tokens >= self.params.max_tokens:
            return [event, self.finish("length")]
        return [event]

    def finish(self, reason: str, flush: bool = True) -> Event:
        """The closing event, with the text that was held back."""
        self.reason = reason
        text = ""
        if flush:
            text, stopped = self.stopper.feed(self.stream.flush())
            text += "" if stopped else self.stopper.rest()
        return Event(self.index, "done", text, finish_reason=reason, usage=self.usage())

    def fail(self, error: Exception) -> Event:
        """The closing event of a text that could not be written on."""
        self.reason, self.error = "error", error
        return Event(self.index, "error", message=str(error) or type(error).__name__)


@dataclass
class Held:
    """What the first tokens of a slot are, read as a prompt: another text that begins alike may copy them."""

    ids: list[int] = field(default_factory=list)
    logits: Tensor | None = None  # after the last of ids

    def shared(self, ids: Sequence[int]) -> int:
        """How many of `ids` need not be read again: whole chunks, or all of them."""
        if self.logits is not None and len(ids) == len(self.ids) and self.ids == ids:
            return len(ids)
        most = min(len(self.ids), len(ids) - 1) // CHUNK * CHUNK
        for start in range(0, most, CHUNK):
            if self.ids[start : start + CHUNK] != ids[start : start + CHUNK]:
                return start
        return most


class Writer:
    """Texts written side by side with one model and one cache. Not for several threads at once."""

    def __init__(self, model: GPT, slots: int):
        self.model, self.counts = model, row_counts(model)
        cuda = model.wte.weight.is_cuda
        self.cache = model.new_cache(slots + cuda)  # one more for rows that only pad a graph
        self.graphs = graphed(model, self.cache, self.counts)
        self.held = [Held() for _ in range(slots)]
        self.free = list(range(slots))
        self.texts: list[Text] = []

    def add(self, text: Text) -> None:
        """Give each reading of a text a slot, of which enough must be free: the one that holds most of its prompt."""
        for reading in text.readings:
            held = {slot: self.held[slot] for slot in self.free}
            reading.slot = max(held, key=lambda slot: (held[slot].shared(reading.unread), -len(held[slot].ids)))
            self.free.remove(reading.slot)
        self.texts.append(text)

    def remove(self, text: Text) -> None:
        """Take a text out; its slots are free at once."""
        self.texts.remove(text)
        self.free += [reading.slot for reading in text.readings]

    @torch.inference_mode()
    def step(self) -> list[tuple[Text, Event]]:
        """Read at most one chunk of one prompt, then one token of every text that is not paused.

        Texts that end are removed. A failure ends the text it belongs to, with an error event, and no other.
        """
        found: list[tuple[Text, Event]] = []
        active = [text for text in self.texts if not text.paused]
        for text in active:
            if not text.reading and self.cache.length[text.slot] >= text.context:
                text.roll()
        writing = [(text, reading) for text in active if not text.reading for reading in text.readings]
        chunks = 1
        for text in [text for text in active if text.reading]:
            if not text.readings[0].begun and len(text.ids) == text.prompt_tokens:
                found.append((text, Event(text.index, "started")))
            if text.params.max_tokens == 0:
                found.append((text, text.finish("length")))
                continue
            for reading in text.readings:
                known = self._known(reading)
                if reading.reading and text.reason is None and (chunks or known):
                    chunks -= not known
                    self._attempt([(text, reading)], self._read, found)
        most = self.counts[-1]
        for first in range(0, len(writing), most):
            self._attempt(writing[first : first + most], self._decode, found)
        for text in active:
            if text.reason is None and all(reading.logits is not None for reading in text.readings):
                try:
                    found += [(text, event) for event in text.choose(text.mixture())]
                except Exception as error:
                    found.append((text, text.fail(error)))
            if text.reason is not None:
                self.remove(text)
        return found

    def _attempt(
        self,
        readings: list[tuple[Text, Reading]],
        act: Callable[[list[Reading]], None],
        found: list[tuple[Text, Event]],
    ) -> None:
        """`act` on all the readings; where that fails, on each alone, so that only the guilty texts end."""
        try:
            act([reading for _, reading in readings])
        except Exception as error:
            if len(readings) > 1:
                for one in readings:
                    self._attempt([one], act, found)
            elif readings[0][0].reason is None:
                found.append((readings[0][0], readings[0][0].fail(error)))

    def _known(self, reading: Reading) -> bool:
        """Whether some slot holds all of a window, so that nothing needs to be computed."""
        return not reading.begun and any(held.shared(reading.unread) == len(reading.unread) for held in self.held)

    def _begin(self, reading: Reading) -> None:
        """Start a window with what some slot, best its own, has read of it."""
        shared = [held.shared(reading.unread) for held in self.held]
        source = max(range(len(shared)), key=lambda slot: (shared[slot], slot == reading.slot))
        count, held = shared[source], self.held[source]
        if source != reading.slot and count:
            self.cache.copy(source, reading.slot, count)
        self.cache.length[reading.slot] = count
        self.held[reading.slot] = Held(held.ids[:count], held.logits if count == len(held.ids) else None)
        reading.begun, reading.unread = True, reading.unread[count:]

    def _read(self, readings: list[Reading]) -> None:
        """The next chunk of one window; its logits when that was the last."""
        (reading,) = readings
        if not reading.begun:
            self._begin(reading)
        held = self.held[reading.slot]
        if reading.unread:
            chunk = reading.unread[:CHUNK]
            held.logits = None
            logits = self.model.prefill(chunk, self.cache, reading.slot)
            held.ids = held.ids + chunk
            reading.unread = reading.unread[CHUNK:]
            if reading.unread:
                return
            held.logits = logits.float().cpu()
        reading.reading, reading.logits = False, held.logits

    def _decode(self, readings: list[Reading]) -> None:
        """The next logits of texts that are being written, all at once."""
        rows = next(count for count in self.counts if count >= len(readings))
        ids, slots = [reading.unread[0] for reading in readings], [reading.slot for reading in readings]
        if self.graphs is not None:
            logits = self.graphs(ids, slots, rows)
        else:
            logits = self.model.decode(ids, self.cache, slots, rows)
        for reading, row in zip(readings, logits.cpu().unbind(), strict=True):
            reading.logits = row


@contextlib.contextmanager
def dropout_off(model: GPT) -> Iterator[None]:
    """Evaluation mode inside; the model's own mode is restored afterwards, whatever happens."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
