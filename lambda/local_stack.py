"""Runs the whole AWS path on one machine: gateway, functions, endpoint and table; handlers and boto3 are unmodified.

    python lambda/local_stack.py --model runs/sample/best          # starts api.py behind it
    python lambda/local_stack.py --in-lambda                       # the worker itself writes
    python lambda/local_stack.py --container http://127.0.0.1:8080 # or uses a running one
    npx wscat -c 'ws://127.0.0.1:8765/prod?token=local'            # {"action":"generate","request_id":"1","prompt":"It"}

Emulated from API Gateway: routes by `$request.body.action`, the authorizer before `$connect`, 29 seconds for an
integration, frames of 32 KB and messages of 128 KB, 10 idle minutes, 2 hours at most, throttling, and the answers 400,
410, 413 and 429 of `@connections`. The handlers learn its addresses from the usual AWS_ENDPOINT_URL variables.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import importlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import Field

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

from deploy_relay import limits_json  # noqa: E402
from local_aws import MESSAGE_BYTES, Endpoint, Faults, Services, Table, application  # noqa: E402
from local_lambda import Handler, LambdaRuntime  # noqa: E402

from cli import parse_flags, run_main  # noqa: E402
from config import ConfigError, FrozenSettings  # noqa: E402

STAGE = "prod"
ROUTES = ("$connect", "$disconnect", "$default", "generate", "stop", "ping")
FRAME_BYTES = 32 * 1024
ARN = "arn:aws:execute-api:eu-west-1:000000000000:local"
TIMEOUTS = {"authorizer": 5.0, "router": 10.0, "worker": 900.0}


class Flags(FrozenSettings):
    """The AWS path on one machine; prints the address that clients connect to."""

    model: Path | None = None
    """Model folder for api.py; default: as for generate.py."""
    in_lambda: bool = False
    """Let the worker itself write, without api.py behind it; it answers plain HTTP as well."""
    workers: int = Field(50, ge=1, le=200)
    """Generations that run at once; others wait for a minute at most."""
    container: str = ""
    """Address of a running container (`http://127.0.0.1:8080`), instead of starting api.py."""
    port: int = Field(8765, ge=0, le=65535)
    """Port of the WebSocket gateway; 0: any free one."""
    aws_port: int = Field(4566, ge=0, le=65535)
    """Port of the AWS services; 0: any free one."""
    token: str = Field("local", min_length=1)
    """Token that opens the gateway."""
    mode: Literal["auto", "stream", "buffered"] = "auto"
    """How the relay calls the endpoint."""
    serverless: bool = False
    """Behave like a serverless endpoint: no streaming, 4 MB."""
    flush_ms: int = Field(0, ge=0, le=10_000)
    """Milliseconds of tokens sent as one message; 0: one message per token."""


@dataclass
class GatewayConnection:
    """A connection that the gateway holds."""

    id: str
    socket: Any
    authorizer: dict[str, Any]
    headers: dict[str, str]
    connected: float = field(default_factory=time.time)
    active: float = field(default_factory=time.monotonic)


@dataclass
class Quotas:
    """API Gateway's limits, in seconds and requests a second; tests shorten them."""

    integration: float = 29.0
    idle: float = 600.0
    duration: float = 7200.0
    rate: float = 100.0
    burst: float = 200.0


class Gateway:
    """The WebSocket API."""

    def __init__(self, functions: LambdaRuntime, quotas: Quotas, domain: str = ""):
        self.functions, self.quotas, self.domain = functions, quotas, domain
        self.open: dict[str, GatewayConnection] = {}
        self.allowance, self.counted = quotas.burst, time.monotonic()
        self.tasks: set[asyncio.Task[None]] = set()

    def throttled(self) -> bool:
        """Take one request from the stage's token bucket; True if it is empty."""
        now = time.monotonic()
        self.allowance = min(self.quotas.burst, self.allowance + (now - self.counted) * self.quotas.rate)
        self.counted = now
        if self.allowance < 1:
            return True
        self.allowance -= 1
        return False

    def event(
        self, line: GatewayConnection, route: str, kind: str, body: str | None = None, coded: bool = False
    ) -> dict[str, Any]:
        context = {
            "routeKey": route,
            "eventType": kind,
            "connectionId": line.id,
            "domainName": self.domain,
            "stage": STAGE,
            "apiId": "local",
            "requestId": secrets.token_urlsafe(11),
            "messageId": secrets.token_urlsafe(11) if kind == "MESSAGE" else None,
            "connectedAt": int(line.connected * 1000),
            "requestTimeEpoch": int(time.time() * 1000),
            "identity": {"sourceIp": "127.0.0.1", "userAgent": line.headers.get("User-Agent", "")},
            "authorizer": line.authorizer,
        }
        return {"requestContext": context, "body": body, "isBase64Encoded": coded}

    async def admit(self, connection: Any, request: Any) -> Any:
        """Authorizer and `$connect`, before the handshake is answered; None lets the client in."""
        place = urlsplit(request.path)
        query = dict(parse_qsl(place.query))
        if place.path.strip("/") != STAGE:
            return connection.respond(403, '{"message":"Forbidden"}')
        if self.throttled():
            return connection.respond(429, '{"message":"Too Many Requests"}')
        connection_id = base64.urlsafe_b64encode(secrets.token_bytes(11)).decode()
        line = GatewayConnection(connection_id, connection, {}, dict(request.headers.raw_items()))
        event = self.event(line, "$connect", "CONNECT")
        event |= {"headers": line.headers, "queryStringParameters": query or None}
        request_event = {**event, "type": "REQUEST", "methodArn": f"{ARN}/{STAGE}/$connect"}
        try:
            verdict = await asyncio.wait_for(
                self.functions.invoke("authorizer", request_event), self.quotas.integration
            )
        except Exception as error:
            status = 401 if str(error) == "Unauthorized" else 500
            return connection.respond(status, '{"message":"Unauthorized"}')
        if verdict["policyDocument"]["Statement"][0]["Effect"] != "Allow":
            return connection.respond(403, '{"Message":"User is not authorized to access this resource"}')
        known = {name: str(value) for name, value in verdict.get("context", {}).items()}
        line.authorizer = {**known, "principalId": verdict["principalId"]}
        event["requestContext"]["authorizer"] = line.authorizer
        try:
            answer = await asyncio.wait_for(self.functions.invoke("router", event), self.quotas.integration)
        except Exception:
            return connection.respond(502, '{"message":"Internal server error"}')
        if answer.get("statusCode") != 200:
            return connection.respond(answer.get("statusCode", 502), '{"message":"refused"}')
        connection.line = line
        return None

    async def serve(self, connection: Any) -> None:
        """One admitted connection until it closes."""
        line: GatewayConnection = connection.line
        self.open[line.id] = line
        watch = asyncio.ensure_future(self._watch(line))
        try:
            async for message in connection:
                line.active = time.monotonic()
                task = asyncio.ensure_future(self._message(line, message))
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)
        except Exception as error:
            print(f"[gateway] {line.id} closed: {type(error).__name__}", file=sys.stderr)
        finally:
            watch.cancel()
            del self.open[line.id]
            with contextlib.suppress(Exception):
                await self.functions.invoke("router", self.event(line, "$disconnect", "DISCONNECT"))

    async def _watch(self, line: GatewayConnection) -> None:
        began = time.monotonic()
        while True:
            now = time.monotonic()
            left = min(line.active + self.quotas.idle, began + self.quotas.duration) - now
            if left <= 0:
                await line.socket.close(1001, "Going away")
                return
            await asyncio.sleep(left)

    async def _message(self, line: GatewayConnection, message: str | bytes) -> None:
        coded = isinstance(message, bytes)
        body = base64.b64encode(message).decode() if isinstance(message, bytes) else message
        event = self.event(line, route_of(body), "MESSAGE", body, coded)
        said = ""
        if self.throttled():
            said = "Too Many Requests"
        else:
            try:
                await asyncio.wait_for(self.functions.invoke("router", event), self.quotas.integration)
            except TimeoutError:
                said = "Endpoint request timed out"
            except Exception:
                said = "Internal server error"
        if said:
            ids = {"connectionId": line.id, "requestId": event["requestContext"]["requestId"]}
            await self.send(line.id, json.dumps({"message": said, **ids}).encode())

    async def send(self, connection_id: str, data: bytes) -> bool:
        """Deliver one message; False if the connection is closed."""
        import websockets

        line = self.open.get(connection_id)
        if line is None:
            return False
        try:
            await line.socket.send(data.decode("utf-8", "replace"))
        except websockets.ConnectionClosed:
            return False
        line.active = time.monotonic()
        return True

    async def close(self, connection_id: str) -> bool:
        line = self.open.get(connection_id)
        if line is not None:
            await line.socket.close(1000)
        return line is not None

    def describe(self, connection_id: str) -> dict[str, Any] | None:
        line = self.open.get(connection_id)
        if line is None:
            return None
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(line.connected))
        seen = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - (time.monotonic() - line.active)))
        identity = {"sourceIp": "127.0.0.1", "userAgent": line.headers.get("User-Agent", "")}
        return {"connectedAt": when, "lastActiveAt": seen, "identity": identity}


def route_of(body: str) -> str:
    """`$request.body.action`, or `$default` where that names no route."""
    try:
        action = json.loads(body)["action"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return "$default"
    return action if isinstance(action, str) and action in ROUTES and action[0] != "$" else "$default"


def load_handlers(name: str = "relay") -> ModuleType:
    """A fresh copy of `relay.py` or `writer.py` and the modules it imports from this folder, as in a new environment."""
    for known in ("limits", "wire", "endpoint", "relay", "writer"):
        sys.modules.pop(known, None)
    return importlib.import_module(name)


class Stack:
    """Everything in one background thread. Use as a context manager; `.url` is what clients connect to.

    `handlers` replaces the functions (name -> handler), `environment` adds to or overrides the functions' variables,
    which are this process's while the stack runs.
    """

    def __init__(
        self,
        container: str,
        *,
        token: str = "local",
        port: int = 0,
        aws_port: int = 0,
        serverless: bool = False,
        environment: dict[str, str] | None = None,
        handlers: dict[str, Handler] | None = None,
        timeouts: dict[str, float] | None = None,
        quotas: Quotas | None = None,
        in_lambda: Path | None = None,
        workers: int = 50,
    ):
        self.in_lambda, self.workers = in_lambda, workers
        self.tables = {"requests": Table("connection_id", "request_id"), "tokens": Table("id")}
        self.admit(token, "local")
        self.token, self.port = token, port
        self.endpoint = Endpoint(container, serverless=serverless)
        self.faults = Faults()
        self.quotas = quotas or Quotas()
        self._given, self._environment = handlers, environment or {}
        self._timeouts = {**TIMEOUTS, **(timeouts or {})}
        self._sockets = [socket.create_server(("127.0.0.1", aws_port))]
        self.aws_url = f"http://127.0.0.1:{self._sockets[0].getsockname()[1]}"
        self.environment = self._variables()
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._main, daemon=True, name="local-aws")

    def admit(self, token: str, name: str, **limits: int) -> None:
        """Let a token in, as `deploy_relay.py --new-token` does; `limits`: expires, daily."""
        digest = hashlib.sha256(token.encode()).hexdigest()
        given = {key: {"N": str(value)} for key, value in limits.items()}
        self.tables["tokens"].items[(digest,)] = {"id": {"S": digest}, "name": {"S": name}, **given}

    @property
    def function_url(self) -> str:
        """Where the model in Lambda answers plain HTTP."""
        return f"{self.aws_url}/url"

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/{STAGE}?token={self.token}"

    def _variables(self) -> dict[str, str]:
        services = ("SAGEMAKER_RUNTIME", "LAMBDA", "DYNAMODB")
        given = {f"AWS_ENDPOINT_URL_{service}": self.aws_url for service in services}
        given |= {
            "AWS_ENDPOINT_URL_APIGATEWAYMANAGEMENTAPI": f"{self.aws_url}/{STAGE}",
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
            "AWS_DEFAULT_REGION": "eu-west-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "ENDPOINT_NAME": self.endpoint.name,
            "ENDPOINT_MODE": "auto",
            "WORKER_FUNCTION": "worker",
            "TABLE_NAME": "requests",
            "TOKENS_TABLE": "tokens",
            "LIMITS_JSON": limits_json(),
            "MAX_TOKENS": "100000",  # the most that the template allows
            "MAX_SAMPLES": "128",
        }
        if self.in_lambda is not None:
            given["MODEL_FOLDER"] = str(self.in_lambda)
        return given | self._environment

    def __enter__(self) -> Stack:
        self._before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        respond = None
        if self._given is None:
            loaded = load_handlers("relay" if self.in_lambda is None else "writer")
            relay = sys.modules["relay"]
            self._given = {"authorizer": relay.authorizer, "router": relay.router, "worker": loaded.worker}
            respond = getattr(loaded, "respond", None)
            if self.in_lambda is not None:
                loaded.service()  # Lambda loads the model while it makes an environment, before the first request
        self.functions = LambdaRuntime(self._given, self._timeouts, {"worker": self.workers}, "router")
        self._respond = respond
        self.gateway = Gateway(self.functions, self.quotas)
        self._thread.start()
        self._ready.wait(30)
        if self._failure is not None:
            self.__exit__()
            raise RuntimeError(f"the local stack could not start: {self._failure}")
        return self

    def __exit__(self, *error: object) -> None:
        patience = time.monotonic() + 3
        while self.functions.running and time.monotonic() < patience:
            time.sleep(0.02)
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)
        self.functions.pool.shutdown(wait=False, cancel_futures=True)
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def _main(self) -> None:
        try:
            asyncio.run(self._run())
        except BaseException as error:
            self._failure = error
        finally:
            self._ready.set()

    async def _run(self) -> None:
        import uvicorn
        import websockets.asyncio.server as ws

        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()

        async def respond(event: dict[str, Any], start: Any) -> None:
            if self._respond is None:
                raise KeyError("only the model in Lambda has a function URL")
            answer = self._respond
            await self.functions.call("worker", lambda context: answer(event, context, start))

        services = Services(self.endpoint, self.functions.invoke, self.gateway, self.faults, self.tables, respond)
        app = application(services)
        settings = uvicorn.Config(app, log_level="critical", lifespan="off", ws="none", timeout_graceful_shutdown=1)
        server = uvicorn.Server(settings)
        serving = asyncio.ensure_future(server.serve(sockets=self._sockets))
        sizes = (MESSAGE_BYTES, FRAME_BYTES)
        async with ws.serve(
            self.gateway.serve,
            "127.0.0.1",
            self.port,
            process_request=self.gateway.admit,
            max_size=sizes,
            ping_interval=None,
            compression=None,
            close_timeout=2,
        ) as gate:
            self.port = next(iter(gate.sockets)).getsockname()[1]
            self.gateway.domain = f"127.0.0.1:{self.port}"
            while not server.started and not serving.done():
                await asyncio.sleep(0.01)
            self._ready.set()
            await self._stop.wait()
        server.should_exit = True
        await asyncio.wait([serving], timeout=5)
        if self.endpoint.lines is not None:
            await self.endpoint.lines.aclose()


@contextlib.contextmanager
def container(model: Path | None) -> Iterator[str]:
    """`api.py` on a free port as long as the block runs; RuntimeError if it ends before it answers `/ping`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(HERE.parent / "api.py"), "--port", str(port)]
    if model is not None:
        command += ["--model", str(model.resolve())]
    process = subprocess.Popen(command, cwd=HERE.parent)
    url = f"http://127.0.0.1:{port}"
    try:
        while not _answers(f"{url}/ping"):
            if process.poll() is not None:
                raise RuntimeError(f"api.py ended with code {process.returncode}: see its message above")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def main(argv: Sequence[str] | None = None) -> int:
    def body() -> int:
        flags = parse_flags(Flags, argv, examples=__doc__)
        if flags.container and not _answers(f"{flags.container}/ping"):
            raise ConfigError([f"--container {flags.container}: no answer from its /ping; start it first"])
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        with contextlib.ExitStack() as running:
            from checkpoint import find_model

            model = find_model(flags.model, HERE.parent) if flags.in_lambda else None
            url = "" if model else flags.container or running.enter_context(container(flags.model))
            stack = Stack(
                url,
                token=flags.token,
                port=flags.port,
                aws_port=flags.aws_port,
                serverless=flags.serverless,
                environment={"ENDPOINT_MODE": flags.mode, "FLUSH_MS": str(flags.flush_ms)},
                in_lambda=model,
                workers=flags.workers,
            )
            running.enter_context(stack)
            print(stack.url, flush=True)
            sys.stdout = sys.stderr  # what the functions log
            behind = f"model {model}, plain HTTP at {stack.function_url}" if model else f"container at {url}"
            print(f"AWS services at {stack.aws_url}, {behind}; Ctrl-C ends it", file=sys.stderr)
            stop.wait()
        return 0

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
