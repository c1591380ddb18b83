"""Limits on requests: size of the body and time to send it, length and number of prompts.

The sampling settings have their bounds in schemas.py, the queue its length in the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sized

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from server.errors import ApiError, bad_value

BODY_S = 30.0  # seconds a client may take to send its body


def check_prompt(prompt: str | list[int], param: str, max_length: int, vocab_size: int) -> None:
    """ApiError 400 for a prompt longer than `max_length` characters (or ids), or with ids that the model lacks."""
    if len(prompt) > max_length:
        unit = "characters" if isinstance(prompt, str) else "tokens"
        message = f"{param}: {len(prompt)} {unit}, this server allows {max_length}"
        raise ApiError(400, message, param=param, code="prompt_too_long")
    if not isinstance(prompt, str) and max(prompt, default=0) >= vocab_size:
        message = f"{param}: the model has the token ids 0 to {vocab_size - 1}"
        raise ApiError(400, message, param=param, code="invalid_value")


def check_prompt_count(prompts: Sized, param: str, max_prompts: int) -> None:
    """ApiError 400 for more than `max_prompts` prompts."""
    if len(prompts) > max_prompts:
        raise bad_value(f"{param}: this server allows {max_prompts} at once", param, "limit_exceeded")


async def read_body(headers: Headers, receive: Receive, max_bytes: int) -> Receive:
    """Read the whole body; returns a `receive` that gives it again. ApiError 413 too large, 408 too slow."""
    length = headers.get("content-length", "")
    if length.isdigit() and int(length[:20]) > max_bytes:
        raise too_large(max_bytes)
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
                if len(body) > max_bytes:
                    raise too_large(max_bytes)
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


def too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"larger than {max_bytes} bytes", code="too_large")
