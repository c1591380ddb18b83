"""OpenAI's API as its clients use it: `/v1/completions` and `/v1/models`."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from server import schemas
from server.completions import Completion, Echo, echo_of
from server.disconnect import cancelled_on_disconnect
from server.errors import ApiError
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

    @app.get("/v1/models/{name}", response_model=schemas.ModelReply, responses=errors(401, 503, 404), tags=["openai"])
    async def model(name: str) -> Response:
        """One model by name."""
        card = model_card(service)
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
    """ApiError 404 for a model that this server does not have; None is the one that it has."""
    if name not in (None, service.name):
        message = f"the model {name!r} does not exist; this server has {service.name!r}"
        raise ApiError(404, message, code="model_not_found", param="model")


async def complete(service: Service, request: Request, body: schemas.CompletionBody) -> Response:
    """Answer `/v1/completions`."""
    settings = service.settings
    engine = service.ready()
    check_model_name(service, body.model)
    prompts, params = body.prompts(), body.params(settings)
    check_prompt_count(prompts, "prompt", settings.max_prompts)
    echoes = [Echo() for _ in prompts]
    if body.echo:
        work = [echo_of(service, prompt, body.logprobs) for prompt in prompts]
        echoes = list(await cancelled_on_disconnect(request, asyncio.gather(*work)))
    generations = await service.start_all(prompts, params, request.state.request_id, "prompt", body.logprobs)
    id = f"cmpl-{uuid.uuid4().hex}"
    answer = Completion(id, service.name, generations, body.logprobs, echoes, engine.tokenizer.decode)
    if body.stream:
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        return StreamResponse(answer.events(include_usage), generations, SSE_TYPE, settings.stall_s)
    try:
        await cancelled_on_disconnect(request, finish_all(generations))
        return JSONResponse(answer.reply())
    finally:
        for generation in generations:
            generation.close()
