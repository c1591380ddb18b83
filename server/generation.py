"""One request's text while the engine writes it: its events, its samples so far, and how it ends.

>>> generation = await service.start("The fog", params)
>>> reply = generate_reply(await finish(generation), "model")
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from server.errors import ApiError, shutting_down
from server.logs import LOG

if TYPE_CHECKING:
    from config import GenerationParams
    from inference.engine import Event, GenerationRequest
    from tokenizer import Tokenizer


@dataclass(eq=False)
class Generation:
    """One prompt being continued: the engine's job and what it has written so far.

    on_first gets the seconds to the first token, on_gap those between two tokens of a sample.
    `close()` must be called when nobody wants the text any more; it calls `on_end` once.
    """

    job: GenerationRequest
    params: GenerationParams
    request_id: str
    on_first: Callable[[float], None] = lambda seconds: None
    on_gap: Callable[[float], None] = lambda seconds: None
    on_end: Callable[[Generation], None] = lambda generation: None
    begun: float = field(default_factory=time.monotonic)
    first_s: float | None = None
    tokens: int = 0
    interrupted: bool = False
    ended: bool = False

    def __post_init__(self) -> None:
        n = self.params.n
        self.pieces: list[list[str]] = [[] for _ in range(n)]
        self.counts = [0] * n
        self.newest = [0.0] * n  # when each sample's newest token came
        self.reasons: list[str | None] = [None] * n
        self.records: list[list[Event]] = [[] for _ in range(n)]

    async def events(self) -> AsyncGenerator[Event]:
        """The job's events, recorded as they pass; ApiError when the engine fails or the server stops."""
        async for event in self.job:
            if event.kind == "token":
                self._record(event)
            elif event.kind == "done":
                if self.interrupted and event.finish_reason == "cancelled":
                    break
                self.reasons[event.index] = event.finish_reason
                if event.logprob is not None:  # the end-of-text token, which has no text and is not counted
                    self.records[event.index].append(event)
            elif event.kind == "error":
                LOG.error("engine", extra={"fields": {"request_id": self.request_id, "message": event.message}})
                raise ApiError(500, "generation failed", code="engine_failed", kind="server_error")
            if event.text:
                self.pieces[event.index].append(event.text)
            yield event
        if self.interrupted and None in self.reasons:
            raise shutting_down()

    def _record(self, event: Event) -> None:
        now = time.monotonic()
        if self.first_s is None:
            self.first_s = now - self.begun
            self.on_first(self.first_s)
        elif self.newest[event.index]:
            self.on_gap(now - self.newest[event.index])
        self.newest[event.index] = now
        if event.token_id is not None:
            self.tokens += 1
            self.counts[event.index] += 1
            self.records[event.index].append(event)

    def text(self, index: int) -> str:
        """What sample `index` has written so far."""
        return "".join(self.pieces[index])

    def stop_string(self, index: int, tokenizer: Tokenizer) -> str:
        """The stop string that ended sample `index`, which is not part of its text; empty if none did."""
        if self.reasons[index] != "stop":
            return ""
        whole = tokenizer.decode(event.token_id for event in self.records[index] if event.token_id is not None)
        length = len(self.text(index))
        return max((stop for stop in self.params.stop if whole.startswith(stop, length)), key=len, default="")

    def usage(self) -> dict[str, int]:
        return usage(self.job.prompt_tokens, self.tokens)

    def interrupt(self) -> None:
        """Stop the generation because the server stops; the reader of its events gets `shutting_down`."""
        self.interrupted = True
        self.job.cancel()

    def close(self) -> None:
        """Free the engine's slots; idempotent."""
        if not self.ended:
            self.ended = True
            self.job.cancel()
            self.on_end(self)


def usage(prompt: int, completion: int) -> dict[str, int]:
    """OpenAI's usage object from two token counts."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def total_usage(generations: Sequence[Generation]) -> dict[str, int]:
    """The usage of several generations together."""
    return usage(sum(one.job.prompt_tokens for one in generations), sum(one.tokens for one in generations))


async def finish(generation: Generation) -> Generation:
    """The generation, once its text is complete."""
    async with aclosing(generation.events()) as events:
        async for _ in events:
            pass
    return generation


async def finish_all(generations: Sequence[Generation]) -> None:
    """Wait until all are complete; the first failure ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            for generation in generations:
                group.create_task(finish(generation))
    except* ApiError as failures:
        raise failures.exceptions[0] from None


def generate_reply(generation: Generation, model: str, before: str = "") -> dict[str, Any]:
    """The JSON of `/generate` for a complete generation. before: what its texts begin with, the prompt or nothing."""
    return {
        "generated_text": before + generation.text(0),
        "finish_reason": generation.reasons[0],
        "usage": generation.usage(),
        "seed": generation.job.seed,
        "samples": [
            {"index": index, "text": before + generation.text(index), "finish_reason": reason, "tokens": count}
            for index, (reason, count) in enumerate(zip(generation.reasons, generation.counts, strict=True))
        ],
        "request_id": generation.request_id,
        "model": model,
        "truncated": generation.job.truncated,
    }
