"""OpenAI's API as its clients use it: `/v1/completions` and `/v1/models`."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from server import schemas
from server.client_bodies import CompletionBody
from server.completions import Completion, prompt_part
from server.disconnect import cancelled_on_disconnect
from server.errors import ApiError, bad_value
from server.limits import check_prompt_count
from server.openapi import TEXT_EVENT, errors, streaming
from server.service import Service
from server.streaming import SSE_TYPE, StreamResponse, whole_answer


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
    async def completions(request: Request, body: CompletionBody) -> Response:
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


async def complete(service: Service, request: Request, body: CompletionBody) -> Response:
    """Answer `/v1/completions`."""
    settings = service.settings
    engine = service.ready()
    check_model_name(service, body.model)
    params = body.without_end(body.params(settings), engine.tokenizer.eot)
    n, logprobs = params.n, body.logprobs
    if body.best_of is not None and body.best_of > n:
        if body.best_of > settings.max_n:
            raise bad_value(f"best_of: this server allows at most {settings.max_n}", "best_of", "limit_exceeded")
        params = params.model_copy(update={"n": body.best_of})
        logprobs = logprobs or 0  # by which the best are chosen
    prompts, cut = await prompts_of(service, body)
    work = [prompt_part(service, prompt, bool(body.echo), body.logprobs) for prompt in prompts]
    parts = list(await cancelled_on_disconnect(request, asyncio.gather(*work)))
    generations = await service.start_all(prompts, params, request.state.request_id, "prompt", logprobs)
    cut = cut or any(generation.job.truncated for generation in generations)
    id = f"cmpl-{uuid.uuid4().hex}"
    answer = Completion(id, service.name, generations, body.logprobs, parts, engine.tokenizer, n, cut)
    if body.stream:
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        response: Response = StreamResponse(answer.events(include_usage), generations, SSE_TYPE, settings.stall_s)
    else:
        response = await whole_answer(request, generations, answer.reply)
    response.headers["X-Prompt-Truncated"] = "true" if cut else "false"
    return response


async def prompts_of(service: Service, body: CompletionBody) -> tuple[list[str | list[int]], bool]:
    """(the prompts, cut to `truncate_prompt_tokens`; whether one of them was cut)"""
    prompts, cut, limit = body.prompts(), False, body.truncate_prompt_tokens
    check_prompt_count(prompts, "prompt", service.settings.max_prompts)
    for number, prompt in enumerate(prompts):
        service.check_prompt(prompt, "prompt")
        if limit is not None:
            prompts[number], shorter = await service.newest(prompt, service.ready().context if limit < 0 else limit)
            cut |= shorter
    return prompts, cut
