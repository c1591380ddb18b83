"""Runs the whole AWS path on one machine: gateway, functions, endpoint and table; handlers and boto3 are unmodified.

    python lambda/local_stack.py --model runs/sample/best          # starts api.py behind it
    python lambda/local_stack.py --container http://127.0.0.1:8080 # or uses a running one
    npx wscat -c 'ws://127.0.0.1:8765/prod?token=local'            # {"action":"generate","request_id":"1","prompt":"It"}

Emulated from API Gateway: routes by `$request.body.action`, the authorizer before `$connect`, 29 seconds for an
integration, frames of 32 KB and messages of 128 KB, 10 idle minutes, 2 hours at most, throttling, and the answers 400,
410, 413 and 429 of `@connections`. The handlers learn its addresses from the usual AWS_ENDPOINT_URL variables.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import hashlib
import importlib.util
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
import uuid
from collections.abc import Callable, Iterator, Sequence
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
from local_aws import MESSAGE_BYTES, Endpoint, Faults, application  # noqa: E402

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
    """Model folder for api.py; default: the newest run's, otherwise the newest under models/."""
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
class Context:
    """What Lambda gives a handler besides the event."""

    function_name: str
    timeout: float
    aws_request_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    memory_limit_in_mb: int = 256
    began: float = field(default_factory=time.monotonic)

    @property
    def invoked_function_arn(self) -> str:
        return f"arn:aws:lambda:eu-west-1:000000000000:function:{self.function_name}"

    def get_remaining_time_in_millis(self) -> int:
        return max(0, round((self.timeout - (time.monotonic() - self.began)) * 1000))


Handler = Callable[[dict[str, Any], Any], Any]


class LambdaRuntime:
    """Lambda: handlers in threads, each event and answer through JSON."""

    def __init__(self, handlers: dict[str, Handler], timeouts: dict[str, float]):
        self.handlers, self.timeouts = handlers, timeouts
        self.pool = concurrent.futures.ThreadPoolExecutor(200, "lambda")
        self.results: list[tuple[str, Any]] = []
        self.running: set[str] = set()

    def _run(self, name: str, event: dict[str, Any]) -> Any:
        context = Context(name, self.timeouts[name])
        self.running.add(context.aws_request_id)
        try:
            result = json.loads(json.dumps(self.handlers[name](json.loads(json.dumps(event)), context)))
        except Exception as error:
            self.results.append((name, error))
            print(f"[{name}] {type(error).__name__}: {error}", file=sys.stderr)
            raise
        finally:
            self.running.discard(context.aws_request_id)
        self.results.append((name, result))
        return result

    async def invoke(self, name: str, event: dict[str, Any], wait: bool = True) -> Any:
        """Run a function; KeyError if there is none of this name. With wait=False errors are ignored
        (asynchronous invocation)."""
        if name not in self.handlers:
            raise KeyError(name)
        future = asyncio.get_running_loop().run_in_executor(self.pool, self._run, name, event)
        if wait:
            return await future
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        return None


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
        line.authorizer = {**verdict.get("context", {}), "principalId": verdict["principalId"]}
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


def load_relay() -> ModuleType:
    """A fresh copy of `relay.py` and the two modules it imports, as in a new Lambda environment."""
    for name in ("limits", "wire"):
        sys.modules.pop(name, None)
    found = importlib.util.spec_from_file_location("relay", HERE / "relay.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


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
    ):
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
            "LIMITS_JSON": limits_json(),
            "MAX_TOKENS": "100000",  # the most that the template allows
            "MAX_SAMPLES": "128",
            "TOKENS": f"local:{hashlib.sha256(self.token.encode()).hexdigest()}",
        }
        return given | self._environment

    def __enter__(self) -> Stack:
        self._before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        if self._given is None:
            relay = load_relay()
            self._given = {name: getattr(relay, name) for name in TIMEOUTS}
        self.functions = LambdaRuntime(self._given, self._timeouts)
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
        app = application(self.endpoint, self.functions.invoke, self.gateway, self.faults)
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
        flags = parse_flags(Flags, argv)
        if flags.container and not _answers(f"{flags.container}/ping"):
            raise ConfigError([f"--container {flags.container}: no answer from its /ping; start it first"])
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        with contextlib.ExitStack() as running:
            url = flags.container or running.enter_context(container(flags.model))
            stack = Stack(
                url,
                token=flags.token,
                port=flags.port,
                aws_port=flags.aws_port,
                serverless=flags.serverless,
                environment={"ENDPOINT_MODE": flags.mode, "FLUSH_MS": str(flags.flush_ms)},
            )
            running.enter_context(stack)
            print(stack.url, flush=True)
            sys.stdout = sys.stderr  # what the functions log
            print(f"AWS services at {stack.aws_url}, container at {url}; Ctrl-C ends it", file=sys.stderr)
            stop.wait()
        return 0

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
