"""What stands around the routes: the model's life, limits, keys, request ids, metrics, logs and the way out.

>>> service = Service(read_settings())
>>> run = await service.begin("The fog", params)     # ApiError: loading, queue full, bad prompt
>>> app.add_middleware(Gate, service=service)
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import secrets
import signal
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from config import ROOT
from server.errors import ApiError, bad_value
from server.settings import Settings
from server.streaming import LOG, Run, shutting_down, unexpected

if TYPE_CHECKING:
    from config import GenerationParams
    from evaluation.originality import Index
    from inference.engine import Engine, GenerationRequest

OPEN_PATHS = {"/", "/client.js", "/style.css", "/health", "/livez", "/readyz", "/ping", "/docs", "/redoc"}
OPEN_PATHS |= {"/openapi.json", "/docs/oauth2-redirect"}
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
REQUEST_ID = re.compile(r"[!-~]{1,128}")
BODY_S = 30.0  # seconds a client may take to send its body


class JsonLog(logging.Formatter):
    """One JSON object a line: time, level, event and the record's `fields`. Prompts and texts are never logged."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        row: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            row["traceback"] = self.formatException(record.exc_info)
        return json.dumps(row)


class HideQuery(logging.Filter):
    """Drops the query string, which may hold a key, from the lines uvicorn logs about a request."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(arg.split("?")[0] if isinstance(arg, str) else arg for arg in record.args)
        return True


def set_up_logs(level: str) -> None:
    """JSON lines on standard error for this server and for uvicorn."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLog())
    for name in ("api", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logging.getLogger("api").level))


class Metrics:
    """Counters and histograms in Prometheus' form; what the engine counts is read from it at each scrape."""

    def __init__(self, service: Service):
        self.service, self.registry = service, CollectorRegistry()
        labels = ("route", "method", "status")
        quick = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
        self.requests = Counter("vlg_requests", "Requests answered.", labels, registry=self.registry)
        self.seconds = Histogram(
            "vlg_request_seconds", "Time to the end of the answer.", ("route",), buckets=quick, registry=self.registry
        )
        self.first = Histogram(
            "vlg_first_token_seconds",
            "Time to a text's first token, waiting included.",
            buckets=quick,
            registry=self.registry,
        )
        self.speed = Histogram(
            "vlg_text_tokens_per_second",
            "Speed of one request's text after its first token.",
            buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000),
            registry=self.registry,
        )
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The engine's own numbers (called by the registry)."""
        engine = self.service.engine
        yield GaugeMetricFamily("vlg_ready", "1 when the model is loaded.", value=float(engine is not None))
        yield GaugeMetricFamily("vlg_streams", "Texts somebody waits for.", value=float(len(self.service.runs)))
        if engine is None:
            return
        stats = engine.stats()
        for key, text in (
            ("running", "Texts being written."),
            ("waiting", "Requests in the queue."),
            ("tokens_per_s", "Tokens written a second, all texts together."),
        ):
            yield GaugeMetricFamily(f"vlg_{key}", text, value=float(stats.get(key, 0)))
        for key, text in (
            ("rejected", "Requests refused because the queue was full."),
            ("finished", "Requests completed."),
            ("tokens", "Tokens written."),
        ):
            yield CounterMetricFamily(f"vlg_{key}", text, value=float(stats.get(key, 0)))

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def ended(self, run: Run) -> None:
        """Note how fast a run was."""
        if run.first_s is not None and run.tokens > 1:
            rest = time.monotonic() - run.begun - run.first_s
            if rest > 0:
                self.speed.observe((run.tokens - 1) / rest)


class Service:
    """The one model behind all routes: loading, ready, draining, gone."""

    def __init__(self, settings: Settings, engine: Engine | None = None):
        self.settings, self.engine = settings, engine
        self.owned = engine is None  # an engine that was handed in is closed by whoever made it
        self.failure: str | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.draining = False
        self.runs: set[Run] = set()
        self.scoring = 0  # texts being scored or waiting for it
        self.folder: Path | None = None  # of the model, once it is found
        self.defaults: dict[str, Any] = {}  # sampling settings that the folder recommends
        self.index: Index | None = None
        self.index_lock = threading.Lock()
        self.started = time.time()
        self.metrics = Metrics(self)

    @cached_property
    def parameters(self) -> int:
        """Numbers in the model, however they are packed for writing."""
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
        """ApiError 400 for a prompt that is longer than the server allows, or holds ids that the model has not."""
        limit, size = self.settings.max_prompt_chars, self.ready().tokenizer.vocab_size
        if len(prompt) > limit:
            unit = "characters" if isinstance(prompt, str) else "tokens"
            message = f"{param}: {len(prompt)} {unit}, this server allows {limit}"
            raise ApiError(400, message, param=param, code="prompt_too_long")
        if not isinstance(prompt, str) and max(prompt, default=0) >= size:
            message = f"{param}: the model has the token ids 0 to {size - 1}"
            raise ApiError(400, message, param=param, code="invalid_value")

    async def begin(
        self,
        prompt: str | list[int],
        params: GenerationParams,
        *,
        request_id: str | None = None,
        logprobs: int | None = None,
        param: str = "prompt",
    ) -> Run:
        """Hand a prompt to the engine. Whoever calls this owns the run and must close it.

        ApiError: 503 not ready, 429 queue full, 400 a prompt the model cannot read.
        """
        from inference.engine import EngineError, QueueFull
        from tokenizer import StyleError

        engine = self.ready()
        self.check_prompt(prompt, param)
        request_id = request_id or uuid.uuid4().hex
        if params.seed is None:  # 53 bits: what every JSON reader keeps exactly
            params = params.model_copy(update={"seed": secrets.randbits(53)})
        try:
            submit = partial(
                engine.submit,
                prompt,
                params,
                request_id=request_id,
                deadline_s=self.settings.deadline_s,
                logprobs=logprobs,
            )
            job = await in_thread(submit) if len(prompt) > 4096 else submit()
        except QueueFull as error:
            raise queue_full(error.retry_after) from None
        except EngineError:
            raise shutting_down() from None
        except StyleError as error:
            raise bad_value(str(error), "style", "unknown_style") from None
        except ValueError as error:
            raise ApiError(400, f"{param}: {error}", code="invalid_value", param=param) from None
        run = Run(job, params, request_id, on_first=self.metrics.first.observe, on_end=self._ended)
        self.runs.add(run)
        return run

    async def originality(self, text: str, min_tokens: int) -> dict[str, Any]:
        """The originality report of a text; ApiError 404 where there is no index, 400 for what it cannot check."""
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
                    remedy = "build one with python -m evaluation.originality --data FOLDER and start the server with --index FOLDER"
                    raise ApiError(404, f"this server has no originality index: {remedy}", code="no_index") from None
            return self.index

    def _ended(self, run: Run) -> None:
        self.runs.discard(run)
        self.metrics.ended(run)

    def load(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read the model, in a thread of its own; a failure is kept for whoever asks."""
        settings = self.settings
        begun = time.monotonic()
        try:
            from checkpoint import find_model
            from inference.engine import Engine
            from storage.gpt2_format import folder_defaults

            folder = self.folder = find_model(settings.model, ROOT)
            self.defaults = folder_defaults(folder)
            engine = Engine.load(
                folder,
                device=settings.device,
                dtype=settings.dtype,
                name=settings.name or folder_name(folder.resolve().parts),
                slots=settings.slots,
                queue_size=settings.queue_size,
                max_tokens_limit=settings.max_tokens,
                stall_s=settings.stall_s,
            )
        except Exception as error:
            self.failure = str(error)
            expected = isinstance(error, (OSError, ValueError, RuntimeError))
            LOG.error("load_failed", exc_info=not expected, extra={"fields": {"message": self.failure}})
            loop.call_soon_threadsafe(self.on_failure)
            return
        self.engine = engine
        LOG.info("ready", extra={"fields": {"model": engine.name, "seconds": round(time.monotonic() - begun, 2)}})

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        """Load in the background; on the way out end what still runs and close the engine."""
        for name in ("uvicorn.error", "uvicorn.access"):
            logging.getLogger(name).addFilter(HideQuery())
        if self.engine is None:
            loop = asyncio.get_running_loop()
            threading.Thread(target=self.load, args=(loop,), name="load", daemon=True).start()
        restore = self.catch_signals()
        try:
            yield
        finally:
            restore()
            self.draining = True
            await self.interrupt()
            if self.engine is not None and self.owned:
                await asyncio.to_thread(self.engine.close, 5.0, finish=False)

    def catch_signals(self) -> Callable[[], None]:
        """Let SIGTERM and SIGINT drain first, before the server's own handlers close the connections.

        uvicorn, alone and as gunicorn's worker, cuts WebSockets as soon as it hears a signal. A second signal goes
        straight through. Returns what undoes it.
        """
        if threading.current_thread() is not threading.main_thread():
            return lambda: None
        loop = asyncio.get_running_loop()
        previous: dict[int, Any] = {}
        tasks: set[asyncio.Task[None]] = set()

        def drain(number: int) -> None:
            tasks.add(loop.create_task(self.drain(lambda: previous[number](number, None))))

        def on_signal(number: int, frame: Any) -> None:
            if self.draining:
                previous[number](number, frame)
            else:
                self.draining = True
                loop.call_soon_threadsafe(drain, number)

        for number in (signal.SIGTERM, signal.SIGINT):
            handler = signal.getsignal(number)
            if callable(handler):
                previous[number] = handler
                signal.signal(number, on_signal)

        def restore() -> None:
            for number, handler in previous.items():
                with suppress(ValueError):
                    signal.signal(number, handler)

        return restore

    async def drain(self, then: Callable[[], None]) -> None:
        """New texts are refused from now on; running ones have `grace_s` to finish, then their readers are told."""
        LOG.info("draining", extra={"fields": {"streams": len(self.runs), "grace_s": self.settings.grace_s}})
        end = time.monotonic() + self.settings.grace_s
        while self.runs and time.monotonic() < end:
            await asyncio.sleep(0.05)
        await self.interrupt()
        await asyncio.sleep(0.05)  # the last lines leave before the connections close
        then()

    async def interrupt(self) -> None:
        """End every running text with an error its reader sees; waits until they are told, two seconds at most."""
        for run in list(self.runs):
            run.interrupt()
        end = time.monotonic() + 2.0
        while self.runs and time.monotonic() < end:
            await asyncio.sleep(0.02)

    def allows(self, headers: Headers, token: str | None = None) -> bool:
        """Whether a request carries one of the keys (or none is set); compared in constant time."""
        keys = [key.get_secret_value().encode() for key in self.settings.api_keys]
        if not keys:
            return True
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = (bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key") or token or "").encode()
        return any([secrets.compare_digest(given, key) for key in keys])

    def origin_allowed(self, headers: Headers) -> bool:
        """Whether a WebSocket may come from its page: the server's own, or one of `origins`; programs send none."""
        origin = headers.get("origin")
        if origin is None or origin in self.settings.origins:
            return True
        return origin.split("://", 1)[-1] == headers.get("host") and origin != "null"


async def in_thread(submit: Callable[[], GenerationRequest]) -> GenerationRequest:
    """Tokenizing a long prompt takes a while: not on the event loop. A caller that gives up leaves no job behind."""

    def abandon(done: asyncio.Future[GenerationRequest]) -> None:
        if done.exception() is None:
            done.result().cancel()

    task = asyncio.ensure_future(asyncio.to_thread(submit))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(abandon)
        raise


def queue_full(retry_after: float) -> ApiError:
    return ApiError(
        429,
        "the queue is full; try again later",
        code="queue_full",
        kind="rate_limit_error",
        retry_after=max(1, min(120, math.ceil(retry_after))),
    )


def folder_name(parts: tuple[str, ...]) -> str:
    """A model's name from its folder: `runs/NAME/best` is NAME."""
    plain = [part for part in parts if part not in ("best", "last", "/")]
    return plain[-1] if plain else "model"


class Gate:
    """ASGI middleware around every HTTP request: id, key, size of the body, log line, metrics, and no bare 500."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        begun, status = time.monotonic(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            try:
                if (
                    scope["path"] not in OPEN_PATHS
                    and scope["method"] != "OPTIONS"
                    and not self.service.allows(headers)
                ):
                    raise ApiError(
                        401, "a valid API key is needed", code="invalid_api_key", kind="authentication_error"
                    )
                inner = await self._body(headers, receive) if scope["method"] in ("POST", "PUT", "PATCH") else receive
                await self.app(scope, inner, answer)
            except ApiError as error:
                await answer_error(error, scope, receive, answer)
            except Exception:
                failure = unexpected("request", request_id)
                if not status:
                    await answer_error(failure, scope, receive, answer)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            seconds = time.monotonic() - begun
            method = scope["method"] if scope["method"] in METHODS else "other"
            self.service.metrics.requests.labels(route, method, str(status or 499)).inc()
            self.service.metrics.seconds.labels(route).observe(seconds)
            fields = {"request_id": request_id, "method": method, "route": route, "status": status or 499}
            fields["ms"] = round(seconds * 1000, 1)
            LOG.log(logging.DEBUG if route in OPEN_PATHS else logging.INFO, "request", extra={"fields": fields})

    async def _body(self, headers: Headers, receive: Receive) -> Receive:
        """The whole body, read within the limits; returns a `receive` that gives it again."""
        limit = self.service.settings.max_body_bytes
        length = headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > limit:
            raise too_large(limit)
        body = bytearray()
        more = True
        try:
            async with asyncio.timeout(BODY_S):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        break
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > limit:
                        raise too_large(limit)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_S:g} s", code="body_timeout") from None
        first: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}

        async def again() -> Message:
            nonlocal first
            if first is None:
                return await receive()
            message, first = first, None
            return message

        return again


def too_large(limit: int) -> ApiError:
    return ApiError(413, f"larger than {limit} bytes", code="too_large")


async def answer_error(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the error envelope; the rest of an unread body is not waited for."""
    headers = error.headers()
    if error.status in (408, 413):
        headers["Connection"] = "close"
    await JSONResponse(error.body(), error.status, headers=headers)(scope, receive, send)
