"""The page at `/` and its two files."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response

from config import ROOT
from server.service import Service

WEB = ROOT / "web"
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self' ws: wss:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def add_routes(app: FastAPI, service: Service) -> None:
    for path, name in (("/", "index.html"), ("/client.js", "client.js"), ("/style.css", "style.css")):
        app.add_api_route(path, file_route(name), methods=["GET"], include_in_schema=False)


def file_route(name: str) -> Callable[[], Awaitable[Response]]:
    """A route that answers with a file of web/."""

    async def page() -> Response:
        headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY, "X-Content-Type-Options": "nosniff"}
        return FileResponse(WEB / name, headers=headers)

    return page
