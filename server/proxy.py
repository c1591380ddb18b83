"""Behind a reverse proxy: the address that its clients used, from `X-Forwarded-For`, `-Proto`, `-Host` and `-Prefix`.

uvicorn's middleware reads the first two; the host and the prefix are read here. They count only where they come from a
trusted proxy (the setting `trusted_proxies`).
"""

from __future__ import annotations

import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

HOST = re.compile(r"[A-Za-z0-9.\-_\[\]:]{1,300}")
PREFIX = re.compile(r"(/[A-Za-z0-9.\-_~]{1,100}){1,10}")


class ProxyMiddleware:
    """Restores a request's own host and prefix (`root_path`) where a trusted proxy forwards it."""

    def __init__(self, app: ASGIApp, trusted: str, root_path: str):
        """trusted: addresses and networks of proxies, separated by commas; `*` for any. root_path: the prefix, if it is fixed."""
        self.app, self.root_path = app, root_path
        self.forwarded = ProxyHeadersMiddleware(app, trusted)  # type: ignore[arg-type]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan" and self.root_path:
            scope = {**scope, "root_path": self.root_path}
        client = scope.get("client")
        if scope["type"] == "lifespan" or client is None or client[0] not in self.forwarded.trusted_hosts:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scope = {**scope, "headers": list(scope["headers"])}
        host = headers.get("x-forwarded-host", "").split(",")[0].strip()
        if HOST.fullmatch(host):
            MutableHeaders(scope=scope)["host"] = host
        prefix = headers.get("x-forwarded-prefix", "").split(",")[0].strip().rstrip("/")
        if PREFIX.fullmatch(prefix) and not scope.get("root_path"):
            scope["root_path"] = prefix
        await self.forwarded(scope, receive, send)  # type: ignore[arg-type]
