"""Texts written side by side with one model and one key-value cache.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor

from config import GenerationParams
from inference.cuda_graphs import graphed
from inference.quantize import row_counts
from model import GPT
from sampling import Stopper, likelihoods, sample, seed_of

if TYPE_CHECKING:
    from tokenizer import Tokenizer

CHUNK = 256  # tokens of a prompt read at a time; more of them do not multiply faster, and others wait for a chunk


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
            event = self.finish("stop")
            if self.logprobs is not None:
                event.logprob, event.top = self._likelihoods(logits, token)
            return [event]
        self.ids.append(token)
        for reading in self.readings:
            reading.unread = [token]
        if self.seen:
            self.seen.add(token)
        text, stopped = self.stopper.feed(self.stream.feed(token))
        event = Event(self.index, "token", text, token)
        if self.logprobs is not None:
            event.logprob, event.top = self._likelihoods(logits, token)
        if stopped:
            return [event, self.finish("stop", flush=False)]
        if len(self.ids) - self.prompt_tokens >= self.params.max_tokens:
            return [event, self.finish("length")]
        return [event]

    def _likelihoods(self, logits: Tensor, token: int) -> tuple[float, list[tuple[int, str, float]]]:
        """Log-probability of `token`, and the alternatives asked for as (id, text, log-probability)."""
        logprob, others = likelihoods(logits, token, self.logprobs or 0)
        return logprob, [(id, self.tokenizer.decode([id]), value) for id, value in others]

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
