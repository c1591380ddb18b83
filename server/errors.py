"""Errors as every surface answers them: an HTTP status and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import math
from typing import Any

from server.logs import LOG


class ApiError(Exception):
    """A refused or failed request: HTTP status and error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        kind: str = "invalid_request_error",
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.kind, self.retry_after = status, code, param, kind, retry_after

    def body(self) -> dict[str, Any]:
        """`{"error": {...}}`, with nothing in it that UTF-8 cannot carry."""
        return {
            "error": {
                "message": printable(str(self)),
                "type": self.kind,
                "param": None if self.param is None else printable(self.param),
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def printable(text: str, limit: int = 500) -> str:
    """At most `limit` characters; lone surrogates become question marks."""
    return text[:limit].encode("utf-8", "replace").decode("utf-8")


def bad_value(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def from_validation_errors(errors: list[Any], skip: int = 0) -> ApiError:
    """One 400 out of pydantic's errors, without echoing the values; `skip` leading parts of each place are dropped."""
    lines: list[str] = []
    first: str | None = None
    for found in errors:
        place = ".".join(str(part) for part in found["loc"][skip:])
        if first is None and place:
            first = place.split(".")[0]
        message = error_text(found)
        lines.append(f"{place}: {message}" if place else message)
    more = f" (and {len(lines) - 5} more)" if len(lines) > 5 else ""
    return bad_value("; ".join(lines[:5]) + more, first, errors[0]["type"] if errors else "invalid_value")


# pydantic's words for what a client sent, where they speak of Python's types; the keys are its error types
ERROR_TEXTS = {
    "too_long": "at most {max_length} items are allowed, not {actual_length}",
    "too_short": "at least {min_length} items are needed, not {actual_length}",
    "string_too_long": "at most {max_length} characters are allowed",
    "string_too_short": "at least {min_length} characters are needed",
    "greater_than_equal": "must be {ge} or more",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be {le} or less",
    "less_than": "must be less than {lt}",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "finite_number": "must be a finite number",
    "extra_forbidden": "there is no such field",
    "missing": "is required",
}


def error_text(found: Any) -> str:
    """One of pydantic's errors, worded for the client."""
    known = ERROR_TEXTS.get(found["type"])
    if known is None:
        return str(found["msg"]).removeprefix("Value error, ")
    limits = found.get("ctx", {}).items()
    return known.format(**{name: int(n) if isinstance(n, float) and n.is_integer() else n for name, n in limits})


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", kind="unavailable_error", retry_after=5)


def queue_full(retry_after: float) -> ApiError:
    """429; retry_after: seconds after which another try makes sense."""
    return ApiError(
        429,
        "the queue is full; try again later",
        code="queue_full",
        kind="rate_limit_error",
        retry_after=max(1, min(120, math.ceil(retry_after))),
    )


def unexpected(where: str, request_id: str | None) -> ApiError:
    """Log the exception being handled; the client learns only that there was one."""
    LOG.exception(where, extra={"fields": {"request_id": request_id}})
    return ApiError(500, "internal server error: see the server's log", code="internal_error", kind="server_error")
