"""The relay's limits, and request validation without pydantic, which a Lambda function does not have.

from limits import parse, settings, validate
validate(parse('{"prompt": "It was", "top_k": 40}'), max_tokens=1000, max_samples=4, max_prompt_bytes=24_000)

The bounds of the sampling settings are data: the JSON schema of `config.GenerationParams`, which `deploy_relay.py`
writes into the package as limits.json and `local_stack.py` passes in LIMITS_JSON.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

Message = dict[str, Any]
# Fallbacks for the environment variables of the same names; the defaults in template.yaml are the same numbers.
MAX_TOKENS = 2000  # new tokens of one request
MAX_SAMPLES = 4  # samples of one prompt
MAX_PROMPT_BYTES = 24_000  # largest prompt, in UTF-8
MAX_ACTIVE = 4  # generations that run at once on one connection
FLUSH_MS = 0  # milliseconds of tokens sent as one message; 0: one message per token
STOP_POLL_MS = 250  # interval at which the worker looks for a stop request
MAX_STYLES = 500  # names of styles in the description of the settings: a message has 128 KB at most
SILENCE_S = 60  # seconds without a message after which the endpoint counts as stalled

NUMBERS = ("integer", "number")
BOUNDS = (  # JSON Schema's keyword, its wording in errors, and the test of a value
    ("minimum", "at least", lambda value, bound: value >= bound),
    ("exclusiveMinimum", "above", lambda value, bound: value > bound),
    ("maximum", "at most", lambda value, bound: value <= bound),
    ("exclusiveMaximum", "below", lambda value, bound: value < bound),
)


class InvalidRequest(Exception):
    """An error that is sent to the client; never contains the prompt."""

    def __init__(
        self,
        message: str,
        *,
        code: str = "invalid_value",
        param: str | None = None,
        type: str = "invalid_request_error",
    ):
        super().__init__(message)
        self.error = {"message": message, "type": type, "param": param, "code": code}


@functools.cache
def settings() -> dict[str, Message]:
    """JSON schema of each sampling setting, by name."""
    given = os.environ.get("LIMITS_JSON") or Path(__file__).with_name("limits.json").read_text(encoding="utf-8")
    found: dict[str, Message] = json.loads(given)
    return found


def described(own: Message | None, max_tokens: int, max_samples: int) -> Message:
    """The model and the settings of this gateway, for clients that display them.

    own: what the container says of itself; None: `model` is null, and the defaults are general ones, not the model's.
    """
    general, asked = settings(), (own or {}).get("settings") or {}
    found = {name: {**schema, **asked.get(name, {})} for name, schema in general.items() if name in asked or not own}
    for name, most in (("max_tokens", max_tokens), ("n", max_samples)):
        highest = min(most, found[name]["maximum"])
        found[name] |= {"maximum": highest, "default": min(found[name]["default"], highest)}
    found["max_tokens"]["default"] = min(general["max_tokens"]["default"], max_tokens)  # which `validate` adds
    if "examples" in found["style"]:
        found["style"]["examples"] = found["style"]["examples"][:MAX_STYLES]
    return {**{name: (own or {}).get(name) for name in ("model", "context")}, "settings": found}


def parse(body: str | None) -> Message:
    """A client's message as an object; raises InvalidRequest."""

    def constant(word: str) -> float:
        raise ValueError(word)

    try:
        message = json.loads(body or "", parse_constant=constant)
    except (ValueError, RecursionError):
        raise InvalidRequest(
            'the message is not JSON: send an object like {"action": "generate"}', code="bad_json"
        ) from None
    if not isinstance(message, dict):
        raise InvalidRequest("the message must be a JSON object", code="bad_json")
    return message


def identity(message: Message) -> str:
    """The message's request_id; raises InvalidRequest when it is missing or not 1 to 128 plain characters."""
    request_id = message.get("request_id")
    if not isinstance(request_id, str) or not re.fullmatch(r"[!-~]{1,128}", request_id):
        raise InvalidRequest(
            "request_id must be 1 to 128 printable ASCII characters without spaces", param="request_id"
        )
    return request_id


def validate(message: Message, max_tokens: int, max_samples: int, max_prompt_bytes: int) -> Message:
    """The prompt and parameters of a `generate` message, checked; raises InvalidRequest naming field, value and bounds."""
    prompt = message.get("prompt")
    if not isinstance(prompt, str):
        raise InvalidRequest("prompt is missing: send a string", param="prompt")
    try:
        size = len(prompt.encode())
    except UnicodeEncodeError:
        raise InvalidRequest("prompt is not valid Unicode", param="prompt") from None
    if size > max_prompt_bytes:
        raise InvalidRequest(
            f"prompt has {size} bytes: shorten it to {max_prompt_bytes}", param="prompt", code="prompt_too_long"
        )
    checked: Message = {"prompt": prompt}
    schemas = settings()
    if message.get("max_length") is not None:
        checked["max_tokens"] = check("max_length", message["max_length"], schemas["max_tokens"])
    for name, value in message.items():
        if name in schemas:
            checked[name] = check(name, value, schemas[name])
        elif name not in ("action", "request_id", "prompt", "stream", "max_length"):
            raise InvalidRequest(f"{name[:40]}: unknown field", param=name[:40])
    checked.setdefault("max_tokens", min(schemas["max_tokens"]["default"], max_tokens))
    for name, most in (("max_tokens", max_tokens), ("n", max_samples)):
        if checked.get(name, 0) > most:
            raise InvalidRequest(
                f"{name} {checked[name]}: this gateway allows at most {most}", param=name, code="limit_exceeded"
            )
    return checked


def longest(request: Message) -> int:
    """Tokens at most of each sample of a validated request, those that finish its sentence included."""
    extra = request.get("finish_sentence")
    return int(request["max_tokens"]) + int(settings()["finish_sentence"]["default"] if extra is None else extra)


def check(name: str, value: Any, schema: Message) -> Any:
    """`value` if it satisfies `schema`; a string is accepted for a list of strings."""
    kinds = {part["type"]: part for part in schema.get("anyOf", [schema])}
    if value is None and "null" in kinds:
        return None
    for kind in NUMBERS:
        if kind in kinds:
            return _number(name, value, kinds[kind])
    if "array" in kinds:
        return _strings(name, value, kinds["array"])
    return _mapping(name, value, schema) if "object" in kinds else _string(name, value, schema)


def _bounds(schema: Message) -> str:
    return " and ".join(f"{word} {schema[key]}" for key, word, _ in BOUNDS if key in schema)


def _keeps(value: Any, schema: Message) -> bool:
    return all(test(value, schema[key]) for key, _, test in BOUNDS if key in schema)


def _is_number(value: Any, schema: Message) -> bool:
    return not isinstance(value, bool) and isinstance(value, int if schema["type"] == "integer" else (int, float))


def _number(name: str, value: Any, schema: Message) -> float | int:
    if not _is_number(value, schema):
        whole = "whole " if schema["type"] == "integer" else ""
        raise InvalidRequest(f"{name} must be a {whole}number, {_bounds(schema)}", param=name)
    if not _keeps(value, schema):
        raise InvalidRequest(f"{name} {value}: must be {_bounds(schema)}", param=name)
    number: float | int = value
    return number


def _string(name: str, value: Any, schema: Message) -> str:
    """Length and printability only; the server checks that a style exists."""
    if not isinstance(value, str) or len(value) > schema["maxLength"] or not value.isprintable():
        raise InvalidRequest(f"{name} must be a string of at most {schema['maxLength']} characters", param=name)
    return value


def _strings(name: str, value: Any, schema: Message) -> list[str]:
    value, most = [value] if isinstance(value, str) else value, schema["maxItems"]
    low, high = schema["items"]["minLength"], schema["items"]["maxLength"]
    good = isinstance(value, list) and len(value) <= most
    if not good or not all(isinstance(text, str) and low <= len(text) <= high for text in value):
        raise InvalidRequest(
            f"{name} must be a string or a list of at most {most} strings of {low} to {high} characters", param=name
        )
    return list(value)


def _mapping(name: str, value: Any, schema: Message) -> Message:
    """An object of numbers whose keys match a pattern."""
    inner, most = schema["additionalProperties"], schema["maxProperties"]
    good = isinstance(value, dict) and len(value) <= most
    if not good or not all(
        re.fullmatch(schema["propertyNames"]["pattern"], key) and _is_number(number, inner) and _keeps(number, inner)
        for key, number in value.items()
    ):
        raise InvalidRequest(f"{name} must be an object of at most {most} numbers, each {_bounds(inner)}", param=name)
    return dict(value)
