"""Continuous batching: sequences written side by side with one model and one key-value cache.

    >>> decoder = BatchDecoder(model, slots=4)
    >>> decoder.add(Sequence(tokenizer, ids, params, seed=7, index=0, context=model.config.block_size))
    >>> while decoder.sequences: print(decoder.step())

The path of one request, called by `writing.stream` (one caller) or by `engine.Engine` (many):

1. Prompt to ids: `writing.encode_prompt`; `writing.prompt_window` cuts them to the model's context.
2. Each sample of the request becomes a `Sequence`: its ids, settings, random generator, detokenizer and stop strings.
   `BatchDecoder.add` gives it a slot of the key-value cache.
3. Prefill: the model reads the prompt in chunks of CHUNK tokens (`BatchDecoder._prefill`). The last chunk gives the
   logits of the first new token.
4. Decode: from then on the model reads one token a step, in one batch with all other sequences (`BatchDecoder._decode`).
5. Sample: `sampling.sample` draws the next id from the logits (`Sequence.sample_next`). The id becomes characters, and
   the text is searched for stop strings. After max_tokens it ends with its sentence, at most finish_sentence tokens later.
6. `BatchDecoder.step` returns what happened as `Event`s: `started`, a `token` for each id, `done`.

Continuous batching: sequences join and leave between any two steps, and none waits for the longest. A step reads at
most one chunk of one prompt, so a long prompt delays the others by one chunk at a time.

Rows are independent of each other. One seed gives one text, bit for bit, whether it is written alone or beside others:
- A prompt is prefilled alone, in chunks counted from the start of its window.
- On CPUs a step is `compiled.CompiledStep`, in which each row is summed on its own in a fixed order. On GPUs the matrices
  multiply one of the numbers of rows that `quantize.row_counts` found to agree bit for bit, with rows of padding if need
  be. Attention goes row by row over each row's own slot.
- Each sequence draws from its own generator, on the CPU in float32, one number a token.
- When the context is full, what is read again follows from the sequence's own ids alone (`Sequence.shift_context`).

Prefix cache: each slot remembers which ids it has read (`PrefixCacheEntry`), also after its sequence has left; so it takes
no memory of its own. A prompt that begins with the same ids copies their keys and values instead of computing them, which
gives the same bits: with kernels for any number of ids, prompt or written; elsewhere for whole chunks of a prompt, as
chunks are counted from the start. So samples of one prompt share one prefill, and a story is continued where it ended.

Styles: a sequence in a style has the style's control id in front of every window. A blend of styles occupies one slot for
each style; the next token is drawn from the weighted sum of their logits (`Sequence.take_logits`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, cast

import numpy as np
import torch

from config import GenerationParams
from inference.compiled import CompiledStep
from inference.cuda_graphs import record_graphs
from inference.quantize import row_counts
from model import GPT
from sampling import (
    SENTENCE_TAIL,
    StopStringMatcher,
    TokenHistory,
    filter_logits,
    likelihoods,
    sample,
    sample_seed,
    sentence_end,
)
from tokenizer import Tokenizer

CHUNK = 256  # tokens of a prompt prefilled at a time: more are not faster per token, and the other sequences wait


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
    """A completed sample. `seed` with the same settings writes all of the request's samples again."""

    text: str
    finish_reason: str
    tokens: int
    ids: list[int]
    seed: int
    prompt_tokens: int
    truncated: bool

    def add(self, event: Event) -> None:
        """Append an event of this sample."""
        self.text += event.text
        if event.token_id is not None:
            self.tokens += 1
            self.ids.append(event.token_id)
        self.finish_reason = event.finish_reason or self.finish_reason


@dataclass(eq=False)
class SequenceState:
    """State of one sequence in one KV-cache slot, with its optional style token."""

    control: list[int]
    weight: float  # of this style's logits in a blend
    pending: list[int]  # ids that the model has not read: the rest of a window, or the newest token
    slot: int = -1
    prefilling: bool = True
    prefix_reused: bool = False  # whether the prefix cache was consulted for this window
    logits: np.ndarray | None = None  # of the next token [N], once computed

    def restart(self, ids: list[int]) -> None:
        """Prefill a new window."""
        self.pending, self.prefilling, self.prefix_reused = self.control + ids, True, False


class Sequence:
    """One sample being written. All of it follows from its prompt, settings, seed and index."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: list[int],
        params: GenerationParams,
        *,
        seed: int,
        index: int,
        context: int,
        logprobs: int | None = None,
        post_sampling: bool = False,
    ):
        """prompt: ids as `writing.prompt_window` returns them, empty only with a style. context: the model's, in tokens.
        logprobs: number of alternatives reported with each token. post_sampling: with the probabilities that the filters
        leave, instead of the model's. Raises StyleError for a style that the tokenizer does not know.
        """
        self.tokenizer, self.params, self.index, self.context = tokenizer, params, index, context
        self.logprobs, self.post_sampling = logprobs, post_sampling
        self.ids, self.prompt_tokens = list(prompt), len(prompt)
        self.generator = torch.Generator().manual_seed(sample_seed(seed, index))
        self.history = TokenHistory(self.ids, len(prompt), tokenizer)
        self.detokenizer, self.stopper = tokenizer.detokenizer(), StopStringMatcher(params.stop)
        self.tail = ""  # the last SENTENCE_TAIL characters written
        styles = [([control], share) for control, share in tokenizer.blend(params.style)] or [([], 1.0)]
        self.states = [SequenceState(control, share, control + self.ids) for control, share in styles]
        controls = list(tokenizer.controls.values())
        self.never_drawn = np.array(controls, dtype=np.int64) if controls else None
        self.paused = False
        self.finish_reason: str | None = None
        self.error: Exception | None = None

    @property
    def prefilling(self) -> bool:
        """Whether the prompt, or the new window after a shift of the context, is still being read."""
        return any(state.prefilling for state in self.states)

    @property
    def slot(self) -> int:
        """The cache slot; of a blend the first."""
        return self.states[0].slot

    @property
    def output_ids(self) -> list[int]:
        """The ids written so far, without the prompt."""
        return self.ids[self.prompt_tokens :]

    def usage(self) -> dict[str, int]:
        written = len(self.ids) - self.prompt_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
        }

    def shift_context(self) -> None:
        """Context full: prefill again with the style token, the first `keep` and the newest ids, 3/4 of the context in all."""
        window = self.context * 3 // 4 - len(self.states[0].control)
        keep = min(self.params.keep, window // 2)
        for state in self.states:
            state.restart(self.ids[:keep] + self.ids[keep - window :])

    def take_logits(self) -> np.ndarray:
        """Take and combine the logits of all states, each of which must be ready; returns the next token's logits [N].

        A blend is the weighted sum of its styles' logits. That is the weighted sum of their log-probabilities up to a
        constant that no filter depends on: a token stays likely if every style finds it likely. Control ids get minus
        infinity: no sequence may draw them, so that is written into the array as it is.
        """
        parts = [(state.weight, cast(np.ndarray, state.logits)) for state in self.states]
        for state in self.states:
            state.logits = None
        logits = parts[0][1]
        if len(parts) > 1:
            logits = np.stack([np.float32(weight) * part for weight, part in parts]).sum(0)
        if self.never_drawn is not None:
            logits[self.never_drawn] = -np.inf
        return logits

    def sample_next(self, logits: np.ndarray) -> list[Event]:
        """Draw the next token from logits [N]; returns its event, followed by `done` if the text ends with it."""
        shown = self._filtered(logits) if self.post_sampling else logits
        token = sample(logits, self.params, self.generator, self.history)
        if token == self.tokenizer.eot:
            event = self.finish("stop")
            if self.logprobs is not None:
                event.logprob, event.top = self._likelihoods(shown, token)
            return [event]
        if self._finishes_sentence(token):
            return [self.finish("length")]
        self.ids.append(token)
        for state in self.states:
            state.pending = [token]
        piece = self.detokenizer.feed(token)
        self.tail = (self.tail + piece)[-SENTENCE_TAIL:]
        text, stopped = self.stopper.feed(piece)
        event = Event(self.index, "token", text, token)
        if self.logprobs is not None:
            event.logprob, event.top = self._likelihoods(shown, token)
        if stopped:
            return [event, self.finish("stop", flush=False)]
        if len(self.ids) - self.prompt_tokens >= self.params.max_tokens + self.params.finish_sentence:
            return [event, self.finish("length")]
        return [event]

    def _finishes_sentence(self, token: int) -> bool:
        """Whether the text, which has its max_tokens, has just ended a sentence: `token` drawn after it begins a new one.

        Only the next token tells whether a quotation mark belongs to the sentence. It is then neither shown nor counted.
        """
        text = self.tail.rstrip()
        if len(self.ids) - self.prompt_tokens < self.params.max_tokens or not text or sentence_end(text) != len(text):
            return False
        return text != self.tail or self.tokenizer.decode([token])[:1].isspace()

    def _likelihoods(self, logits: np.ndarray, token: int) -> tuple[float, list[tuple[int, str, float]]]:
        """Log-probability of `token`, and the requested alternatives as (id, text, log-probability)."""
        logprob, others = likelihoods(logits, token, self.logprobs or 0)
        return logprob, [(id, self.tokenizer.decode([id]), value) for id, value in others if value > float("-inf")]

    def _filtered(self, logits: np.ndarray) -> np.ndarray:
        """The logits [N] from which the next token is drawn, by a copy of the generator."""
        copy = torch.Generator()
        copy.set_state(self.generator.get_state())
        return filter_logits(torch.from_numpy(logits), self.params, self.history, copy).numpy()

    def finish(self, reason: str, flush: bool = True) -> Event:
        """The `done` event, with text that was held back because it could have begun a stop string or a character."""
        self.finish_reason = reason
        text = ""
        if flush:
            text, stopped = self.stopper.feed(self.detokenizer.flush())
            text += "" if stopped else self.stopper.rest()
        return Event(self.index, "done", text, finish_reason=reason, usage=self.usage())

    def fail(self, error: Exception) -> Event:
        """The `error` event of a sequence that cannot be continued."""
        self.finish_reason, self.error = "error", error
        return Event(self.index, "error", message=str(error) or type(error).__name__)


@dataclass
class PrefixCacheEntry:
    """The ids that a slot has read, in order from its beginning; other sequences may copy their keys and values."""

    ids: list[int] = field(default_factory=list)
    logits: np.ndarray | None = None  # after the first `prompt` of ids
    prompt: int = 0

    def reusable(self, ids: list[int], grain: int) -> int:
        """How many of `ids` need not be computed: a multiple of `grain` of the common prefix, or all ids of its prompt."""
        if self.logits is not None and len(ids) == self.prompt and self.ids[: self.prompt] == ids:
            return len(ids)
        most = min(len(self.ids), len(ids) - 1)
        for start in range(0, most, CHUNK):
            here, there = self.ids[start : start + CHUNK], ids[start : start + CHUNK]
            if here != there:
                differ = (at for at, (a, b) in enumerate(zip(here, there, strict=False), start) if a != b)
                return min(next(differ, most), most) // grain * grain
        return most // grain * grain


class BatchDecoder:
    """Sequences written side by side with one model and one cache. Not safe for several threads at once."""

    def __init__(self, model: GPT, slots: int):
        self.model, self.compiled = model, CompiledStep.of(model)
        device = model.wte.weight.device
        cuda = device.type == "cuda"
        # without kernels each row goes alone on a CPU: torch's sums depend on how many there are
        self.row_counts = (slots,) if self.compiled else (1,) if device.type == "cpu" else row_counts(model)
        # one more slot for rows of padding in a CUDA graph
        self.cache = model.new_cache(slots + cuda, torch.float32 if self.compiled else None)
        self.graphs = record_graphs(model, self.cache, self.row_counts)
        # With kernels the same id behind the same ids has the same keys and values, however it was read.
        self.any_prefix = self.compiled is not None and self.compiled.longest >= min(CHUNK, model.config.block_size)
        self.grain = 1 if self.any_prefix else CHUNK
        self.prefix_cache = [PrefixCacheEntry() for _ in range(slots)]
        self.free_slots = list(range(slots))
        self.sequences: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Give each state of a sequence a slot, of which enough must be free: the one that holds most of its prompt."""
        for state in sequence.states:
            entries = {slot: self.prefix_cache[slot] for slot in self.free_slots}
            state.slot = max(
                entries, key=lambda slot: (entries[slot].reusable(state.pending, self.grain), -len(entries[slot].ids))
            )
            self.free_slots.remove(state.slot)
        sequence.history.largest = self.compiled.largest if self.compiled else None
        self.sequences.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out; its slots are free at once."""
        self.sequences.remove(sequence)
        self.free_slots += [state.slot for state in sequence.states]

    def step(self) -> list[tuple[Sequence, Event]]:
        """Prefill at most one chunk of one prompt, then write one token of every sequence that is not paused.

        Sequences that end are removed. A failure ends the sequence it belongs to, with an error event, and no other.
        """
        events: list[tuple[Sequence, Event]] = []
        active = [sequence for sequence in self.sequences if not sequence.paused]

        # 1. Shift: a sequence whose slot is full restarts with a shorter window, which is prefilled like a prompt.
        for sequence in active:
            if not sequence.prefilling and self.cache.length[sequence.slot] >= sequence.context:
                sequence.shift_context()

        # 2. Prefill. What decodes is settled before: a prompt that ends in this step already has its logits from here.
        decoding = [(sequence, state) for sequence in active if not sequence.prefilling for state in sequence.states]
        self._prefill_one_chunk([sequence for sequence in active if sequence.prefilling], events)

        # 3. Decode: one new token of every other sequence, in batches of the largest number of rows that is safe.
        largest = self.row_counts[-1]
        for first in range(0, len(decoding), largest):
            self._attempt(decoding[first : first + largest], self._decode, events)

        # 4. Sample from the logits; sequences that have ended leave.
        for sequence in active:
            if sequence.finish_reason is None and all(state.logits is not None for state in sequence.states):
                try:
                    events += [(sequence, event) for event in sequence.sample_next(sequence.take_logits())]
                except Exception as error:
                    events.append((sequence, sequence.fail(error)))
            if sequence.finish_reason is not None:
                self.remove(sequence)
        return events

    def _prefill_one_chunk(self, waiting: list[Sequence], events: list[tuple[Sequence, Event]]) -> None:
        """Prefill one chunk of the first pending sequence; windows found whole in the prefix cache become ready at once."""
        chunks = 1
        for sequence in waiting:
            if not sequence.states[0].prefix_reused and len(sequence.ids) == sequence.prompt_tokens:
                events.append((sequence, Event(sequence.index, "started")))
            if sequence.params.max_tokens == 0:
                events.append((sequence, sequence.finish("length")))
                continue
            for state in sequence.states:
                cached = self._is_cached(state)
                if state.prefilling and sequence.finish_reason is None and (chunks or cached):
                    chunks -= not cached
                    self._attempt([(sequence, state)], self._prefill, events)

    def _attempt(
        self,
        batch: list[tuple[Sequence, SequenceState]],
        act: Callable[[list[SequenceState]], None],
        events: list[tuple[Sequence, Event]],
    ) -> None:
        """`act` on the whole batch; if that fails, on each row alone, so that only sequences which fail alone end."""
        try:
            act([state for _, state in batch])
        except Exception as error:
            if len(batch) > 1:
                for row in batch:
                    self._attempt([row], act, events)
            elif batch[0][0].finish_reason is None:
                events.append((batch[0][0], batch[0][0].fail(error)))

    def _is_cached(self, state: SequenceState) -> bool:
        """Whether some slot holds all of a window, so that nothing needs to be computed."""
        return not state.prefix_reused and any(
            entry.reusable(state.pending, self.grain) == len(state.pending) for entry in self.prefix_cache
        )

    def _reuse_prefix(self, state: SequenceState) -> None:
        """Begin a window with the longest prefix that any slot holds of it, best the state's own slot."""
        reusable = [entry.reusable(state.pending, self.grain) for entry in self.prefix_cache]
        source = max(range(len(reusable)), key=lambda slot: (reusable[slot], slot == state.slot))
        count, entry = reusable[source], self.prefix_cache[source]
        if source != state.slot and count:
            self.cache.copy(source, state.slot, count)
        self.cache.length[state.slot] = count
        logits = entry.logits if count == entry.prompt else None
        self.prefix_cache[state.slot] = PrefixCacheEntry(entry.ids[:count], logits, count)
        state.prefix_reused, state.pending = True, state.pending[count:]

    def _prefill(self, states: list[SequenceState]) -> None:
        """Read the next chunk of one window; after its last chunk the state has logits."""
        (state,) = states
        if not state.prefix_reused:
            self._reuse_prefix(state)
        entry = self.prefix_cache[state.slot]
        if state.pending:
            chunk = state.pending[:CHUNK]
            entry.logits = None
            logits = self._read(chunk, state.slot)
            entry.ids = entry.ids + chunk
            state.pending = state.pending[CHUNK:]
            if state.pending:
                return
            entry.logits, entry.prompt = logits, len(entry.ids)
        state.prefilling, state.logits = False, entry.logits

    def _read(self, chunk: list[int], slot: int) -> np.ndarray:
        """Read a chunk of a prompt; the logits [N] after it."""
        if self.compiled is not None and len(chunk) <= self.compiled.longest:
            return self.compiled(self.cache, chunk, [slot] * len(chunk), last=1)[0].copy()
        return self.model.prefill(chunk, self.cache, slot).float().cpu().numpy()

    def _decode(self, states: list[SequenceState]) -> None:
        """Read the newest token of each state in one batch, padded to a safe number of rows; all get logits."""
        ids, slots = [state.pending[0] for state in states], [state.slot for state in states]
        if self.compiled is not None:
            logits = self.compiled(self.cache, ids, slots)
        else:
            rows = next(count for count in self.row_counts if count >= len(states))
            read = self.graphs or partial(self.model.decode, cache=self.cache)
            logits = read(ids, slots=slots, rows=rows).cpu().numpy()
        # The next call writes over these. It comes before they are used only where a batch is cut into pieces.
        logits = logits if self.compiled and len(states) > 1 else logits.copy()
        for state, row in zip(states, logits, strict=True):
            state.logits = row
            if self.any_prefix:
                self.prefix_cache[state.slot].ids.append(state.pending[0])
