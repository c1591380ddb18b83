"""OpenAI's completions: the answer to `/v1/completions`, whole or as server-sent events, with logprobs and echo.

>>> answer = Completion("cmpl-1", "model", generations, logprobs=None, prompts=[PromptPart("The fog", 7)], tokenizer=tokenizer, n=1)
>>> answer.reply()
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from server.errors import ApiError, unexpected
from server.generation import Generation, finish_all, total_usage
from server.logprobs import Logprobs, written_token
from server.service import Service
from server.streaming import sse

if TYPE_CHECKING:
    from inference.engine import Event
    from tokenizer import Tokenizer


@dataclass
class Completion:
    """One `/v1/completions` request: its generations (one a prompt) and the form of its answer."""

    id: str
    model: str
    generations: list[Generation]
    logprobs: int | None  # alternatives for each token; None: no logprobs
    prompts: list[PromptPart]
    tokenizer: Tokenizer
    n: int  # choices for each prompt, the best of its samples
    truncated: bool = False  # whether a prompt lost its beginning
    created: int = field(default_factory=lambda: int(time.time()))

    def envelope(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The object around a list of choices, in a whole answer as in each event of a stream."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "truncated": self.truncated,
            **more,
        }

    def reply(self) -> dict[str, Any]:
        """The whole answer, once all generations are complete."""
        return self.envelope(self.whole_choices(), usage=total_usage(self.generations))

    def whole_choices(self) -> list[dict[str, Any]]:
        """Every choice, once all generations are complete."""
        choices: list[dict[str, Any]] = []
        for generation, prompt in zip(self.generations, self.prompts, strict=True):
            for sample in best_samples(generation, self.n):
                written = self.logprobs_after(prompt)
                for event in generation.records[sample]:
                    self.add_event(written, event)
                logprobs = None if written is None else prompt.joined(written.take())
                text = prompt.echo + generation.text(sample)
                choices.append(choice(len(choices), text, openai_reason(generation.reasons[sample]), logprobs))
        return choices

    def logprobs_after(self, prompt: PromptPart) -> Logprobs | None:
        """The logprobs of a text after its prompt; None where none were requested."""
        return None if self.logprobs is None else Logprobs(self.tokenizer, self.logprobs, prompt.length)

    def add_event(self, logprobs: Logprobs | None, event: Event) -> bool:
        """Add the token of an event (the end of text, for a `done` with a log-probability); whether there is one."""
        if logprobs is None or event.logprob is None:
            return False
        logprobs.add(written_token(self.tokenizer, event), event.logprob, event.top)
        return True

    async def events(self, include_usage: bool) -> AsyncGenerator[bytes]:
        """The answer as server-sent events, ending with `[DONE]`; an error object where it fails midway."""
        extra: dict[str, Any] = {"usage": None} if include_usage else {}
        try:
            ranked = any(generation.params.n != self.n for generation in self.generations)
            async with aclosing(self.best_choices() if ranked else self.choices()) as choices:
                async for one in choices:
                    yield sse(self.envelope([one], **extra))
            if include_usage:
                yield sse(self.envelope([], usage=total_usage(self.generations)))
        except ApiError as error:
            yield sse(error.body())
        except Exception:
            yield sse(unexpected("stream", self.id).body())
        yield b"data: [DONE]\n\n"

    async def best_choices(self) -> AsyncGenerator[dict[str, Any]]:
        """The choices of a stream with `best_of`, which are known only when all samples are complete."""
        await finish_all(self.generations)
        for one in self.whole_choices():
            yield one

    async def choices(self) -> AsyncGenerator[dict[str, Any]]:
        """The parts of a stream: each choice's echo, then tokens as they are written, then each finish reason."""
        written: list[Logprobs | None] = []  # of each choice
        for generation, prompt in zip(self.generations, self.prompts, strict=True):
            for _ in range(generation.params.n):
                found = self.logprobs_after(prompt)
                if prompt.echo:
                    yield choice(len(written), prompt.echo, None, prompt.joined(found.take()) if found else None)
                written.append(found)
        async with aclosing(merged_events(self.generations)) as events:
            async for index, event in events:
                found = written[index]
                logprobs = found.take() if found and self.add_event(found, event) else None
                if event.text or logprobs:
                    yield choice(index, event.text, None, logprobs)
                if event.kind == "done":
                    yield choice(index, "", openai_reason(event.finish_reason), None)


@dataclass
class PromptPart:
    """A prompt as its answers need it: its text if it is echoed, its length, its tokens' log-probabilities."""

    echo: str
    length: int  # characters
    logprobs: dict[str, list[Any]] | None = None

    def joined(self, written: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The prompt's log-probabilities followed by those of what was written."""
        if self.logprobs is None:
            return written
        return {key: values + written[key] for key, values in self.logprobs.items()}


async def prompt_part(service: Service, prompt: str | list[int], echo: bool, logprobs: int | None) -> PromptPart:
    """The prompt, scored if it is echoed with logprobs."""
    tokenizer = service.ready().tokenizer
    text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
    if not echo or logprobs is None or not prompt:
        return PromptPart(text if echo else "", len(text))
    found = Logprobs(tokenizer, logprobs)
    for token in await service.score(prompt, logprobs, "prompt"):
        found.add(token.id, token.logprob, token.top)
    return PromptPart(text, len(text), found.take())


def best_samples(generation: Generation, n: int) -> list[int]:
    """The n samples with the highest mean log-probability of a token, the best first; all in order where n are all."""
    samples = list(range(generation.params.n))
    if n == len(samples):
        return samples

    def mean_logprob(sample: int) -> float:
        values = [event.logprob for event in generation.records[sample] if event.logprob is not None]
        return math.fsum(values) / len(values) if values else -math.inf

    return sorted(samples, key=mean_logprob, reverse=True)[:n]


def choice(index: int, text: str, reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def openai_reason(reason: str | None) -> str:
    """OpenAI has two finish reasons."""
    return "stop" if reason == "stop" else "length"


async def merged_events(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, Event]]:
    """(choice, event) of all generations as they come; choices are numbered prompt by prompt."""
    arrived: asyncio.Queue[tuple[int, Event] | BaseException | None] = asyncio.Queue(maxsize=64)

    async def forward(first: int, generation: Generation) -> None:
        try:
            async with aclosing(generation.events()) as events:
                async for event in events:
                    await arrived.put((first + event.index, event))
            await arrived.put(None)
        except Exception as error:
            await arrived.put(error)

    tasks = []
    first = 0
    for generation in generations:
        tasks.append(asyncio.create_task(forward(first, generation)))
        first += generation.params.n
    try:
        left = len(tasks)
        while left:
            item = await arrived.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
