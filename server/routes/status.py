"""Health and metrics: `/health`, `/readyz`, `/livez`, SageMaker's `/ping`, and `/metrics` for Prometheus."""

from __future__ import annotations

import time

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from server import schemas
from server.openapi import errors
from server.service import Service


class PlainText(Response):
    media_type = "text/plain"


def add_routes(app: FastAPI, service: Service) -> None:
    async def ready() -> Response:
        """200 once the model is loaded, 503 before, and while the server shuts down."""
        return health(service)

    async def live() -> Response:
        """200 while the process answers at all."""
        return JSONResponse({"status": "ok"})

    async def ping() -> Response:
        """SageMaker's health check: 200 once the model is loaded."""
        service.ready()
        return JSONResponse({"status": "ok"})

    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    for path in ("/health", "/readyz"):
        app.add_api_route(path, ready, response_model=schemas.HealthReply, responses=errors(503), tags=["status"])
    app.add_api_route("/livez", live, response_model=schemas.StatusReply, tags=["status"])
    app.add_api_route("/ping", ping, response_model=schemas.StatusReply, responses=errors(503), tags=["status"])
    app.add_api_route("/metrics", metrics, response_class=PlainText, responses=errors(401), tags=["status"])


def health(service: Service) -> Response:
    """The model and the load of this server; ApiError 503 while there is no model."""
    engine = service.ready()
    stats = engine.stats()
    return JSONResponse(
        {
            "status": "ok",
            "model": service.name,
            "device": str(engine.model.wte.weight.device),
            "context": engine.context,
            "vocabulary": engine.tokenizer.vocab_size,
            "parameters": service.parameters,
            "styles": engine.styles,
            "running": stats.get("running", 0),
            "waiting": stats.get("waiting", 0),
            "uptime_s": round(time.time() - service.started, 1),
        }
    )
