"""The routes: REST, OpenAI's completions, SageMaker's container contract, the WebSocket and the page.

>>> app = build(read_settings(model="runs/sample/best"))
curl localhost:8000/generate -H 'Content-Type: application/json' -d '{"prompt": "The fog", "max_tokens": 40}'
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from config import ROOT, GenerationParams, read_toml
from server import schemas
from server.errors import ApiError, bad_value, from_faults
from server.service import Gate, Service, queue_full
from server.settings import Settings
from server.streaming import (
    Completion,
    Echo,
    Run,
    Stream,
    collect,
    encoded,
    generate_reply,
    gone,
    json_line,
    messages,
    shutting_down,
    sse,
    usage,
)
from server.websocket import Socket

WEB = ROOT / "web"
SSE_TYPE = "text/event-stream"
LINES_TYPE = "application/jsonlines"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self' ws: wss:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
T = TypeVar("T")

_ERRORS: dict[int, str] = {
    400: "A value is missing, wrong or beyond the server's limits.",
    401: "No valid API key.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "The queue is full; Retry-After says when to come back.",
    503: "The model is loading, could not be loaded, or the server is shutting down.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` for these error statuses."""
    return {status: {"model": schemas.ErrorReply, "description": _ERRORS[status]} for status in statuses}


WRITING = errors(400, 401, 408, 413, 429, 503)


MESSAGE = {
    "type": "object",
    "properties": {"type": {"enum": ["started", "token", "complete", "error"]}, "request_id": {"type": "string"}},
    "required": ["type", "request_id"],
}

# the last event of a completion is the word [DONE], not JSON
TEXT_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}}


def event_of(data: dict[str, Any]) -> dict[str, Any]:
    """The schema of a server-sent event whose data is JSON of the schema `data`."""
    json_text = {"type": "string", "contentMediaType": "application/json", "contentSchema": data}
    return {"type": "object", "properties": {"data": json_text}}


def streaming(media_type: str, item: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """`WRITING`, and a 200 that may also be a stream of `item`s."""
    return {200: {"content": {media_type: {"itemSchema": item}}}, **WRITING}


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled as soon as the client hangs up."""
    task = asyncio.ensure_future(work)
    watch = asyncio.create_task(gone(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


def build(settings: Settings, engine: Any = None) -> FastAPI:
    """The ASGI application. Without an engine it loads the model of `settings` when it starts."""
    service = Service(settings, engine)
    app = FastAPI(
        title="Victorian Literature Generator",
        version=read_toml(ROOT / "pyproject.toml")["project"]["version"],
        description="Writes on from a prompt. Errors are `{error: {message, type, param, code}}` everywhere.",
        lifespan=service.lifespan,
    )
    app.state.service = service
    app.add_middleware(Gate, service=service)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-ID"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(ClientGone, on_gone)
    add_status(app, service)
    add_writing(app, service)
    add_openai(app, service)
    add_page(app)

    @app.websocket("/ws")
    async def websocket(websocket: WebSocket) -> None:
        await Socket(service, websocket).serve()

    app.openapi = lambda: schema(app, service)  # type: ignore[method-assign]
    return app


async def on_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = list(error.errors())
    if faults[0]["type"] == "json_invalid":
        answer = ApiError(400, "the body is not JSON", code="bad_json")
    elif faults[0]["loc"] == ("body",):
        answer = ApiError(400, "send a JSON object, with Content-Type: application/json", code="bad_json")
    else:
        answer = from_faults(faults, skip=1)
    return JSONResponse(answer.body(), answer.status)


async def on_http(request: Request, error: Exception) -> Response:
    """Unknown paths, wrong methods and unreadable bodies in the one envelope."""
    assert isinstance(error, HTTPException)
    code = {400: "bad_json", 404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    detail = "the body is not JSON" if error.status_code == 400 else str(error.detail)
    answer = ApiError(error.status_code, detail, code=code)
    return JSONResponse(answer.body(), answer.status, headers=error.headers)


async def on_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


def schema(app: FastAPI, service: Service) -> dict[str, Any]:
    """The OpenAPI document, with this server's limits in it and 400 where FastAPI says 422."""
    if app.openapi_schema:
        return app.openapi_schema
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    schemas = document["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    limits = service.settings
    for name in ("GenerateBody", "BatchBody", "CompletionBody", "ScoreBody", "OriginalityBody"):
        properties = schemas[name]["properties"]
        if name in ("GenerateBody", "BatchBody"):
            for field, value in service.defaults.items():
                properties[field]["default"] = value
        for field, limit in (("max_tokens", limits.max_tokens), ("max_length", limits.max_tokens), ("n", limits.max_n)):
            for part in bounded(properties.get(field, {})):
                part["maximum"] = min(part["maximum"], limit)
            if isinstance(properties.get(field, {}).get("default"), int):
                properties[field]["default"] = min(properties[field]["default"], limit)
        for field in ("prompt", "text", "prompts"):
            narrow(properties.get(field, {}), service)
        if service.engine is not None and "style" in properties:
            name_styles(properties["style"], list(service.engine.tokenizer.styles))
    if limits.api_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    if service.engine is not None:
        app.openapi_schema = document
    return document


def bounded(part: dict[str, Any]) -> list[dict[str, Any]]:
    """The number among a field's alternatives."""
    return [option for option in (part, *part.get("anyOf", ())) if "maximum" in option]


def name_styles(part: dict[str, Any], styles: list[str]) -> None:
    """Write the model's styles into the field's schema: as examples, since they can be blended; or that there is none."""
    if styles:
        part["examples"] = styles
        return
    for option in (part, *part.get("anyOf", ())):
        if option.get("type") == "string":
            option["enum"] = [""]


def narrow(part: dict[str, Any], service: Service) -> None:
    """Write the limits on prompts into a field's schema."""
    limits, engine = service.settings, service.engine
    for option in (part, *part.get("anyOf", ())):
        if option.get("type") == "string":
            option["maxLength"] = limits.max_prompt_chars
        elif option.get("type") == "integer" and engine is not None:
            option["maximum"] = engine.tokenizer.vocab_size - 1
        elif option.get("type") == "array":
            ids = option["items"].get("type") == "integer"
            option["maxItems"] = limits.max_prompt_chars if ids else limits.max_prompts
            narrow(option["items"], service)


def add_status(app: FastAPI, service: Service) -> None:
    """Whether the server is up and how it does."""

    def health() -> Response:
        engine = service.ready()
        stats = engine.stats()
        return JSONResponse(
            {
                "status": "ok",
                "model": service.name,
                "device": str(engine.model.wte.weight.device),
                "context": engine.context,
                "vocabulary": engine.tokenizer.vocab_size,
                "parameters": service.parameters,
                "styles": engine.styles,
                "running": stats.get("running", 0),
                "waiting": stats.get("waiting", 0),
                "uptime_s": round(time.time() - service.started, 1),
            }
        )

    async def ready() -> Response:
        """200 once the model is loaded, 503 before, and while the server shuts down."""
        return health()

    async def live() -> Response:
        """200 while the process answers at all."""
        return JSONResponse({"status": "ok"})

    async def ping() -> Response:
        """SageMaker's health check: 200 once the model is loaded."""
        service.ready()
        return JSONResponse({"status": "ok"})

    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    for path in ("/health", "/readyz"):
        app.add_api_route(path, ready, response_model=schemas.HealthReply, responses=errors(503), tags=["status"])
    app.add_api_route("/livez", live, response_model=schemas.StatusReply, tags=["status"])
    app.add_api_route("/ping", ping, response_model=schemas.StatusReply, responses=errors(503), tags=["status"])
    app.add_api_route("/metrics", metrics, response_class=PlainText, responses=errors(401), tags=["status"])


class PlainText(Response):
    media_type = "text/plain"


def add_writing(app: FastAPI, service: Service) -> None:
    """`/generate`, `/generate/batch`, `/invocations`, `/v1/score` and `/v1/originality`."""
    settings = service.settings

    async def write(
        request: Request, body: schemas.GenerateBody, media_type: str, form: Callable[[Any], bytes]
    ) -> Response:
        request_id = body.request_id or request.state.request_id
        run = await service.begin(body.prompt, body.params(settings, service.defaults), request_id=request_id)
        if body.stream:
            chunks = encoded(messages(run, settings.flush_ms / 1000), form)
            return Stream(chunks, [run], media_type, settings.stall_s)
        try:
            return JSONResponse(generate_reply(await unless_gone(request, collect(run)), service.name))
        finally:
            run.close()

    @app.post(
        "/generate",
        response_model=schemas.GenerateReply,
        responses=streaming(SSE_TYPE, event_of(MESSAGE)),
        tags=["write"],
    )
    async def generate(request: Request, body: schemas.GenerateBody) -> Response:
        """Write on from a prompt. With `stream`, server-sent events that hold the WebSocket's messages."""
        return await write(request, body, SSE_TYPE, sse)

    @app.post(
        "/invocations",
        response_model=schemas.GenerateReply,
        responses=streaming(LINES_TYPE, MESSAGE),
        tags=["write"],
    )
    async def invocations(request: Request, body: schemas.GenerateBody) -> Response:
        """SageMaker's entry: as `/generate`, but a stream is JSON lines."""
        return await write(request, body, LINES_TYPE, json_line)

    @app.post("/generate/batch", response_model=schemas.BatchReply, responses=WRITING, tags=["write"])
    async def batch(request: Request, body: schemas.BatchBody) -> Response:
        """Write on from several prompts at once, all with the same settings."""
        prompts: Sequence[str | list[int]] = body.prompts
        params = body.params(settings, service.defaults)
        runs = await begin_all(service, prompts, params, request.state.request_id, "prompts")
        try:
            await unless_gone(request, gathered(runs))
        finally:
            for run in runs:
                run.close()
        total = usage(sum(run.job.prompt_tokens for run in runs), sum(run.tokens for run in runs))
        results = [generate_reply(run, service.name) for run in runs]
        return JSONResponse({"results": results, "usage": total, "model": service.name})

    @app.post("/v1/score", response_model=schemas.ScoreReply, responses=WRITING, tags=["write"])
    async def score(request: Request, body: schemas.ScoreBody) -> Response:
        """How likely the model finds each token of a text, and what it would have written instead."""
        tokens = await score_text(service, body.text, body.top)
        logprob = math.fsum(token["logprob"] or 0.0 for token in tokens)
        return JSONResponse({"model": service.name, "tokens": tokens, "logprob": logprob})

    no_index: dict[int | str, dict[str, Any]] = {
        404: {"model": schemas.ErrorReply, "description": "No originality index."}
    }

    @app.post(
        "/v1/originality", response_model=schemas.OriginalityReply, responses={**WRITING, **no_index}, tags=["write"]
    )
    async def originality(body: schemas.OriginalityBody) -> Response:
        """What of a text stands word for word in the training text, and where."""
        return JSONResponse(await service.originality(body.text, body.min_tokens))


async def gathered(runs: Sequence[Run]) -> None:
    """All runs completed; the first failure ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            for run in runs:
                group.create_task(collect(run))
    except* ApiError as failures:
        raise failures.exceptions[0] from None


async def begin_all(
    service: Service,
    prompts: Sequence[str | list[int]],
    params: GenerationParams,
    request_id: str,
    param: str,
    logprobs: int | None = None,
) -> list[Run]:
    """A run for every prompt, or none: where one is refused the others are ended."""
    count_checked(service, prompts, param)
    runs: list[Run] = []
    try:
        for number, prompt in enumerate(prompts):
            own = request_id if len(prompts) == 1 else f"{request_id}-{number}"
            runs.append(await service.begin(prompt, params, request_id=own, logprobs=logprobs, param=param))
    except BaseException:
        for run in runs:
            run.close()
        raise
    return runs


def count_checked(service: Service, prompts: Sequence[str | list[int]], param: str) -> None:
    if len(prompts) > service.settings.max_prompts:
        limit = service.settings.max_prompts
        raise bad_value(f"{param}: this server allows {limit} at once", param, "limit_exceeded")


async def score_text(service: Service, text: str | list[int], top: int, param: str = "text") -> list[dict[str, Any]]:
    """Each token of a text with its log-probability, rank and likeliest alternatives."""
    from inference.engine import EngineError

    engine = service.ready()
    service.check_prompt(text, param)
    if service.scoring > service.settings.queue_size:
        raise queue_full(1.0)
    service.scoring += 1
    try:
        scores = await asyncio.to_thread(engine.score, text, top)
    except ValueError as error:
        raise bad_value(f"{param}: {error}", param) from None
    except EngineError:
        raise shutting_down() from None
    finally:
        service.scoring -= 1
    return [
        {
            "id": token.id,
            "text": token.text,
            "start": token.start,
            "logprob": token.logprob,
            "probability": None if token.logprob is None else math.exp(token.logprob),
            "rank": token.rank,
            "top": [
                {"id": other, "text": word, "logprob": value, "probability": math.exp(value)}
                for other, word, value in token.top
            ],
        }
        for token in scores
    ]


def add_openai(app: FastAPI, service: Service) -> None:
    """What OpenAI's client speaks: completions and models."""
    settings = service.settings

    def card() -> dict[str, Any]:
        engine = service.ready()
        created = int(service.started)
        return {
            "id": service.name,
            "object": "model",
            "created": created,
            "owned_by": "local",
            "max_model_len": engine.context,
            "styles": engine.styles,
        }

    @app.get("/v1/models", response_model=schemas.ModelList, responses=errors(401, 503), tags=["openai"])
    async def models() -> Response:
        """The one model this server writes with."""
        return JSONResponse({"object": "list", "data": [card()]})

    not_found: dict[int | str, dict[str, Any]] = {404: {"model": schemas.ErrorReply, "description": "No such model."}}

    @app.get(
        "/v1/models/{name}",
        response_model=schemas.ModelReply,
        responses={**errors(401, 503), **not_found},
        tags=["openai"],
    )
    async def model(name: str) -> Response:
        """One model by name."""
        found = card()
        known(name)
        return JSONResponse(found)

    def known(name: str | None) -> None:
        if name not in (None, service.name):
            raise ApiError(
                404,
                f"the model {name!r} does not exist; this server has {service.name!r}",
                code="model_not_found",
                param="model",
            )

    @app.post(
        "/v1/completions",
        response_model=schemas.CompletionReply,
        responses={**streaming(SSE_TYPE, TEXT_EVENT), **not_found},
        tags=["openai"],
    )
    async def completions(request: Request, body: schemas.CompletionBody) -> Response:
        """OpenAI's completions. With `stream`, server-sent events that end with `[DONE]`."""
        engine = service.ready()
        known(body.model)
        prompts, params = body.prompts(), body.params(settings)
        count_checked(service, prompts, "prompt")
        echoes = [Echo() for _ in prompts]
        if body.echo:
            work = [echo(service, prompt, body.logprobs) for prompt in prompts]
            echoes = list(await unless_gone(request, asyncio.gather(*work)))
        runs = await begin_all(service, prompts, params, request.state.request_id, "prompt", body.logprobs)
        id = f"cmpl-{uuid.uuid4().hex}"
        answer = Completion(id, service.name, runs, body.logprobs, echoes, engine.tokenizer.decode)
        if body.stream:
            include = bool(body.stream_options and body.stream_options.include_usage)
            return Stream(answer.chunks(include), runs, SSE_TYPE, settings.stall_s)
        try:
            await unless_gone(request, gathered(runs))
            return JSONResponse(answer.reply())
        finally:
            for run in runs:
                run.close()

    @app.post("/v1/chat/completions", include_in_schema=False)
    async def chat() -> Response:
        raise ApiError(
            404, "this model continues texts and holds no conversations: use /v1/completions", code="not_supported"
        )


async def echo(service: Service, prompt: str | list[int], logprobs: int | None) -> Echo:
    """What an answer with `echo` begins with."""
    tokenizer = service.ready().tokenizer
    text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
    if logprobs is None or not prompt:
        return Echo(text)
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in await score_text(service, prompt, logprobs, "prompt"):
        top = None
        if logprobs and token["logprob"] is not None:
            top = {token["text"]: token["logprob"], **{other["text"]: other["logprob"] for other in token["top"]}}
        for key, value in zip(found, (token["text"], token["logprob"], top, token["start"]), strict=True):
            found[key].append(value)
    return Echo(text, found)


def add_page(app: FastAPI) -> None:
    """The page at `/` and its two files."""

    def served(name: str) -> Callable[[], Awaitable[Response]]:
        async def page() -> Response:
            return FileResponse(
                WEB / name, headers={"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
            )

        return page

    for path, name in (("/", "index.html"), ("/client.js", "client.js"), ("/style.css", "style.css")):
        app.add_api_route(path, served(name), methods=["GET"], include_in_schema=False)
