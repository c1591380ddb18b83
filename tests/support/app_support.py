"""What the tests of the app share: a backend that writes given words, a text with everything that could go wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

from config import GenerationParams
from ui.backends import Alternative, BackendError, BackendLocation, BackendLost, Scored, Update, VisibleText

NASTY = "<script>alert(1)</script> $x$ *a* _b_ `c`\n# b\n\n1. “é” & ~d~"


class Scripted:
    """A backend that writes given words. `fail_after`: the connection breaks after so many words, `deaf` times."""

    def __init__(self, words: str = " one two three four", *, pause: float = 0.0, fail_after: int = -1, deaf: int = 0):
        self.place, self.name = BackendLocation("local", "scripted"), "scripted"
        self.styles: list[str] = []
        self.words = [f" {word}" for word in words.split(" ") if word]
        self.pause, self.fail_after, self.deaf = pause, fail_after, deaf
        self.requests: list[tuple[str, GenerationParams]] = []
        self.gate = threading.Event()
        self.gate.set()

    def write(self, prompt: str, params: GenerationParams) -> Any:
        if prompt == "refuse":
            raise BackendError("the queue is full: try again in 3 seconds")
        self.requests.append((prompt, params))
        return ScriptedStream(self, params)

    def score(self, text: str, top: int = 10) -> list[Scored]:
        words = text.split(" ")
        starts = [len(" ".join(words[:at])) for at in range(len(words))]
        return [
            Scored(
                word if at == 0 else f" {word}",
                start,
                None if at == 0 else 0.5 / at,
                None if at == 0 else at,
                (Alternative(" better", 0.6), Alternative(f" {word}", 0.5 / max(1, at))),
            )
            for at, (word, start) in enumerate(zip(words, starts, strict=True))
        ]

    def visible_text(self, text: str, params: GenerationParams) -> VisibleText:
        words = text.split(" ")
        start = len(text) - len(" ".join(words[-30:])) if len(words) > 30 else 0
        return VisibleText(len(words), 40, start)

    def alive(self) -> bool:
        self.deaf -= 1
        return self.deaf < 0

    def close(self) -> None:
        return


class ScriptedStream:
    def __init__(self, backend: Scripted, params: GenerationParams):
        self.backend, self.params, self.cancelled = backend, params, False

    def cancel(self) -> None:
        self.cancelled = True

    def __iter__(self) -> Iterator[Update]:
        backend, params = self.backend, self.params
        seed = 7 if params.seed is None else params.seed
        yield Update("started", seed=seed, prompt_tokens=3)
        for number, word in enumerate(backend.words[: params.max_tokens]):
            if number == backend.fail_after:
                backend.fail_after = -1
                raise BackendLost("gone")
            backend.gate.wait(10)
            time.sleep(backend.pause)
            if self.cancelled:
                break
            for index in range(params.n):
                yield Update("text", index, word if not index else f"{word}{index}", tokens=1)
        for index in range(params.n):
            yield Update("ended", index, reason="cancelled" if self.cancelled else "length")


def wait(condition: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
