"""What happens to every HTTP request: request id, API key, body limit, HEAD, metrics, log line, and no bare 500."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.auth import OPEN_PATHS, has_valid_key
from server.errors import ApiError, unexpected
from server.limits import read_body
from server.logs import LOG
from server.metrics import Metrics
from server.settings import Settings

METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
REQUEST_ID = re.compile(r"[!-~]{1,128}")


class RequestMiddleware:
    """ASGI middleware around every HTTP request; a WebSocket passes through."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics):
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        method = scope["method"]
        if (
            method == "HEAD"
        ):  # answered as GET, without the body; a copy, since the HTTP server reads its own scope again
            scope = {**scope, "method": "GET"}
        begun, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            elif method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        try:
            self._check_key(scope, headers)
            if scope["method"] in ("POST", "PUT", "PATCH"):
                receive = await read_body(headers, receive, self.settings.max_body_bytes)
            await self.app(scope, receive, send_with_id)
        except ApiError as error:
            await send_error(error, scope, receive, send_with_id)
        except Exception:
            failure = unexpected("request", request_id)
            if not status:
                await send_error(failure, scope, receive, send_with_id)
        finally:
            self._record(scope, method, request_id, status or 499, time.monotonic() - begun)

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # the prefix a proxy serves it under
        if path in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        if not has_valid_key(self.settings.api_keys, headers):
            raise ApiError(401, "a valid API key is needed", code="invalid_api_key", kind="authentication_error")

    def _record(self, scope: Scope, method: str, request_id: str, status: int, seconds: float) -> None:
        """Metrics and a log line; health checks and pages are logged at debug level only."""
        route = getattr(scope.get("route"), "path", "unmatched")
        method = method if method in METHODS else "other"
        self.metrics.count_request(route, method, status, seconds)
        fields = {"request_id": request_id, "method": method, "route": route, "status": status}
        fields["ms"] = round(seconds * 1000, 1)
        LOG.log(logging.DEBUG if route in OPEN_PATHS else logging.INFO, "request", extra={"fields": fields})


async def send_error(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the error envelope; the rest of an unread body is not waited for."""
    headers = error.headers()
    if error.status in (408, 413):
        headers["Connection"] = "close"
    await JSONResponse(error.body(), error.status, headers=headers)(scope, receive, send)
