"""The ASGI application: middleware, error handlers and all routes put together.

>>> app = build(read_settings(model="runs/sample/best"))
curl localhost:8000/generate -H 'Content-Type: application/json' -d '{"prompt": "The fog", "max_tokens": 40}'
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from config import ROOT, read_toml
from server.disconnect import ClientDisconnected
from server.errors import ApiError, from_validation_errors
from server.lifecycle import lifespan
from server.middleware import RequestMiddleware
from server.openapi import openapi_document
from server.origins import OriginMiddleware
from server.proxy import ProxyMiddleware
from server.routes import docs, generate, kobold, llama_cpp, openai, page, status
from server.service import Service
from server.settings import Settings
from server.websocket import WebSocketConnection

if TYPE_CHECKING:
    from inference.engine import Engine


def build(settings: Settings, engine: Engine | None = None) -> FastAPI:
    """The ASGI application. Without an engine it loads the model of `settings` when it starts."""
    service = Service(settings, engine)
    app = FastAPI(
        title="Victorian Literature Generator",
        version=read_toml(ROOT / "pyproject.toml")["project"]["version"],
        description="Continues a prompt. Errors are `{error: {message, type, param, code}}` everywhere.",
        lifespan=partial(lifespan, service),
        docs_url=None,  # FastAPI's own load their scripts from elsewhere; routes/docs.py has others
        redoc_url=None,
    )
    app.state.service = service
    app.add_middleware(RequestMiddleware, settings=settings, metrics=service.metrics)
    app.add_middleware(OriginMiddleware, origins=service.origins)
    app.add_middleware(ProxyMiddleware, trusted=settings.trusted_proxies, root_path=settings.root_path)
    app.add_exception_handler(RequestValidationError, on_invalid_body)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ClientDisconnected, on_client_disconnect)
    for module in (status, generate, openai, kobold, llama_cpp, page, docs):
        module.add_routes(app, service)

    @app.websocket("/ws")
    async def websocket(websocket: WebSocket) -> None:
        await WebSocketConnection(service, websocket).serve()

    app.openapi = lambda: openapi_document(app, service)  # type: ignore[method-assign]
    return app


async def on_invalid_body(request: Request, error: Exception) -> Response:
    """A body that its schema refuses: 400, naming the fields."""
    assert isinstance(error, RequestValidationError)
    errors = list(error.errors())
    if errors[0]["type"] == "json_invalid":
        answer = ApiError(400, "the body is not JSON", code="bad_json")
    elif errors[0]["loc"] == ("body",):
        answer = ApiError(400, "send a JSON object, with Content-Type: application/json", code="bad_json")
    else:
        answer = from_validation_errors(errors, skip=1)
    return JSONResponse(answer.body(), answer.status)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Unknown paths, wrong methods and unreadable bodies in the one envelope."""
    assert isinstance(error, HTTPException)
    code = {400: "bad_json", 404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    detail = "the body is not JSON" if error.status_code == 400 else str(error.detail)
    answer = ApiError(error.status_code, detail, code=code)
    return JSONResponse(answer.body(), answer.status, headers=error.headers)


async def on_client_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=499)
