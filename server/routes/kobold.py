"""KoboldAI's API with KoboldCpp's additions, as Kobold Lite, mikupad and SillyTavern use it.

POST /api/v1/generate {"prompt": "The fog", "max_length": 40} -> {"results": [{"text": ..., "finish_reason": "length"}]}
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from server import schemas
from server.client_bodies import CountBody, DetokenizeBody, GenkeyBody, KoboldBody
from server.completions import openai_reason
from server.generation import Generation
from server.logprobs import token_entries, token_entry
from server.openapi import GENERATION_ERRORS, errors, streaming
from server.service import Service, reserved_text
from server.streaming import SSE_TYPE, StreamResponse, event_frames, json_bytes, whole_answer

UNITED = "1.2.5"  # the versions by which clients tell what a server can do: stop strings, streaming, memory, DRY, XTC
KOBOLDCPP = "1.100"
ABSENT = ("txt2img", "vision", "audio", "transcribe", "multiplayer", "websearch", "tts", "embeddings", "guidance")
REMEMBERED = 16  # complete texts whose probabilities can still be asked for

EVENT = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}}


class Texts:
    """The texts of this API by client and genkey: those being written and the last ones that are complete."""

    def __init__(self) -> None:
        self.texts: dict[tuple[str, str], Generation] = {}

    def add(self, request: Request, genkey: str | None, generation: Generation) -> None:
        complete = [key for key, text in self.texts.items() if text.ended]
        for key in complete[: max(0, len(complete) - REMEMBERED + 1)]:
            del self.texts[key]
        key = (address(request), genkey or generation.request_id)
        self.texts.pop(key, None)  # the newest is the last
        self.texts[key] = generation

    def find(self, request: Request, genkey: str | None) -> Generation | None:
        """The client's text of that genkey; without one its only text being written, or the newest complete one."""
        if genkey:
            return self.texts.get((address(request), genkey))
        own = [text for (client, _), text in self.texts.items() if client == address(request)]
        running = [text for text in own if not text.ended]
        if running:
            return running[0] if len(running) == 1 else None
        return own[-1] if own else None


def address(request: Request) -> str:
    return request.client.host if request.client else ""


def add_routes(app: FastAPI, service: Service) -> None:
    add_facts(app, service)
    texts = Texts()

    @app.post(
        "/api/v1/generate", response_model=schemas.KoboldReply, responses={**GENERATION_ERRORS}, tags=["koboldai"]
    )
    async def generate(request: Request, body: KoboldBody) -> Response:
        """Continue a prompt."""
        generation = await begin(service, texts, request, body, stream=False)
        return await whole_answer(request, [generation], lambda: reply(service, generation, body))

    @app.post("/api/extra/generate/stream", responses=streaming(SSE_TYPE, EVENT), tags=["koboldai"])
    async def stream(request: Request, body: KoboldBody) -> Response:
        """Continue a prompt as server-sent events named `message`: `{"token", "finish_reason"}`."""
        generation = await begin(service, texts, request, body, stream=True)
        return StreamResponse(events(service, generation, body), [generation], SSE_TYPE, service.settings.stall_s)

    @app.get("/api/extra/generate/check", include_in_schema=False)
    @app.post("/api/extra/generate/check", responses=errors(400, 401), tags=["koboldai"])
    async def check(request: Request, body: GenkeyBody | None = None) -> Response:
        """The text so far."""
        found = texts.find(request, body.genkey if body else None)
        return JSONResponse({"results": [{"text": found.text(0) if found else ""}]})

    @app.post("/api/extra/abort", responses=errors(400, 401), tags=["koboldai"])
    async def abort(request: Request, body: GenkeyBody | None = None) -> Response:
        """End a text where it is."""
        found = texts.find(request, body.genkey if body else None)
        running = found is not None and not found.ended
        if found is not None and running:
            found.job.cancel()
        return JSONResponse({"success": running})

    @app.post("/api/extra/last_logprobs", responses=errors(400, 401, 503), tags=["koboldai"])
    async def last_logprobs(request: Request, body: GenkeyBody | None = None) -> Response:
        """The probabilities of a text's tokens, if it was asked for with `logprobs`."""
        found = texts.find(request, body.genkey if body else None)
        return JSONResponse({"logprobs": logprobs_of(service, found, 0) if found else None})


def add_facts(app: FastAPI, service: Service) -> None:
    """What clients ask before they write: names, versions, lengths, tokens."""

    def fact(path: str, answer: Any) -> None:
        async def route() -> Response:
            return JSONResponse(answer())

        app.add_api_route(path, route, responses=errors(401, 503), tags=["koboldai"])

    def context() -> dict[str, Any]:
        return {"value": service.ready().context}

    fact("/api/v1/model", lambda: {"result": service.ready() and service.name})
    fact("/api/v1/info/version", lambda: {"result": UNITED})
    fact(
        "/api/v1/config/max_length",
        lambda: {"value": KoboldBody().params(service.settings, service.defaults).max_tokens},
    )
    fact("/api/v1/config/max_context_length", context)
    fact("/api/extra/true_max_context_length", context)
    fact("/api/extra/version", lambda: version(service))
    fact("/api/extra/perf", lambda: performance(service))

    @app.post("/api/extra/tokenize", include_in_schema=False)
    @app.post("/api/extra/tokencount", responses=GENERATION_ERRORS, tags=["koboldai"])
    async def tokencount(body: CountBody) -> Response:
        """Number and ids of a text's tokens; with `special`, which is the default, behind the token that begins a text."""
        ids = await service.encode(body.prompt)
        eot = service.ready().tokenizer.eot
        if eot is not None and (body.model_extra or {}).get("special", True):
            ids = [eot, *ids]
        return JSONResponse({"value": len(ids), "ids": ids})

    @app.post("/api/extra/detokenize", responses=GENERATION_ERRORS, tags=["koboldai"])
    async def detokenize(body: DetokenizeBody) -> Response:
        """The text of token ids."""
        service.check_prompt(body.tokens, "ids")
        return JSONResponse({"result": reserved_text(service.ready().tokenizer, body.tokens), "success": True})


def version(service: Service) -> dict[str, Any]:
    """What this server can do, in KoboldCpp's terms."""
    protected = bool(service.settings.api_keys)
    return {"result": "KoboldCpp", "version": KOBOLDCPP, "protected": protected, **dict.fromkeys(ABSENT, False)}


def performance(service: Service) -> dict[str, Any]:
    """The load of this server, in KoboldCpp's terms."""
    stats = service.ready().stats()
    uptime = int(time.time() - service.started)
    return {"queue": stats["waiting"], "idle": int(not stats["running"]), "uptime": uptime, "slots": stats["slots"]}


async def begin(service: Service, texts: Texts, request: Request, body: KoboldBody, *, stream: bool) -> Generation:
    """Submit the memory and the prompt; a stream is always one text."""
    engine = service.ready()
    params = body.without_end(body.params(service.settings, service.defaults), engine.tokenizer.eot)
    prompt: str | list[int] = body.prompt
    if body.memory:
        prompt = body.memory + body.prompt
        params = params.model_copy(update={"keep": len(await service.encode(body.memory, "memory"))})
    if body.max_context_length is not None and body.max_context_length < engine.context:
        prompt, _ = await service.newest(prompt, max(1, body.max_context_length - params.max_tokens), params.keep)
    if stream:
        params = params.model_copy(update={"n": 1})
    generation = await service.start(prompt, params, request_id=request.state.request_id, logprobs=body.alternatives)
    texts.add(request, body.genkey, generation)
    return generation


def logprobs_of(service: Service, generation: Generation, sample: int) -> dict[str, Any] | None:
    """The probabilities of a sample's tokens; None where they were not asked for."""
    if generation.job.logprobs is None:
        return None
    tokenizer = service.ready().tokenizer
    return {"content": token_entries(tokenizer, generation.records[sample], generation.text(sample))}


def ending(service: Service, generation: Generation, body: KoboldBody, sample: int) -> str:
    """The stop string, where the client wants to see it."""
    return "" if body.trim_stop is not False else generation.stop_string(sample, service.ready().tokenizer)


def reply(service: Service, generation: Generation, body: KoboldBody) -> dict[str, Any]:
    """The answer of `/api/v1/generate`."""
    results = [
        {
            "text": generation.text(sample) + ending(service, generation, body, sample),
            "finish_reason": openai_reason(reason),
            "logprobs": logprobs_of(service, generation, sample),
            "prompt_tokens": generation.job.prompt_tokens,
            "completion_tokens": generation.counts[sample],
        }
        for sample, reason in enumerate(generation.reasons)
    ]
    return {"results": results}


def events(service: Service, generation: Generation, body: KoboldBody) -> Any:
    """The server-sent events of a text; one that fails midway ends with an event named `error`."""
    tokenizer = service.ready().tokenizer

    def frames(event: Any) -> Iterator[bytes]:
        done = event.kind == "done"
        entry = {} if event.logprob is None else token_entry(tokenizer, event, event.text)
        text = event.text + (ending(service, generation, body, 0) if done else "")
        if text or entry or done:
            yield named_event(
                "message",
                {**entry, "token": text, "finish_reason": openai_reason(event.finish_reason) if done else None},
            )

    return event_frames(generation, frames, lambda error: named_event("error", error.body()))


def named_event(name: str, data: Any) -> bytes:
    """One server-sent event with a name, which comes first as Kobold Lite expects it."""
    return b"event: " + name.encode() + b"\ndata: " + json_bytes(data) + b"\n\n"
