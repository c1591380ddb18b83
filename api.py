"""The server: REST, OpenAI's completions, server-sent events, WebSocket and SageMaker's container contract.

python api.py --model runs/sample/best                     # http://127.0.0.1:8000, page at /, docs at /docs
VLG_API_KEYS=secret python api.py --host 0.0.0.0 --port 8080
VLG_MODEL=runs/sample/best gunicorn 'api:create_app()' -k uvicorn_worker.UvicornWorker --workers 1
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import parse_flags, run_main
from server.settings import ServerFlags, Settings, client_addresses, read_settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from inference.engine import Engine

SAGEMAKER_MODEL = Path("/opt/ml/model")


def create_app(settings: Settings | None = None, engine: Engine | None = None) -> FastAPI:
    """The ASGI application; settings from the environment and the model loaded at start-up unless they are given."""
    from server.application import build

    return build(settings or environment_settings(), engine)


def __getattr__(name: str) -> Any:
    """`api:app` for servers that want a name and not a factory."""
    if name == "app":
        globals()["app"] = create_app()
        return globals()["app"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def environment_settings(serve: bool = False) -> Settings:
    """Settings from the environment; in SageMaker's container its port, its model folder and every address.

    `serve`: the container was started with that word, as SageMaker does.
    """
    given: dict[str, Any] = {}
    get = os.environ.get
    if serve or get("SAGEMAKER_BIND_TO_PORT"):
        if not get("VLG_HOST"):
            given["host"] = "0.0.0.0"
        if not get("VLG_PORT"):
            given["port"] = get("SAGEMAKER_BIND_TO_PORT") or 8080
        if not get("VLG_MODEL") and SAGEMAKER_MODEL.is_dir():
            given["model"] = model_under(SAGEMAKER_MODEL)
            given["name"] = get("VLG_NAME") or "victorian-gpt"
    return read_settings(**given)


def model_under(folder: Path) -> Path:
    """The model folder in an unpacked archive: the folder itself, its best/ or last/, or its only model."""
    found = [folder, folder / "best", folder / "last", *sorted(folder.glob("*")), *sorted(folder.glob("*/best"))]
    return next((path for path in found if (path / "config.json").is_file()), folder)


def listen(settings: Settings) -> socket.socket:
    """A listening socket whose connections the kernel drops when what was sent lies unread for `stall_s`."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(settings.stall_s * 1000))
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        reason = error.strerror or error
        raise OSError(f"--host {settings.host} --port {settings.port}: {reason}; choose another --port") from None
    listener.set_inheritable(True)
    return listener


def serve(settings: Settings) -> int:
    """Run until a signal or a failure to load the model; returns the exit code."""
    import uvicorn

    from server.logs import set_up_logs

    set_up_logs(settings.log_level)
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # the application reads them itself
        ws_max_size=settings.max_body_bytes,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)

    def stop() -> None:
        server.should_exit = True

    app.state.service.on_failure = stop
    listener = listen(settings)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{port}"
    print(f"serving on {address} (page at /, documentation at /docs)", file=sys.stderr, flush=True)
    print(f"paste into clients: {client_addresses(address)}", file=sys.stderr, flush=True)
    if host not in ("127.0.0.1", "::1") and not settings.api_keys:
        print("warning: reachable from the network without an API key; set VLG_API_KEYS", file=sys.stderr, flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # what uvicorn raises again once it has shut down
    server.run(sockets=[listener])
    if app.state.service.failure is not None:
        print(f"error: {app.state.service.failure}", file=sys.stderr)
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    container = words[:1] == ["serve"]  # SageMaker starts the image with this word

    def body() -> int:
        settings = environment_settings(container)
        defaults = {name: getattr(settings, name) for name in ServerFlags.model_fields}
        flags = parse_flags(
            ServerFlags,
            words[1:] if container else words,
            defaults=defaults,
            description=(__doc__ or "").split("\n\n")[0],
            examples=__doc__,
        )
        return serve(settings.model_copy(update=flags.model_dump()))

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
