"""OpenAI's API as its clients use it: `/v1/completions` and `/v1/models`."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from server import schemas
from server.completions import Completion, prompt_part
from server.disconnect import cancelled_on_disconnect
from server.errors import ApiError, bad_value
from server.generation import finish_all
from server.limits import check_prompt_count
from server.openapi import TEXT_EVENT, errors, streaming
from server.service import Service
from server.streaming import SSE_TYPE, StreamResponse


def add_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", response_model=schemas.ModelList, responses=errors(401, 503), tags=["openai"])
    async def models() -> Response:
        """The one model of this server."""
        return JSONResponse({"object": "list", "data": [model_card(service)]})

    @app.get(
        "/v1/models/{name:path}", response_model=schemas.ModelReply, responses=errors(401, 503, 404), tags=["openai"]
    )
    async def model(name: str) -> Response:
        """One model by name, which may contain slashes."""
        card = model_card(service)
        if not name:
            return await models()
        check_model_name(service, name)
        return JSONResponse(card)

    @app.post(
        "/v1/completions",
        response_model=schemas.CompletionReply,
        responses={**streaming(SSE_TYPE, TEXT_EVENT), **errors(404)},
        tags=["openai"],
    )
    async def completions(request: Request, body: schemas.CompletionBody) -> Response:
        """OpenAI's completions. With `stream`, server-sent events that end with `[DONE]`."""
        return await complete(service, request, body)

    @app.post("/v1/chat/completions", include_in_schema=False)
    async def chat() -> Response:
        raise ApiError(
            404, "this model continues texts and holds no conversations: use /v1/completions", code="not_supported"
        )


def model_card(service: Service) -> dict[str, Any]:
    """OpenAI's model object, with the context length and the styles."""
    engine = service.ready()
    return {
        "id": service.name,
        "object": "model",
        "created": int(service.started),
        "owned_by": "local",
        "max_model_len": engine.context,
        "styles": engine.styles,
    }


def check_model_name(service: Service, name: str | None) -> None:
    """ApiError 404 for a model that this server does not have; None and the empty name are the one that it has."""
    if name and name != service.name:
        message = f"the model {name!r} does not exist; this server has {service.name!r}"
        raise ApiError(404, message, code="model_not_found", param="model")


async def complete(service: Service, request: Request, body: schemas.CompletionBody) -> Response:
    """Answer `/v1/completions`."""
    settings = service.settings
    engine = service.ready()
    check_model_name(service, body.model)
    prompts, params = body.prompts(), body.params(settings)
    n, logprobs = params.n, body.logprobs
    if body.best_of is not None and body.best_of > n:
        if body.best_of > settings.max_n:
            raise bad_value(f"best_of: this server allows at most {settings.max_n}", "best_of", "limit_exceeded")
        params = params.model_copy(update={"n": body.best_of})
        logprobs = logprobs or 0  # by which the best are chosen
    check_prompt_count(prompts, "prompt", settings.max_prompts)
    for prompt in prompts:
        service.check_prompt(prompt, "prompt")
    work = [prompt_part(service, prompt, bool(body.echo), body.logprobs) for prompt in prompts]
    parts = list(await cancelled_on_disconnect(request, asyncio.gather(*work)))
    generations = await service.start_all(prompts, params, request.state.request_id, "prompt", logprobs)
    id = f"cmpl-{uuid.uuid4().hex}"
    answer = Completion(id, service.name, generations, body.logprobs, parts, engine.tokenizer, n)
    if body.stream:
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        return StreamResponse(answer.events(include_usage), generations, SSE_TYPE, settings.stall_s)
    try:
        await cancelled_on_disconnect(request, finish_all(generations))
        return JSONResponse(answer.reply())
    finally:
        for generation in generations:
            generation.close()
