"""This server's own API: `/generate`, `/generate/batch`, SageMaker's `/invocations`, `/v1/score` and `/v1/originality`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from server import schemas
from server.description import described
from server.generation import generate_reply, total_usage
from server.openapi import GENERATION_ERRORS, MESSAGE, Responses, errors, event_of, streaming
from server.service import Service
from server.streaming import LINES_TYPE, SSE_TYPE, StreamResponse, framed, json_line, messages, sse, whole_answer

if TYPE_CHECKING:
    from inference.engine import TokenScore


def add_routes(app: FastAPI, service: Service) -> None:
    @app.post(
        "/generate",
        response_model=schemas.GenerateReply,
        responses=streaming(SSE_TYPE, event_of(MESSAGE)),
        tags=["write"],
    )
    async def generate(request: Request, body: schemas.GenerateBody) -> Response:
        """Continue a prompt. With `stream`, server-sent events that hold the WebSocket's messages."""
        return await answer(service, request, body, SSE_TYPE, sse)

    @app.post(
        "/invocations",
        response_model=schemas.GenerateReply | schemas.SettingsReply,
        responses=streaming(LINES_TYPE, MESSAGE),
        tags=["write"],
    )
    async def invocations(request: Request, body: schemas.InvocationBody) -> Response:
        """SageMaker's entry: as `/generate`, but a stream is JSON lines; or, by its `action`, as `/settings`."""
        if body.action == "settings":
            service.check_prompt(body.prompt, "prompt")  # nothing is written, but what is out of bounds is an error
            body.params(service.settings, service.defaults)
            return JSONResponse(described(service))
        return await answer(service, request, body, LINES_TYPE, json_line)

    @app.get("/settings", response_model=schemas.SettingsReply, responses=errors(401, 503), tags=["write"])
    async def settings() -> Response:
        """The model, and the schema of each sampling setting with the model's own defaults."""
        return JSONResponse(described(service))

    @app.post("/generate/batch", response_model=schemas.BatchReply, responses=GENERATION_ERRORS, tags=["write"])
    async def batch(request: Request, body: schemas.BatchBody) -> Response:
        """Continue several prompts at once, all with the same settings."""
        return await answer_batch(service, request, body)

    @app.post("/v1/score", response_model=schemas.ScoreReply, responses=GENERATION_ERRORS, tags=["write"])
    async def score(request: Request, body: schemas.ScoreBody) -> Response:
        """How likely the model finds each token of a text, and what it would have written instead."""
        tokens = [token_score(token) for token in await service.score(body.text, body.top)]
        logprob = math.fsum(token["logprob"] or 0.0 for token in tokens)
        return JSONResponse({"model": service.name, "tokens": tokens, "logprob": logprob})

    no_index: Responses = {404: {"model": schemas.ErrorReply, "description": "No originality index."}}

    @app.post(
        "/v1/originality",
        response_model=schemas.OriginalityReply,
        responses={**GENERATION_ERRORS, **no_index},
        tags=["write"],
    )
    async def originality(body: schemas.OriginalityBody) -> Response:
        """Which passages of a text occur word for word in the training text, and where."""
        return JSONResponse(await service.originality(body.text, body.min_tokens))


async def answer(
    service: Service, request: Request, body: schemas.GenerateBody, media_type: str, frame: Callable[[Any], bytes]
) -> Response:
    """The text of one prompt: whole as JSON, or streamed in `frame`s of `media_type`."""
    settings = service.settings
    request_id = body.request_id or request.state.request_id
    generation = await service.start(body.prompt, body.params(settings, service.defaults), request_id=request_id)
    before = body.prompt if body.return_full_text else ""
    if body.stream:
        chunks = framed(messages(generation, settings.flush_ms / 1000, before), frame)
        return StreamResponse(chunks, [generation], media_type, settings.stall_s)
    return await whole_answer(request, [generation], lambda: generate_reply(generation, service.name, before))


async def answer_batch(service: Service, request: Request, body: schemas.BatchBody) -> Response:
    """The texts of several prompts."""
    prompts: Sequence[str | list[int]] = body.prompts
    params = body.params(service.settings, service.defaults)
    generations = await service.start_all(prompts, params, request.state.request_id, "prompts")

    def reply() -> dict[str, Any]:
        before = body.prompts if body.return_full_text else [""] * len(body.prompts)
        results = [
            generate_reply(generation, service.name, text) for generation, text in zip(generations, before, strict=True)
        ]
        return {"results": results, "usage": total_usage(generations), "model": service.name}

    return await whole_answer(request, generations, reply)


def token_score(token: TokenScore) -> dict[str, Any]:
    """A scored token as `/v1/score` answers it."""
    return {
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
