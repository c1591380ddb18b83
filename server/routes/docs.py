"""The API's documentation at `/docs` (Swagger UI) and `/redoc`: their files come with a package, so no network is needed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import fastapi_offline
from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import FileResponse, Response

from server.auth import DOCS_FILES
from server.service import Service

FILES = Path(fastapi_offline.__file__).parent / "static"
# both begin with a script in the page itself; neither may load anything from elsewhere (ReDoc would, its maker's logo)
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self' data:; connect-src 'self'; worker-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def add_routes(app: FastAPI, service: Service) -> None:
    """The two pages and the files they load."""

    @app.get("/docs", include_in_schema=False)
    async def swagger(request: Request) -> Response:
        root = request.scope.get("root_path", "")
        page = get_swagger_ui_html(
            openapi_url=f"{root}/openapi.json",
            title=app.title,
            swagger_js_url=f"{root}/docs/swagger-ui-bundle.js",
            swagger_css_url=f"{root}/docs/swagger-ui.css",
            swagger_favicon_url=f"{root}/docs/favicon.png",
        )
        page.headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
        return page

    @app.get("/redoc", include_in_schema=False)
    async def redoc(request: Request) -> Response:
        root = request.scope.get("root_path", "")
        page = get_redoc_html(
            openapi_url=f"{root}/openapi.json",
            title=app.title,
            redoc_js_url=f"{root}/docs/redoc.standalone.js",
            redoc_favicon_url=f"{root}/docs/favicon.png",
            with_google_fonts=False,
        )
        page.headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
        return page

    for name in DOCS_FILES:
        app.add_api_route(f"/docs/{name}", file_route(name), methods=["GET"], include_in_schema=False)


def file_route(name: str) -> Callable[[], Awaitable[Response]]:
    """A route that answers with one of the package's files; a browser keeps it for a day."""

    async def file() -> Response:
        return FileResponse(
            FILES / name, headers={"Cache-Control": "max-age=86400", "X-Content-Type-Options": "nosniff"}
        )

    return file
