"""The one model behind all routes: starts generations, scores texts, checks originality.

>>> service = Service(read_settings())
>>> generation = await service.start("The fog", params)     # ApiError: loading, queue full, bad prompt
"""

from __future__ import annotations

import asyncio
import re
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server import limits
from server.errors import ApiError, bad_value, queue_full, shutting_down
from server.generation import Generation
from server.logs import LOG
from server.metrics import Metrics
from server.origins import AllowedOrigins
from server.settings import Settings

if TYPE_CHECKING:
    from config import GenerationParams
    from evaluation.originality import Index
    from inference.engine import Engine, GenerationRequest, TokenScore
    from tokenizer import Tokenizer

LONG_PROMPT = 4096  # characters (or ids) from which tokenizing is done in a thread


class Service:
    """The engine, its settings, and everything that uses it now. Loaded and closed by lifecycle.py."""

    def __init__(self, settings: Settings, engine: Engine | None = None):
        self.settings, self.engine = settings, engine
        self.origins = AllowedOrigins(settings.origins)
        self.owned = engine is None  # an engine that was passed in is closed by its creator
        self.failure: str | None = None  # why the model could not be loaded
        self.on_failure: Callable[[], None] = lambda: None
        self.draining = False  # shutting down: no new texts
        self.generations: set[Generation] = set()
        self.scoring = 0  # texts being scored or waiting for it
        self.folder: Path | None = None  # of the model, once it is found
        self.defaults: dict[str, Any] = {}  # sampling settings that the folder recommends
        self.index: Index | None = None
        self.index_lock = threading.Lock()
        self.started = time.time()
        self.metrics = Metrics(lambda: self.engine, lambda: len(self.generations))

    @cached_property
    def parameters(self) -> int:
        """Number of the model's parameters, as trained: quantized weights pack several into one number."""
        import torch

        from model import GPT

        with torch.device("meta"):
            return GPT(self.ready().model.config).num_parameters()

    @property
    def name(self) -> str:
        return self.settings.name or (self.engine.name if self.engine else "")

    def ready(self) -> Engine:
        """The engine; ApiError 503 while there is none to use."""
        if self.draining:
            raise shutting_down()
        if self.failure is not None:
            raise ApiError(
                503, f"the model could not be loaded: {self.failure}", code="load_failed", kind="unavailable_error"
            )
        if self.engine is None:
            raise ApiError(503, "the model is loading", code="loading", kind="unavailable_error", retry_after=5)
        return self.engine

    def check_prompt(self, prompt: str | list[int], param: str) -> None:
        """ApiError 400 for a prompt beyond this server's limits."""
        limits.check_prompt(prompt, param, self.settings.max_prompt_chars, self.ready().tokenizer.vocab_size)

    async def encode(self, text: str, param: str = "prompt", controls: bool = False) -> list[int]:
        """The ids of a text; ApiError 400 for one that is too long or has characters outside a small alphabet.

        controls: names like `<|endoftext|>` are read as their tokens.
        """
        self.check_prompt(text, param)
        tokenizer = self.ready().tokenizer
        encode = partial(with_controls, tokenizer) if controls else tokenizer.encode
        try:
            return await asyncio.to_thread(encode, text) if len(text) > LONG_PROMPT else encode(text)
        except ValueError as error:
            raise bad_value(f"{param}: {error}", param) from None

    async def newest(self, prompt: str | list[int], limit: int, keep: int = 0) -> tuple[str | list[int], bool]:
        """(the prompt, or its `limit` newest ids behind its `keep` first ones if it has more; whether it was cut)"""
        ids = await self.encode(prompt) if isinstance(prompt, str) else prompt
        if len(ids) <= limit:
            return prompt, False
        keep = min(keep, limit // 2)
        return [*ids[:keep], *ids[len(ids) - limit + keep :]], True

    async def start(
        self,
        prompt: str | list[int],
        params: GenerationParams,
        *,
        request_id: str | None = None,
        logprobs: int | None = None,
        post_sampling: bool = False,
        param: str = "prompt",
    ) -> Generation:
        """Submit a prompt to the engine. The caller owns the generation and must close it.

        param: the request's field that holds the prompt, for error messages. ApiError: 503 not ready, 429 queue full, 400
        a prompt the model cannot read.
        """
        from inference.engine import EngineError, QueueFull
        from tokenizer import StyleError

        engine = self.ready()
        self.check_prompt(prompt, param)
        request_id = request_id or uuid.uuid4().hex
        if params.seed is None:  # 53 bits: what every JSON reader keeps exactly
            params = params.model_copy(update={"seed": secrets.randbits(53)})
        submit = partial(
            engine.submit,
            prompt,
            params,
            request_id=request_id,
            deadline_s=self.settings.deadline_s,
            logprobs=logprobs,
            post_sampling=post_sampling,
        )
        try:
            job = await in_thread(submit) if len(prompt) > LONG_PROMPT else submit()
        except QueueFull as error:
            raise queue_full(error.retry_after) from None
        except EngineError:
            raise shutting_down() from None
        except StyleError as error:
            raise bad_value(str(error), "style", "unknown_style") from None
        except ValueError as error:
            raise ApiError(400, f"{param}: {error}", code="invalid_value", param=param) from None
        generation = Generation(
            job,
            params,
            request_id,
            on_first=self.metrics.first.observe,
            on_gap=self.metrics.gap.observe,
            on_end=self._on_generation_end,
        )
        self.generations.add(generation)
        return generation

    async def start_all(
        self,
        prompts: Sequence[str | list[int]],
        params: GenerationParams,
        request_id: str,
        param: str,
        logprobs: int | None = None,
    ) -> list[Generation]:
        """One generation per prompt; if one is refused, the others are cancelled."""
        limits.check_prompt_count(prompts, param, self.settings.max_prompts)
        generations: list[Generation] = []
        try:
            for number, prompt in enumerate(prompts):
                own = request_id if len(prompts) == 1 else f"{request_id}-{number}"
                generations.append(await self.start(prompt, params, request_id=own, logprobs=logprobs, param=param))
        except BaseException:
            for generation in generations:
                generation.close()
            raise
        return generations

    def _on_generation_end(self, generation: Generation) -> None:
        self.generations.discard(generation)
        self.metrics.count_generation(generation)

    async def score(self, text: str | list[int], top: int, param: str = "text") -> list[TokenScore]:
        """Each token of a text with its log-probability, rank and `top` most likely alternatives."""
        from inference.engine import EngineError

        engine = self.ready()
        self.check_prompt(text, param)
        if self.scoring > self.settings.queue_size:
            raise queue_full(1.0)
        self.scoring += 1
        try:
            return await asyncio.to_thread(engine.score, text, top)
        except ValueError as error:
            raise bad_value(f"{param}: {error}", param) from None
        except EngineError:
            raise shutting_down() from None
        finally:
            self.scoring -= 1

    async def originality(self, text: str, min_tokens: int) -> dict[str, Any]:
        """The originality report of a text; ApiError 404 where there is no index, 400 for a text it cannot check."""
        self.check_prompt(text, "text")
        if self.scoring > self.settings.queue_size:
            raise queue_full(1.0)
        self.scoring += 1
        try:
            index = await asyncio.to_thread(self.opened_index)
            return asdict(await asyncio.to_thread(index.check, text, min_tokens))
        except ValueError as error:
            param = "min_tokens" if str(error).startswith("min_tokens") else "text"
            raise bad_value(str(error) if param == "min_tokens" else f"text: {error}", param) from None
        finally:
            self.scoring -= 1

    def opened_index(self) -> Index:
        """The index of the training text, opened once. ApiError 404 where there is none that can be used."""
        from evaluation.originality import Index, data_of

        with self.index_lock:
            if self.index is None:
                data = self.settings.index or (data_of(self.folder) if self.folder else None)
                try:
                    if data is None:
                        raise OSError("no data folder is known")
                    self.index = Index.open(data)
                except (OSError, ValueError) as error:
                    LOG.warning("no_index", extra={"fields": {"message": str(error)}})
                    advice = "build one with `python -m evaluation.originality --data FOLDER` and start the server with --index FOLDER"
                    raise ApiError(404, f"this server has no originality index: {advice}", code="no_index") from None
            return self.index


def with_controls(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text in which the names of reserved tokens are those tokens, as other servers' tokenizers read it."""
    names = reserved_tokens(tokenizer)
    if not names:
        return tokenizer.encode(text)
    parts = re.split(f"({'|'.join(re.escape(name) for name in sorted(names, key=len, reverse=True))})", text)
    return [id for part in parts for id in ([names[part]] if part in names else tokenizer.encode(part))]


def reserved_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """End-of-text and the control tokens by name."""
    from tokenizer import END_OF_TEXT

    return tokenizer.controls | ({} if tokenizer.eot is None else {END_OF_TEXT: tokenizer.eot})


def reserved_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids, with the names of reserved tokens; `with_controls` reads it back."""
    names = {id: name.encode() for name, id in reserved_tokens(tokenizer).items()}
    return b"".join(names.get(id) or tokenizer.piece(id) for id in ids).decode("utf-8", "replace")


async def in_thread(submit: Callable[[], GenerationRequest]) -> GenerationRequest:
    """Run `submit` off the event loop: tokenizing a long prompt takes a while. A caller that gives up leaves no request."""

    def abandon(done: asyncio.Future[GenerationRequest]) -> None:
        if done.exception() is None:
            done.result().cancel()

    task = asyncio.ensure_future(asyncio.to_thread(submit))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(abandon)
        raise
