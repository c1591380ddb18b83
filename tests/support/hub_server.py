"""A hub on this machine for tests: lists data sets and serves their files over HTTP, with faults on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

API = re.compile(r"^/api/datasets/([^/]+/[^/]+)/revision/(.+)$")
FILE = re.compile(r"^/datasets/([^/]+/[^/]+)/resolve/((?:refs/convert/)?[^/]+)/(.+)$")


class Hub:
    """sets: {"owner/name": {"main": {path: bytes}}}. `busy` counts answers of 503 to come, `cuts` broken downloads."""

    def __init__(self, sets: dict[str, dict[str, dict[str, bytes]]]):
        self.sets = sets
        self.busy = self.cuts = 0
        self.asked: Counter[str] = Counter()
        self.ranges: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(False)

            def do_GET(self) -> None:
                self.answer(True)

            def answer(self, body: bool) -> None:
                path = unquote(urlsplit(self.path).path)
                hub.asked[f"{self.command} {path}"] += 1
                if hub.busy:
                    hub.busy -= 1
                    return self.send(503, b"busy", {}, body)
                if found := API.match(path):
                    return self.listing(*found.groups(), body=body)
                if found := FILE.match(path):
                    return self.file(*found.groups(), body=body)
                return self.send(404, b"", {}, body)

            def listing(self, name: str, revision: str, body: bool) -> None:
                if name not in hub.sets:
                    return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
                if revision not in hub.sets[name]:
                    return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
                files = hub.sets[name][revision]
                siblings = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
                info = {
                    "id": name,
                    "sha": hub.commit(name, revision),
                    "private": False,
                    "tags": [],
                    "siblings": siblings,
                }
                return self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)

            def file(self, name: str, revision: str, path: str, body: bool) -> None:
                data = hub.sets.get(name, {}).get(revision, {}).get(path)
                if data is None:
                    return self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
                headers = {
                    "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                    "X-Repo-Commit": hub.commit(name, revision),
                    "Accept-Ranges": "bytes",
                }
                status = 200
                if wanted := re.match(r"bytes=(\d+)-$", self.headers.get("Range", "")):
                    hub.ranges.append(wanted[0])
                    start = int(wanted[1])
                    headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                    data, status = data[start:], 206
                return self.send(status, data, headers, body)

            def send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if body and status in (200, 206) and hub.cuts and len(data) > 2000:
                    hub.cuts -= 1
                    self.wfile.write(data[: len(data) // 2])
                    self.wfile.flush()
                    self.close_connection = True
                elif body:
                    self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def commit(self, name: str, revision: str) -> str:
        parts = [f"{path} {hashlib.sha256(data).hexdigest()}" for path, data in self.sets[name][revision].items()]
        return hashlib.sha1("\n".join([name, revision, *parts]).encode()).hexdigest()

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
