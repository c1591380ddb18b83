"""What a client may ask: the limits of the HTTP API again, in plain Python, because a Lambda function has no pydantic.

from limits import parse, validate
validate(parse('{"prompt": "It was", "top_k": 40}'), max_tokens=1000, max_samples=4, max_prompt_bytes=24_000)
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]


class Refused(Exception):
    """A fault that the client is told about; never carries the prompt."""

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


@dataclass(frozen=True)
class Limit:
    """Bounds of one number in a request, the same as `config.GenerationParams` has (a test compares them)."""

    kind: type
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    null: bool = False

    def __str__(self) -> str:
        words = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
        return " and ".join(f"{word} {getattr(self, key)}" for key, word in words if getattr(self, key) is not None)

    def admits(self, value: float) -> bool:
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )


LIMITS = {
    "max_tokens": Limit(int, ge=0, le=100_000),
    "temperature": Limit(float, ge=0.0, le=2.0),
    "top_k": Limit(int, ge=0, le=100),
    "top_p": Limit(float, gt=0.0, le=1.0),
    "min_p": Limit(float, ge=0.0, lt=1.0),
    "repetition_penalty": Limit(float, gt=0.0, le=10.0),
    "n": Limit(int, ge=1, le=128),
    "seed": Limit(int, ge=0, lt=2**63, null=True),
    "keep": Limit(int, ge=0),
}
STOP_STRINGS, STOP_CHARACTERS = 16, 1000
STYLE_CHARACTERS = 200
DEFAULT_TOKENS = 200


def parse(body: str | None) -> Message:
    """A client's message as an object; raises Refused."""

    def constant(word: str) -> float:
        raise ValueError(word)

    try:
        message = json.loads(body or "", parse_constant=constant)
    except (ValueError, RecursionError):
        raise Refused('the message is not JSON: send an object like {"action": "generate"}', code="bad_json") from None
    if not isinstance(message, dict):
        raise Refused("the message must be a JSON object", code="bad_json")
    return message


def identity(message: Message) -> str:
    """The message's request_id; raises Refused when it is missing or not 1 to 128 plain characters."""
    request_id = message.get("request_id")
    if not isinstance(request_id, str) or not re.fullmatch(r"[!-~]{1,128}", request_id):
        raise Refused("request_id must be 1 to 128 printable ASCII characters without spaces", param="request_id")
    return request_id


def validate(message: Message, max_tokens: int, max_samples: int, max_prompt_bytes: int) -> Message:
    """The prompt and parameters of a `generate` message, checked; raises Refused naming field, value and bounds."""
    prompt = message.get("prompt")
    if not isinstance(prompt, str):
        raise Refused("prompt is missing: send a string", param="prompt")
    try:
        size = len(prompt.encode())
    except UnicodeEncodeError:
        raise Refused("prompt is not valid Unicode", param="prompt") from None
    if size > max_prompt_bytes:
        raise Refused(
            f"prompt has {size} bytes: shorten it to {max_prompt_bytes}", param="prompt", code="prompt_too_long"
        )
    checked: Message = {"prompt": prompt}
    if message.get("max_length") is not None:
        checked["max_tokens"] = _number("max_length", message["max_length"], LIMITS["max_tokens"])
    for name, value in message.items():
        if name in LIMITS:
            checked[name] = _number(name, value, LIMITS[name])
        elif name == "stop":
            checked[name] = _stop_strings(value)
        elif name == "style":
            checked[name] = _style(value)
        elif name not in ("action", "request_id", "prompt", "stream", "max_length"):
            raise Refused(f"{name[:40]}: unknown field", param=name[:40])
    checked.setdefault("max_tokens", min(DEFAULT_TOKENS, max_tokens))
    for name, most in (("max_tokens", max_tokens), ("n", max_samples)):
        if checked.get(name, 0) > most:
            raise Refused(
                f"{name} {checked[name]}: this gateway allows at most {most}", param=name, code="limit_exceeded"
            )
    return checked


def _number(field: str, value: Any, limit: Limit) -> float | int | None:
    if value is None and limit.null:
        return None
    if isinstance(value, bool) or not isinstance(value, int if limit.kind is int else (int, float)):
        raise Refused(f"{field} must be a {'whole ' if limit.kind is int else ''}number, {limit}", param=field)
    if not limit.admits(value):
        raise Refused(f"{field} {value}: must be {limit}", param=field)
    return value


def _style(value: Any) -> str:
    """Which styles there are, only the model knows: it answers with an error that lists them."""
    if not isinstance(value, str) or len(value) > STYLE_CHARACTERS or not value.isprintable():
        raise Refused(f"style must be a string of at most {STYLE_CHARACTERS} characters", param="style")
    return value


def _stop_strings(value: Any) -> list[str]:
    value = [value] if isinstance(value, str) else value
    good = isinstance(value, list) and len(value) <= STOP_STRINGS
    if not good or not all(isinstance(text, str) and 1 <= len(text) <= STOP_CHARACTERS for text in value):
        raise Refused(
            f"stop must be a string or a list of at most {STOP_STRINGS} strings of 1 to {STOP_CHARACTERS} characters",
            param="stop",
        )
    return value
