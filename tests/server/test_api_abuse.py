"""The server under abuse, as its own process on a real socket: crowds, stuck and vanishing readers, garbage, SIGTERM."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import string
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest
import torch
import websockets

from api import create_app
from checkpoint import save_model
from config import GenerationParams, ModelConfig
from inference.engine import Engine
from model import GPT
from server.settings import read_settings
from support.forked import PYTHON
from tokenizer import Tokenizer, char_tokenizer, train_bpe

ROOT = Path(__file__).resolve().parents[2]
TEXT = "The fog lay upon the river, and “the lamps” of the quay burned low; £5 was paid for the café’s piano.\n"
STALL_S = 2.0
WAIT_S = 240.0  # on a busy machine; nothing waits so long on an idle one


def tiny(tokenizer: Tokenizer) -> GPT:
    torch.manual_seed(1)
    size = tokenizer.vocab_size
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=size, vocab_used=size)
    return GPT(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = char_tokenizer(TEXT + string.printable, 1)  # one without end-of-text: no text ends before its time
    save_model(folder, tiny(tokenizer), tokenizer, card={}, generation=GenerationParams())
    return folder


class Server:
    """`python api.py` in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], address: str):
        self.process, self.address = process, address
        host, port = address.removeprefix("http://").split(":")
        self.host, self.port = host, int(port)
        listening = psutil.net_connections("tcp")
        self.pid = next(found.pid for found in listening if found.laddr.port == self.port and found.status == "LISTEN")

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.address}/metrics").text
        return float(re.search(rf"^{name} (\S+)", text, re.M)[1])  # type: ignore[index]

    def settled(self, seconds: float = WAIT_S) -> bool:
        """Whether no text is written, waited for or held any more."""
        end = time.monotonic() + seconds
        while any(self.metric(f"vlg_{name}") for name in ("streams", "running", "waiting")):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    def memory(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]

    def sockets(self) -> int:
        found = 0
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            with suppress(OSError):
                found += os.readlink(link).startswith("socket")
        return found


@contextmanager
def serving(folder: Path, log: Path, **settings: Any) -> Iterator[Server]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **{f"VLG_{k.upper()}": str(v) for k, v in settings.items()}}
    command = [*PYTHON, "-u", str(ROOT / "api.py"), "--model", str(folder), "--port", "0"]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stderr=errors, cwd=ROOT, env=environment, text=True)
    try:
        address = ""
        end = time.monotonic() + WAIT_S
        while process.poll() is None and time.monotonic() < end:
            found = re.search(r"http://[\d.]+:\d+", log.read_text())
            if found:
                address = found[0]
                with suppress(httpx.HTTPError):
                    if httpx.get(f"{address}/health").status_code == 200:
                        break
            time.sleep(0.1)
        else:
            raise AssertionError(f"the server did not start: {log.read_text()}")
        yield Server(process, address)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    with serving(folder, log, stall_s=STALL_S, slots=16, queue_size=400, log_level="warning") as server:
        yield server
        assert "Traceback" not in log.read_text()


def request_bytes(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + content


def body_of(answer: bytes) -> tuple[int, str]:
    """Status and body of an HTTP answer; a chunked body must have its end."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    if b"transfer-encoding: chunked" not in head.lower():
        return status, body.decode()
    found = b""
    while True:
        size, _, rest = body.partition(b"\r\n")
        if int(size, 16) == 0:
            return status, found.decode()
        found, body = found + rest[: int(size, 16)], rest[int(size, 16) + 2 :]


def messages_of(path: str, text: str) -> list[dict[str, Any]]:
    if path == "/invocations":
        lines = text.splitlines()
    else:  # a comment is no event: it only keeps the connection open
        lines = [block[6:] for block in text.split("\n\n") if block and not block.startswith(":")]
    return [json.loads(line) for line in lines]


def whole_text(messages: list[dict[str, Any]]) -> str:
    """The text of a complete stream of one sample."""
    assert [message["type"] for message in (messages[0], messages[-1])] == ["started", "complete"], messages[-1]
    assert [message["seq"] for message in messages[1:-1]] == list(range(len(messages) - 2))
    return "".join(message["text"] for message in messages[1:-1])


async def read_stream(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        writer.write(request_bytes(path, {**body, "stream": True}))
        status, text = body_of(await reader.read())
        assert status == 200, text
        return messages_of(path, text)
    finally:
        writer.close()


async def read_socket(server: Server, body: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    async with websockets.connect(
        f"ws://{server.host}:{server.port}/ws", ping_interval=None, open_timeout=WAIT_S
    ) as connection:
        await connection.send(json.dumps({"action": "generate", **body}))
        while not found or found[-1]["type"] not in ("complete", "error"):
            found.append(json.loads(await connection.recv()))
    return found


async def vanish(server: Server, path: str, body: dict[str, Any]) -> None:
    """Ask for a long text, read a little of it, reset the connection."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(request_bytes(path, {**body, "stream": True, "max_tokens": 4000}))
    await reader.readuntil(b"token")
    raw = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    writer.transport.abort()


def stuck(server: Server, path: str) -> socket.socket:
    """Ask for a long text and never read."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect((server.host, server.port))
    body = {"prompt": "x", "stream": True, "max_tokens": 4000, "n": 4, "request_id": "s" * 128}
    raw.sendall(request_bytes(path, body))
    return raw


PATHS = ("/generate", "/invocations", "/ws")


async def crowd(server: Server, readers: int, vanishing: int, sticking: int) -> list[str]:
    """Everybody at once; the texts of those who read to the end, in order."""
    held = [stuck(server, PATHS[number % 2]) for number in range(sticking)]

    async def read(number: int) -> str:
        path, body = PATHS[number % 3], {"prompt": TEXT[:20], "max_tokens": 40, "seed": number % 5, "temperature": 1.0}
        return whole_text(await (read_socket(server, body) if path == "/ws" else read_stream(server, path, body)))

    async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
        tasks = [group.create_task(read(number)) for number in range(readers)]
        for number in range(vanishing):
            group.create_task(vanish(server, PATHS[number % 2], {"prompt": "x"}))
    for raw in held:
        raw.setblocking(False)
    try:
        return [task.result() for task in tasks]
    finally:
        await asyncio.to_thread(wait_for_drop, server)
        for raw in held:
            raw.close()


def wait_for_drop(server: Server) -> None:
    """The server ends what nobody reads, while the stuck clients still hold their ends."""
    assert server.settled(), "a stuck or vanished reader still holds a slot"


def test_many_clients_some_stuck_some_disconnecting(server: Server) -> None:
    alone = {
        seed: whole_text(
            asyncio.run(
                read_stream(
                    server, "/generate", {"prompt": TEXT[:20], "max_tokens": 40, "seed": seed, "temperature": 1.0}
                )
            )
        )
        for seed in range(5)
    }
    asyncio.run(crowd(server, 60, 10, 4))  # what a first crowd allocates once is not a leak
    memory, sockets = server.memory(), server.sockets()
    found = asyncio.run(crowd(server, 130, 50, 20))
    assert found == [alone[number % 5] for number in range(130)]
    end = time.monotonic() + 15
    while server.sockets() > sockets and time.monotonic() < end:
        time.sleep(0.1)
    assert server.sockets() <= sockets
    assert server.memory() - memory < 24 << 20
    assert server.metric("vlg_rejected_total") == 0


RAW_REQUESTS = [
    b"\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    b"POST /generate HTTP/1.1\r\nHost: t\r\nContent-Length: -5\r\n\r\n{}",
    b"POST /generate HTTP/1.1\r\nHost: t\r\nContent-Length: " + b"9" * 40 + b"\r\n\r\n{}",
    b"POST /generate HTTP/1.1\r\nHost: t\r\nContent-Length: 50\r\n\r\n{",
    b"POST /generate HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /generate HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nHost: t\r\nContent-Type: \xff\xfe\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /generate HTTP/1.1\r\nHost: t\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    b"GET /" + b"%00%ff" * 50 + b" HTTP/1.1\r\nHost: t\r\n\r\n",
    b"GET /v1/models/%ed%a0%80 HTTP/1.1\r\nHost: t\r\n\r\n",
    b"GET /v1/models/" + b"a" * 9000 + b" HTTP/1.1\r\nHost: t\r\n\r\n",
    b"GET /ws HTTP/1.1\r\nHost: t\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\r\n",
    b"BREW /generate HTTP/1.1\r\nHost: t\r\n\r\n",
]


def exchange(server: Server, raw: bytes) -> bytes:
    """What comes back for these bytes until the server closes or is silent."""
    answer = b""
    with socket.create_connection((server.host, server.port), 5) as connection, suppress(OSError):
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(65536):
            answer += part
    return answer


def test_garbage_on_a_real_socket(server: Server) -> None:
    pick = random.Random(3)
    valid = request_bytes("/generate", {"prompt": "x", "max_tokens": 2})
    cases = list(RAW_REQUESTS)
    cases += [method + b" /generate HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n" for method in (b"PUT", b"HEAD")]
    while len(cases) < 300:
        damaged = bytearray(valid)
        for _ in range(pick.randint(1, 6)):
            damaged[pick.randrange(len(damaged))] = pick.randrange(256)
        cases.append(bytes(damaged[: pick.randint(1, len(damaged))]))
    for case in cases:
        answer = exchange(server, case)
        assert not answer or 100 <= int(answer.split()[1]) < 500, (case, answer[:200])
    assert server.settled()
    assert whole_text(asyncio.run(read_stream(server, "/generate", {"prompt": "x", "max_tokens": 5}))) is not None


def test_garbage_on_a_websocket(server: Server) -> None:
    pick = random.Random(4)
    good = json.dumps({"action": "generate", "prompt": "“x”", "max_tokens": 2, "request_id": "a"})

    async def talk() -> None:
        async with asyncio.timeout(WAIT_S):
            async with websockets.connect(f"ws://{server.host}:{server.port}/ws") as connection:
                for number in range(200):
                    damaged = list(good)
                    for _ in range(pick.randint(1, 4)):
                        damaged[pick.randrange(len(damaged))] = chr(pick.choice((0, 34, 91, 0x201C, 0x1F600, 123)))
                    text = "".join(damaged)[: pick.randint(0, len(good))]
                    await connection.send(text if number % 3 else text.encode("utf-16"))
                    while (message := json.loads(await connection.recv()))["type"] in ("started", "token"):
                        pass
                    assert message["type"] in ("error", "complete", "pong")
                    assert message["type"] != "error" or message["error"]["type"] != "server_error", text
                await connection.send(good)
                assert json.loads(await connection.recv())["type"] == "started"
            for frame in (b"\x83\x00", b"\x81\xfe\xff\xff", b"\xc1\x80abcd", b"\x81\x05hello", bytes(range(256))):
                key = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
                head = b"GET /ws HTTP/1.1\r\nHost: t\r\n" + key + b"Sec-WebSocket-Version: 13\r\n\r\n"
                answer = await asyncio.to_thread(exchange, server, head + frame)
                assert answer.startswith(b"HTTP/1.1 101")
            with pytest.raises(websockets.ConnectionClosed):
                async with websockets.connect(f"ws://{server.host}:{server.port}/ws") as connection:
                    await connection.send("x" * (2 << 20))
                    await connection.recv()

    asyncio.run(talk())
    assert server.settled()


def test_sigterm_under_load_cuts_no_answer_short(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with serving(folder, log, grace_s=1.5, slots=16, queue_size=100, max_tokens=100_000) as server:

        async def one(number: int) -> tuple[str, dict[str, Any]]:
            body = {"prompt": "x", "max_tokens": 20 if number % 4 == 0 else 100_000}
            path = ("/generate", "/invocations", "/ws", "plain", "/v1/completions")[number % 5]
            if path == "/ws":
                return path, (await read_socket(server, body))[-1]
            if path in ("/generate", "/invocations"):
                return path, (await read_stream(server, path, body))[-1]
            reader, writer = await asyncio.open_connection(server.host, server.port)
            stream = {"stream": True} if path == "/v1/completions" else {}
            writer.write(request_bytes("/generate" if path == "plain" else path, {**body, **stream}))
            status, text = body_of(await reader.read())
            writer.close()
            if path == "plain":
                assert status in (200, 503)
                return path, json.loads(text)
            assert text.endswith("data: [DONE]\n\n")
            return path, json.loads(text.split("\n\n")[-3][6:])

        async def load() -> list[tuple[str, dict[str, Any]]]:
            async with asyncio.timeout(WAIT_S):
                tasks = [asyncio.create_task(one(number)) for number in range(40)]
                while await asyncio.to_thread(server.metric, "vlg_finished_total") < 3:
                    await asyncio.sleep(0.02)
                server.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.3)
                refused = await asyncio.to_thread(
                    httpx.post, f"{server.address}/generate", json={"prompt": "x", "max_tokens": 1}
                )
                assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
                return await asyncio.gather(*tasks)

        ends = asyncio.run(load())
        told = 0
        for path, last in ends:
            if "error" in last:
                assert last["error"]["code"] == "shutting_down", (path, last)
                told += 1
            elif path == "/v1/completions":
                assert last["choices"][0]["finish_reason"] == "length"
            else:
                assert last["finish_reason"] == "length", (path, last)
        assert 0 < told < len(ends)  # the long ones were told, the short ones finished
        assert server.process.wait(15) == 0
    assert "Traceback" not in log.read_text()


JUNK: list[Any] = [
    None, True, False, -1, 0, 1, 2**31, 2**63, 2**70, -(2**70), 0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"),
    float("-inf"), "", "0", "nan", "\ud800", "\udfff\ud800", "\x00", "é" * 50, "x" * 5000, [], [[]], {}, {"a": 1},
    [None], [float("nan")], [1.5], ["\ud800"], [2**70], {"\ud800": "\ud800"}, [True], "'; DROP TABLE --", "../../x",
]  # fmt: skip
VALID: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": "x", "max_tokens": 1, "temperature": 1.0, "top_k": 5, "top_p": 0.9, "n": 1, "seed": 1,
                  "stop": ["q"], "stream": False, "min_p": 0.1, "repetition_penalty": 1.1, "keep": 0, "request_id": "r"},
    "/invocations": {"prompt": "x", "max_length": 1, "stream": True},
    "/generate/batch": {"prompts": ["x"], "max_tokens": 1, "temperature": 1.0},
    "/v1/completions": {"prompt": "x", "max_tokens": 1, "model": "tiny", "n": 1, "logprobs": 1, "echo": True, "stop": "q",
                        "stream": False, "stream_options": {"include_usage": True}, "best_of": 1, "logit_bias": {},
                        "user": "u", "suffix": None, "presence_penalty": 0, "frequency_penalty": 0, "seed": 1},
    "/v1/score": {"text": "xyz", "top": 1},
}  # fmt: skip


def malformed(pick: random.Random) -> tuple[str, bytes, bytes]:
    """(path, content type, body): a valid request with something wrong in it, or no JSON at all."""
    path = pick.choice(list(VALID))
    body: Any = dict(VALID[path])
    kind = pick.randrange(12)
    content_type = b"application/json"
    if kind < 6:
        for _ in range(pick.randint(1, 3)):
            body[pick.choice(list(body))] = pick.choice(JUNK)
    elif kind == 6:
        body.pop(pick.choice(list(body)))
        body[pick.choice(["wings", "", "\ud800", "prompt ", "__proto__"])] = pick.choice(JUNK)
    elif kind == 7:
        body = pick.choice([*JUNK, [body], {"body": body}])
    elif kind == 8:
        depth = pick.choice((10, 500, 5000, 100_000))
        opening, closing = pick.choice((("[", "]"), ('{"a":', "}")))
        inner = opening * depth + ("1" + closing * depth if pick.random() < 0.5 else "")
        return path, content_type, f'{{"prompt": {inner}}}'.encode()
    text = json.dumps(body, ensure_ascii=pick.random() < 0.7)
    raw = text.encode("utf-8", "surrogatepass")
    if kind == 9:
        raw = bytearray(raw)
        for _ in range(pick.randint(1, 5)):
            raw[pick.randrange(len(raw))] = pick.randrange(256)
        raw = bytes(raw[: pick.randint(0, len(raw))])
    elif kind == 10:
        raw = pick.choice(
            (
                b"",
                b"\xff\xfe",
                text.encode("utf-16"),
                b"\xef\xbb\xbf" + raw,
                b"\x00" * 40,
                pick.randbytes(60),
                b"1" * 6000,
            )
        )
        content_type = pick.choice((content_type, b"application/json; charset=utf-16"))
    elif kind == 11:
        content_type = pick.choice(
            (b"", b"text/plain", b"multipart/form-data", b"application/xml", b"\xff", b"a" * 300)
        )
    return path, content_type, raw


def test_ten_thousand_malformed_requests() -> None:
    tokenizer = train_bpe([TEXT * 20], 300)
    engine = Engine(tiny(tokenizer), tokenizer, name="tiny", slots=8, queue_size=64)
    app = create_app(read_settings(max_tokens=4, max_n=2, max_prompts=4, max_prompt_chars=1000), engine)
    pick = random.Random(2026)
    seen: dict[int, int] = {}

    async def call(path: str, content_type: bytes, body: bytes) -> tuple[int, bytes]:
        headers = [(b"host", b"t"), (b"content-type", content_type), (b"content-length", str(len(body)).encode())]
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "headers": headers if content_type else headers[:1], "client": ("t", 1), "server": ("t", 80), "state": {},
        }  # fmt: skip
        sent: list[dict[str, Any]] = []
        first = True

        async def receive() -> dict[str, Any]:
            nonlocal first
            if not first:
                await asyncio.Event().wait()
            first = False
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await asyncio.wait_for(app(scope, receive, send), 20)
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])

    async def all_of_them() -> None:
        while sum(count for status, count in seen.items() if status >= 400) < 10_000:
            request = malformed(pick)
            status, answer = await call(*request)
            seen[status] = seen.get(status, 0) + 1
            assert status < 500, (request, answer)
            if status >= 400:
                error = json.loads(answer)["error"]
                assert set(error) == {"message", "type", "param", "code"}, (request, answer)
        status, answer = await call("/generate", b"application/json", b'{"prompt": "x", "max_tokens": 3}')
        assert status == 200 and json.loads(answer)["usage"]["completion_tokens"] == 3

    asyncio.run(all_of_them())
    assert set(seen) <= {200, 400, 404, 413}, seen
    assert engine.stats()["running"] == engine.stats()["waiting"] == 0 and not app.state.service.generations
    engine.close(5)
