"""Generation in the background: a thread reads the backend, pages show the text so far.

    >>> generation = BackgroundGeneration(backend, "The fog", GenerationParams(n=2))
    >>> generation.start(); generation.join()
    >>> [sample.text for sample in generation.samples]

No Streamlit in here: a page that reruns or a tab that is closed does not affect a generation.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from config import GenerationParams
from ui.backends import Backend, BackendError, BackendLost, UpdateStream

Status = Literal["running", "lost", "done", "stopped", "failed"]
GIVE_UP_S = 900.0  # how long to wait for a server whose connection broke
RETRY_S = 1.0  # before the first attempt to reach it again; doubled each time
MAX_RETRY_S = 8.0
SAVE_S = 1.5  # between two saves of a text in progress


@dataclass
class Sample:
    """One of the n texts of a generation."""

    text: str = ""
    tokens: int = 0
    reason: str = ""  # stop, length, cancelled, deadline; empty while it is being written
    resumed: bool = False  # written in more than one request, because the connection broke in between


def ignore(generation: BackgroundGeneration) -> None:
    return


class BackgroundGeneration:
    """n samples of one prompt. `on_progress` is called every `SAVE_S`, `on_end` exactly once, both in the generation's thread.

    When the connection breaks midway, the text so far is kept, and the generation continues from there once the server
    is back. A server that cannot be reached at first fails the generation at once.
    """

    def __init__(
        self,
        backend: Backend,
        prompt: str,
        params: GenerationParams,
        *,
        on_progress: Callable[[BackgroundGeneration], None] = ignore,
        on_end: Callable[[BackgroundGeneration], None] = ignore,
    ):
        self.backend, self.prompt, self.params = backend, prompt, params
        self.on_progress, self.on_end = on_progress, on_end
        self.samples = [Sample() for _ in range(params.n)]
        self.status: Status = "running"
        self.message = ""
        self.seed: int | None = params.seed
        self.prompt_tokens: int | None = None
        self.truncated = False
        self.begun = time.monotonic()
        self.first_s: float | None = None
        self.ended_s: float | None = None
        self._cancel = threading.Event()
        self._writing: UpdateStream | None = None
        self._lock = threading.Lock()
        self._noted = self.begun
        self.started = False
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)

    def start(self) -> BackgroundGeneration:
        self.started = True
        self.begun = time.monotonic()
        self._thread.start()
        return self

    def join(self, timeout: float | None = None) -> None:
        self._thread.join(timeout)

    @property
    def over(self) -> bool:
        """Whether it has ended and `on_end` has been called."""
        return self.status in ("done", "stopped", "failed")

    @property
    def tokens(self) -> int:
        return sum(sample.tokens for sample in self.samples)

    @property
    def seconds(self) -> float:
        if not self.started:
            return 0.0
        return self.ended_s if self.ended_s is not None else time.monotonic() - self.begun

    @property
    def tokens_per_s(self) -> float | None:
        """Speed after the first token, all samples together."""
        if self.first_s is None or self.tokens < 2 or self.seconds <= self.first_s:
            return None
        return (self.tokens - 1) / (self.seconds - self.first_s)

    def cancel(self) -> None:
        """Stop soon and keep the text so far; returns at once."""
        self._cancel.set()
        with self._lock:
            writing = self._writing
        if writing is not None:
            writing.cancel()

    def _run(self) -> None:
        status: Status = "failed"
        try:
            self._write()
            status = "stopped" if self._cancel.is_set() else "done"
        except BackendError as error:
            self.message = str(error)
        except Exception as error:
            self.message = f"{type(error).__name__}: {error}"
        self.ended_s = time.monotonic() - self.begun
        for sample in self.samples:
            sample.reason = sample.reason or ("cancelled" if status == "stopped" else "lost")
        try:
            self.on_end(self)
        finally:
            self.status = status

    def _write(self) -> None:
        try:
            self._request(self.params, list(range(len(self.samples))))
        except BackendLost as error:
            if self._cancel.is_set() or not self.tokens:
                raise
            self._reconnect(error)

    def _reconnect(self, lost: BackendLost) -> None:
        """Wait for the server and continue the unfinished samples from where they broke off.

        The pause between attempts doubles up to `MAX_RETRY_S`; every token that arrives restarts `GIVE_UP_S`.
        """
        since, written, pause = time.monotonic(), self.tokens, RETRY_S
        while not self._cancel.is_set():
            unfinished = [index for index, sample in enumerate(self.samples) if not sample.reason]
            if not unfinished:
                return
            if self.tokens > written:
                since, written, pause = time.monotonic(), self.tokens, RETRY_S
            elif time.monotonic() - since > GIVE_UP_S:
                raise lost
            self.status, self.message = "lost", str(lost)
            self.on_progress(self)
            if self._cancel.wait(pause):
                return
            pause = min(2 * pause, MAX_RETRY_S)
            if not self.backend.alive():
                continue
            for index in unfinished:
                try:
                    self._resume(index)
                except BackendLost as again:
                    lost = again
                    break
                if self._cancel.is_set():
                    return

    def _resume(self, index: int) -> None:
        sample = self.samples[index]
        left = self.params.max_tokens - sample.tokens
        if left <= 0:
            sample.reason = "length"
            return
        seed = None if self.params.seed is None else self.params.seed + sample.tokens
        sample.resumed = True
        self._request(self.params.model_copy(update={"n": 1, "max_tokens": left, "seed": seed}), [index])

    def _request(self, params: GenerationParams, indices: list[int]) -> None:
        """One request for the samples `indices`."""
        before = [self.samples[index].tokens for index in indices]
        prompt = self.prompt + (self.samples[indices[0]].text if len(indices) == 1 else "")
        writing = self.backend.write(prompt, params)
        with self._lock:
            self._writing = writing
        if self._cancel.is_set():
            writing.cancel()
        for update in writing:
            if self.status == "lost":
                self.status, self.message = "running", ""
            if update.kind == "started":
                if self.prompt_tokens is None:
                    self.prompt_tokens, self.truncated = update.prompt_tokens, update.truncated
                    self.seed = update.seed if update.seed is not None else self.seed
                continue
            sample = self.samples[indices[update.index]]
            if update.kind == "text":
                if self.first_s is None and update.text:
                    self.first_s = time.monotonic() - self.begun
                sample.text += update.text
                sample.tokens += update.tokens
            else:
                sample.reason = update.reason
                sample.tokens = before[update.index] + update.tokens if update.tokens else sample.tokens
            if time.monotonic() - self._noted > SAVE_S:
                self._noted = time.monotonic()
                self.on_progress(self)
