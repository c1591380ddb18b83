"""OpenAI's completions: the answer to `/v1/completions`, whole or as server-sent events, with logprobs and echo.

>>> answer = Completion("cmpl-1", "model", generations, logprobs=None, echoes=[Echo()], decode=tokenizer.decode)
>>> answer.reply()
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from server.errors import ApiError, unexpected
from server.generation import Generation, total_usage
from server.service import Service
from server.streaming import sse

if TYPE_CHECKING:
    from inference.engine import Event


@dataclass
class Completion:
    """One `/v1/completions` request: its generations (one a prompt) and the form of its answer."""

    id: str
    model: str
    generations: list[Generation]
    logprobs: int | None
    echoes: list[Echo]
    decode: Callable[[Iterable[int]], str]
    created: int = field(default_factory=lambda: int(time.time()))

    def envelope(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The object around a list of choices, in a whole answer as in each event of a stream."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }

    def reply(self) -> dict[str, Any]:
        """The whole answer, once all generations are complete."""
        choices: list[dict[str, Any]] = []
        for generation, echo in zip(self.generations, self.echoes, strict=True):
            for sample in range(generation.params.n):
                logprobs = None
                if self.logprobs is not None:
                    logprobs = echo.joined(self.token_logprobs(generation.records[sample], len(echo.text)))
                text = echo.text + generation.text(sample)
                choices.append(choice(len(choices), text, openai_reason(generation.reasons[sample]), logprobs))
        return self.envelope(choices, usage=total_usage(self.generations))

    def token_logprobs(self, events: Sequence[Event], offset: int) -> dict[str, list[Any]]:
        """OpenAI's logprobs object for tokens written from `offset` characters on."""
        found = empty_logprobs()
        for event in events:
            assert event.token_id is not None
            text = self.decode([event.token_id])
            top = {text: event.logprob, **{word: value for _, word, value in event.top}} if self.logprobs else None
            for key, value in zip(found, (text, event.logprob, top, offset), strict=True):
                found[key].append(value)
            offset += len(event.text)
        return found

    async def events(self, include_usage: bool) -> AsyncGenerator[bytes]:
        """The answer as server-sent events, ending with `[DONE]`; an error object where it fails midway."""
        extra: dict[str, Any] = {"usage": None} if include_usage else {}
        try:
            async with aclosing(self.choices()) as choices:
                async for one in choices:
                    yield sse(self.envelope([one], **extra))
            if include_usage:
                yield sse(self.envelope([], usage=total_usage(self.generations)))
        except ApiError as error:
            yield sse(error.body())
        except Exception:
            yield sse(unexpected("stream", self.id).body())
        yield b"data: [DONE]\n\n"

    async def choices(self) -> AsyncGenerator[dict[str, Any]]:
        """The parts of a stream: each choice's echo, then tokens as they are written, then each finish reason."""
        offsets: list[int] = []  # characters of each choice so far
        for generation, echo in zip(self.generations, self.echoes, strict=True):
            for _ in range(generation.params.n):
                if echo.text:
                    logprobs = None if self.logprobs is None else echo.joined(self.token_logprobs([], 0))
                    yield choice(len(offsets), echo.text, None, logprobs)
                offsets.append(len(echo.text))
        async with aclosing(merged_events(self.generations)) as events:
            async for index, event in events:
                logprobs = None
                if event.kind == "token" and event.token_id is not None and self.logprobs is not None:
                    logprobs = self.token_logprobs([event], offsets[index])
                if event.text or logprobs:
                    offsets[index] += len(event.text)
                    yield choice(index, event.text, None, logprobs)
                if event.kind == "done":
                    yield choice(index, "", openai_reason(event.finish_reason), None)


@dataclass
class Echo:
    """What an answer begins with: nothing, or the prompt and its tokens' log-probabilities."""

    text: str = ""
    logprobs: dict[str, list[Any]] | None = None

    def joined(self, written: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The prompt's log-probabilities followed by those of what was written."""
        if self.logprobs is None:
            return written
        return {key: values + written[key] for key, values in self.logprobs.items()}


async def echo_of(service: Service, prompt: str | list[int], logprobs: int | None) -> Echo:
    """What an answer with `echo` begins with."""
    tokenizer = service.ready().tokenizer
    text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
    if logprobs is None or not prompt:
        return Echo(text)
    found = empty_logprobs()
    for token in await service.score(prompt, logprobs, "prompt"):
        top = None
        if logprobs and token.logprob is not None:
            top = {token.text: token.logprob, **{word: value for _, word, value in token.top}}
        for key, value in zip(found, (token.text, token.logprob, top, token.start), strict=True):
            found[key].append(value)
    return Echo(text, found)


def empty_logprobs() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


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
