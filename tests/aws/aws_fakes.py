"""A container that speaks the `/invocations` contract, with faults on demand, Lambda's Runtime API, and WebSocket helpers."""

from __future__ import annotations

import asyncio
import json
import queue
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORDS = ["It", " was", " the", " best", " of", " times", ", £", "1", " “", "said", "”", " é", "\n", "the", " fog", "."]


def words(prompt: str, count: int, index: int = 0) -> list[str]:
    """The tokens that the fake model writes: they depend on the prompt and the sample, and on nothing else."""
    start = sum(prompt.encode()) + index
    return [WORDS[(start + at * 7) % len(WORDS)] for at in range(count)]


class FakeContainer:
    """Tokens at a steady pace. `fault` is one of error_before, busy, error_amid, abort, stall, unterminated, odd_cuts."""

    def __init__(self, pace: float = 0.01):
        self.pace = pace
        self.fault = ""
        self.described: dict[str, Any] | None = None  # its answer to `settings`; None: an older container
        self.asked = 0  # how often it was asked for them
        self.produced = 0
        self.requests: list[dict[str, Any]] = []
        self.running = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> FakeContainer:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join(5)

    async def _serve(self) -> None:
        import uvicorn
        from starlette.applications import Starlette
        from starlette.requests import Request
        from starlette.responses import JSONResponse, Response, StreamingResponse
        from starlette.routing import Route

        async def ping(request: Request) -> Response:
            return Response(status_code=200)

        async def invocations(request: Request) -> Response:
            body = await request.json()
            if body.get("action") == "settings":
                self.asked += 1
                if self.fault == "busy":
                    return Response("loading", 503)
                error = {"message": "action: no", "type": "invalid_request_error", "param": "action", "code": "bad"}
                return JSONResponse(self.described or {"error": error}, 200 if self.described else 400)
            self.requests.append(body)
            if self.fault == "error_before":
                error = {"message": "top_k 7: no", "type": "invalid_request_error", "param": "top_k", "code": "bad"}
                return JSONResponse({"error": error}, 400)
            if self.fault == "crash":
                return Response("Internal Server Error", 500)
            if self.fault == "busy":
                return Response("loading", 503)
            if body.get("stream"):
                return StreamingResponse(self._lines(body), media_type="application/jsonlines")
            return JSONResponse(await self._whole(body))

        app = Starlette(routes=[Route("/ping", ping), Route("/invocations", invocations, methods=["POST"])])
        config = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        serving = asyncio.ensure_future(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            await asyncio.sleep(0.01)
        self._started.set()
        await serving

    async def _whole(self, body: dict[str, Any]) -> dict[str, Any]:
        count = body.get("max_tokens", 200)
        await asyncio.sleep(self.pace * count)
        samples = [
            {"index": i, "text": "".join(words(body["prompt"], count, i)), "finish_reason": "length", "tokens": count}
            for i in range(body.get("n", 1))
        ]
        usage = self._usage(body, count)
        return {
            "generated_text": samples[0]["text"],
            "finish_reason": "length",
            "usage": usage,
            "seed": body.get("seed", 7),
            "samples": samples,
        }

    def _usage(self, body: dict[str, Any], count: int) -> dict[str, int]:
        prompt, written = len(body["prompt"].split()), count * body.get("n", 1)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    async def _lines(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        same, seq, count = {"request_id": body.get("request_id")}, 0, body.get("max_tokens", 200)

        def line(**values: Any) -> bytes:
            return json.dumps({**values, **same}, ensure_ascii=False).encode() + b"\n"

        self.running += 1
        try:
            yield line(type="started", seed=body.get("seed", 7), prompt_tokens=len(body["prompt"].split()))
            pieces = [words(body["prompt"], count, i) for i in range(body.get("n", 1))]
            for at in range(count):
                await asyncio.sleep(self.pace)
                if at == 3 and self.fault == "abort":
                    raise ConnectionAbortedError
                if at == 3 and self.fault == "unterminated":
                    yield b'{"type": "token", "seq": 3, "te'
                    return
                if at == 3 and self.fault == "ended":
                    return
                if at == 3 and self.fault == "error_amid":
                    error = {"message": "lost the thread", "type": "server_error", "param": None, "code": "internal"}
                    yield line(type="error", error=error)
                    return
                if at == 3 and self.fault == "stall":
                    await asyncio.sleep(60)
                for index, texts in enumerate(pieces):
                    self.produced += 1
                    sent = line(type="token", seq=seq, index=index, text=texts[at])
                    seq += 1
                    if self.fault == "odd_cuts":
                        for start in range(0, len(sent), 7):
                            yield sent[start : start + 7]
                    else:
                        yield sent
            yield line(type="complete", finish_reason="length", usage=self._usage(body, count))
        finally:
            self.running -= 1


async def ask(socket: Any, request_id: str, prompt: str = "It was", **fields: Any) -> None:
    await socket.send(json.dumps({"action": "generate", "request_id": request_id, "prompt": prompt, **fields}))


async def hear(socket: Any, request_id: str | None, seconds: float = 20) -> list[dict[str, Any]]:
    """Messages of one request up to its complete or error, each with the time it came (`at`)."""
    heard: list[dict[str, Any]] = []
    async with asyncio.timeout(seconds):
        while not heard or heard[-1]["type"] not in ("complete", "error", "pong"):
            message = json.loads(await socket.recv())
            if message.get("request_id") == request_id:
                heard.append({**message, "at": time.monotonic()})
    return heard


def talk(stack: Any, conversation: Any) -> Any:
    """Run `conversation(socket)` on one connection, for a minute at most."""
    import websockets

    async def run() -> Any:
        async with asyncio.timeout(60), websockets.connect(stack.url) as socket:
            return await conversation(socket)

    return asyncio.run(run())


def generate(stack: Any, request_id: str = "r", **fields: Any) -> list[dict[str, Any]]:
    """One text on a connection of its own: all its messages."""

    async def conversation(socket: Any) -> list[dict[str, Any]]:
        await ask(socket, request_id, **fields)
        return await hear(socket, request_id, 30)

    return talk(stack, conversation)


def text(messages: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(m["text"] for m in messages if m["type"] == "token" and m["index"] == index)


def wait_for(condition: Any, seconds: float = 10) -> None:
    """Poll until `condition()` holds; fail after `seconds`."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "the condition did not come true"
        time.sleep(0.01)


@dataclass
class Answer:
    """What an environment posted for an event: kind is `response` or `error`."""

    kind: str
    headers: dict[str, str]
    chunks: list[bytes]

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)


class RuntimeApi:
    """Lambda's Runtime API on a socket (https://docs.aws.amazon.com/lambda/latest/dg/runtimes-api.html)."""

    def __init__(self) -> None:
        self.events: queue.Queue[tuple[str, dict[str, Any], float]] = queue.Queue()
        self.answers: dict[str, queue.Queue[Answer]] = {}
        outer = self

        class Api(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                request, event, timeout = outer.events.get()
                data = json.dumps(event).encode()
                self.send_response(200)
                self.send_header("Lambda-Runtime-Aws-Request-Id", request)
                self.send_header("Lambda-Runtime-Deadline-Ms", str(round((time.time() + timeout) * 1000)))
                self.send_header("Lambda-Runtime-Invoked-Function-Arn", "arn:aws:lambda:eu-west-1:0:function:f")
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def chunks(self) -> Iterator[bytes]:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    yield self.rfile.read(int(self.headers.get("Content-Length", 0)))
                    return
                while size := int(self.rfile.readline(), 16):
                    yield self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()

            def do_POST(self) -> None:
                *_, request, kind = self.path.split("/")
                answer = Answer(kind, dict(self.headers), list(self.chunks()))
                outer.answers.setdefault(request, queue.Queue()).put(answer)
                self.send_response(202)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # an environment that is killed while it waits for an event
        self.place = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def ask(self, event: dict[str, Any], seconds: float = 30) -> Answer:
        """An event for the environment, and its answer."""
        request = str(uuid.uuid4())
        self.answers[request] = queue.Queue()
        self.events.put((request, event, seconds))
        return self.answers[request].get(timeout=seconds)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
