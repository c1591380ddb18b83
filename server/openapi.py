"""The OpenAPI document: what FastAPI derives from the routes, with this server's limits and the model's styles in it."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from server import schemas
from server.service import Service

Schema = dict[str, Any]
Responses = dict[int | str, dict[str, Any]]

ERRORS: dict[int, str] = {
    400: "A value is missing, wrong or beyond the server's limits.",
    401: "No valid API key.",
    404: "No such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "The queue is full; Retry-After gives the seconds to wait.",
    503: "The model is loading, could not be loaded, or the server is shutting down.",
}
BODIES = (
    *("GenerateBody", "InvocationBody", "BatchBody", "CompletionBody", "KoboldBody", "LlamaBody"),
    *("ScoreBody", "OriginalityBody", "TokenizeBody", "DetokenizeBody", "CountBody"),
)
LENGTHS = ("max_tokens", "max_length", "n_predict")  # names of the number of new tokens

MESSAGE: Schema = {
    "type": "object",
    "properties": {"type": {"enum": ["started", "token", "complete", "error"]}, "request_id": {"type": "string"}},
    "required": ["type", "request_id"],
}

# the last event of a completion is the word [DONE], not JSON
TEXT_EVENT: Schema = {"type": "object", "properties": {"data": {"type": "string"}}}


def errors(*statuses: int) -> Responses:
    """OpenAPI's `responses` for these error statuses."""
    return {status: {"model": schemas.ErrorReply, "description": ERRORS[status]} for status in statuses}


GENERATION_ERRORS = errors(400, 401, 408, 413, 429, 503)


def event_of(data: Schema) -> Schema:
    """The schema of a server-sent event whose data is JSON of the schema `data`."""
    json_text = {"type": "string", "contentMediaType": "application/json", "contentSchema": data}
    return {"type": "object", "properties": {"data": json_text}}


def streaming(media_type: str, item: Schema) -> Responses:
    """`GENERATION_ERRORS`, and a 200 that may also be a stream of `item`s."""
    return {200: {"content": {media_type: {"itemSchema": item}}}, **GENERATION_ERRORS}


def openapi_document(app: FastAPI, service: Service) -> Schema:
    """The OpenAPI document, with this server's limits in it and 400 in place of FastAPI's 422."""
    if app.openapi_schema:
        return app.openapi_schema
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    components = document["components"]
    for unused in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(unused, None)
    for name in BODIES:
        properties = components["schemas"][name]["properties"]
        if name in ("GenerateBody", "InvocationBody", "BatchBody"):
            write_defaults(properties, service)
        write_limits(properties, service)
    if service.settings.api_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    if service.engine is not None:
        app.openapi_schema = document
    return document


def write_defaults(properties: Schema, service: Service) -> None:
    """Write what the model's folder recommends into the fields of a request body."""
    for field, value in service.defaults.items():
        properties[field]["default"] = value


def write_limits(properties: Schema, service: Service) -> None:
    """Write this server's limits and the model's styles into the fields of a request body."""
    limits = service.settings
    tokens, n = limits.max_tokens, limits.max_n
    for field, limit in (*((name, tokens) for name in LENGTHS), ("n", n), ("n_cmpl", n), ("best_of", n)):
        for part in bounded(properties.get(field, {})):
            part["maximum"] = min(part["maximum"], limit)
        if isinstance(properties.get(field, {}).get("default"), int):
            properties[field]["default"] = min(properties[field]["default"], limit)
    for field in ("prompt", "text", "prompts", "content", "memory", "tokens"):
        write_prompt_limits(properties.get(field, {}), service)
    if service.engine is not None and "style" in properties:
        write_styles(properties["style"], list(service.engine.tokenizer.styles))


def bounded(part: Schema) -> list[Schema]:
    """The number among a field's alternatives."""
    return [option for option in (part, *part.get("anyOf", ())) if "maximum" in option]


def write_styles(part: Schema, styles: list[str]) -> None:
    """Write the model's styles into the field's schema: as examples, since they can be blended; or that there is none."""
    if styles:
        part["examples"] = styles
        return
    for option in (part, *part.get("anyOf", ())):
        if option.get("type") == "string":
            option["enum"] = [""]


def write_prompt_limits(part: Schema, service: Service) -> None:
    """Write the limits on prompts into a field's schema."""
    limits, engine = service.settings, service.engine
    for option in (part, *part.get("anyOf", ())):
        if option.get("type") == "string":
            option["maxLength"] = limits.max_prompt_chars
        elif option.get("type") == "integer" and engine is not None:
            option["maximum"] = engine.tokenizer.vocab_size - 1
        elif option.get("type") == "array":
            ids = option["items"].get("type") == "integer"
            most = limits.max_prompt_chars if ids else limits.max_prompts
            option["maxItems"] = min(option.get("maxItems", most), most)
            write_prompt_limits(option["items"], service)
