"""Web origins whose pages may use the server, over HTTP (CORS) and WebSocket alike.

A browser sends the origin of the page with a request; programs send none. The server's own page is always allowed.

>>> origins = AllowedOrigins(("https://Pages.example/", "null"))
>>> origins.allow("https://pages.example:443", host="127.0.0.1:8000")
True
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import printable
from server.logs import LOG

ANY = "*"
NULL = "null"  # a page opened from a file
DEFAULT_PORTS = {"http": 80, "ws": 80, "https": 443, "wss": 443}


def normalized(origin: str) -> str | None:
    """An origin as browsers write it: lower case, without the scheme's default port and a closing slash.

    None for what is no origin (a host without a scheme, an address with a path).
    """
    if origin in (ANY, NULL):
        return origin
    try:
        parts = urlsplit(origin.strip())
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if not parts.scheme or not host or parts.path not in ("", "/") or parts.query or parts.fragment:
        return None
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown}" + ("" if port in (None, DEFAULT_PORTS.get(parts.scheme)) else f":{port}")


class AllowedOrigins:
    """The origins of the settings. `*` allows every page, `null` those opened from a file.

    An entry that is no origin is reported in the log once, since it would never match.
    """

    def __init__(self, origins: Sequence[str]):
        self.origins: set[str] = set()
        for given in origins:
            origin = normalized(given)
            if origin is None:
                advice = "write an origin with its scheme and without a path, like https://pages.example"
                LOG.warning("origin_ignored", extra={"fields": {"origin": printable(given, 200), "message": advice}})
            else:
                self.origins.add(origin)

    @property
    def any(self) -> bool:
        return ANY in self.origins

    def listed(self, origin: str) -> bool:
        """Whether the settings name this origin."""
        return self.any or normalized(origin) in self.origins

    def allow(self, origin: str | None, host: str | None) -> bool:
        """Whether a page of `origin` may use the server that was addressed as `host`; logs a refusal."""
        if origin is None or is_own(origin, host) or self.listed(origin):
            return True
        fields = {"origin": printable(origin, 200), "host": printable(host or "", 200), "allowed": sorted(self.origins)}
        LOG.warning("origin_refused", extra={"fields": fields})
        return False


def is_own(origin: str | None, host: str | None) -> bool:
    """Whether `origin` is the server's own page: its host is the one that the request was sent to."""
    if origin is None or host is None or "://" not in origin:
        return False
    scheme = origin.partition("://")[0]
    return normalized(origin) == normalized(f"{scheme}://{host}") is not None


class OriginMiddleware(CORSMiddleware):
    """CORS for the allowed origins: any request header, and a log line for each refused origin."""

    def __init__(self, app: ASGIApp, origins: AllowedOrigins):
        super().__init__(
            app,
            allow_origins=[ANY] if origins.any else [],
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=[ANY],
            allow_private_network=True,
            expose_headers=["X-Request-ID", "Retry-After", "X-Prompt-Truncated"],
        )
        self.origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            origin, host = headers.get("origin"), headers.get("host")
            if is_own(origin, host) or (origin is None and not self.origins.origins):
                await self.app(scope, receive, send)
                return
            self.origins.allow(origin, host)  # for its log line; the answer itself is below
        await super().__call__(scope, receive, send)

    def is_allowed_origin(self, origin: str) -> bool:
        return self.origins.listed(origin)
