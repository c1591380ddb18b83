"""Behind a reverse proxy: nginx itself, and the headers of Caddy and Traefik."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from starlette.testclient import TestClient
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

import api
from inference.engine import Engine
from support.api_support import PROMPT, running, settings, until

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
KEY = {"Authorization": "Bearer good"}
CONFIG = """
daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location {prefix}/ {{
            proxy_pass {target};
            proxy_http_version 1.1;
            proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection "upgrade";
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for; proxy_set_header X-Forwarded-Proto $scheme;
            {headers}
        }}
    }}
}}
"""
FORWARDED = "proxy_set_header X-Forwarded-Host $http_host;"
# name: (the public prefix, whether nginx strips it, its headers, the server's settings)
SETUPS: dict[str, tuple[str, bool, str, dict[str, Any]]] = {
    "host rewritten": ("", False, FORWARDED, {}),
    "host passed on": ("", False, "proxy_set_header Host $http_host;", {"trusted_proxies": "10.0.0.1"}),
    "prefix kept": ("/writer", False, FORWARDED, {"root_path": "/writer"}),
    "prefix stripped": ("/writer", True, FORWARDED, {"root_path": "/writer"}),
    "prefix told": ("/a/b", True, FORWARDED + " proxy_set_header X-Forwarded-Prefix /a/b;", {}),
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def nginx(folder: Path, target: str, prefix: str, strip: bool, headers: str) -> Iterator[str]:
    """nginx in front of `target`; gives its public address, with the prefix."""
    assert NGINX is not None
    port = free_port()
    values = {"folder": folder, "port": port, "prefix": prefix, "headers": headers}
    config = folder / "nginx.conf"
    config.write_text(CONFIG.format(**values, target=target + "/" if strip else target))
    process = subprocess.Popen([NGINX, "-p", str(folder), "-c", str(config)], stderr=subprocess.DEVNULL)
    try:

        def listening() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        assert until(listening), (folder / "error.log").read_text()
        yield f"http://127.0.0.1:{port}{prefix}"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
@pytest.mark.parametrize("name", SETUPS)
def test_behind_nginx(engine: Engine, tmp_path: Path, name: str) -> None:
    prefix, strip, headers, more = SETUPS[name]
    app = api.create_app(settings(api_keys="good", name="some/model", **more), engine)
    with running(app) as target, nginx(tmp_path, target, prefix, strip, headers) as public:
        with httpx.Client(timeout=30) as client:
            for path in ("/", "/client.js", "/health", "/docs", "/openapi.json"):
                assert client.get(public + path).status_code == client.head(public + path).status_code == 200, path
            assert f"{prefix}/openapi.json" in client.get(public + "/docs").text
            servers = client.get(public + "/openapi.json").json().get("servers", [])
            assert servers == ([{"url": prefix}] if prefix else [])
            body = {"prompt": PROMPT, "max_tokens": 12, "seed": 3}
            assert client.post(public + "/generate", json=body).status_code == 401
            whole = client.post(public + "/generate", json=body, headers=KEY).json()["generated_text"]
            assert client.get(public + "/v1/models/some/model", headers=KEY).json()["id"] == "some/model"
            stream = client.post(public + "/generate", json={**body, "stream": True}, headers=KEY).text
        parts = [json.loads(line[6:]) for line in stream.splitlines() if line]
        assert "".join(part.get("text", "") for part in parts) == whole
        address = public.replace("http", "ws") + "/ws?token=good"
        origin = public.removesuffix(prefix)
        with connect(address, origin=origin) as own:  # type: ignore[arg-type]
            own.send(json.dumps({"action": "ping"}))
            assert json.loads(own.recv(timeout=10)) == {"type": "pong"}
        with pytest.raises(InvalidStatus), connect(address, origin="http://elsewhere.example"):  # type: ignore[arg-type]
            pass


@pytest.mark.parametrize("trusted", [True, False])
def test_headers_count_only_from_a_trusted_proxy(engine: Engine, trusted: bool) -> None:
    # Caddy and Traefik pass the host on and add these; a prefix that Traefik strips comes with them
    forwarded = {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https", "X-Forwarded-Host": "pages.example"}
    forwarded |= {"X-Forwarded-Prefix": "/writer", "Origin": "https://pages.example", "Host": "inside:8000"}
    peer = ("10.1.2.3", 5000) if trusted else ("10.2.2.3", 5000)
    with TestClient(api.create_app(settings(trusted_proxies="10.1.0.0/16"), engine), client=peer) as client:
        assert ("/writer/openapi.json" in client.get("/docs", headers=forwarded).text) is trusted
        refused = 0
        try:
            with client.websocket_connect("/ws", headers=forwarded) as socket:
                socket.send_json({"action": "ping"})
                assert socket.receive_json() == {"type": "pong"}
        except Exception:
            refused = 1
        assert refused == (not trusted)
        odd = {**forwarded, "X-Forwarded-Prefix": "/<script>", "X-Forwarded-Host": "a b"}
        assert "script>/openapi" not in client.get("/docs", headers=odd).text
