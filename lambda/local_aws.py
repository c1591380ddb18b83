"""The AWS services behind the relay, over HTTP on this machine: as much of each as the handlers and deployments use.

SageMaker runtime (whole answers and event streams) in front of a container, Lambda invocations, a DynamoDB table, and
the `@connections` interface of API Gateway. boto3 speaks to it as it does to AWS.

    app = application(Endpoint("http://127.0.0.1:8080"), invoke, connections, Faults())
    uvicorn.run(app, port=4566)      # then AWS_ENDPOINT_URL=http://127.0.0.1:4566
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

if TYPE_CHECKING:
    import httpx
MESSAGE_BYTES = 128 * 1024  # of one WebSocket message
EVENT_BYTES = 1024 * 1024  # of an asynchronous invocation's payload
INVOKE_SECONDS = 60.0  # that a whole answer may take
STREAM_SECONDS = 480.0  # that a streamed answer may take
URL_BYTES = 6 * 1024 * 1024  # of a request to a function URL
REALTIME_BYTES, SERVERLESS_BYTES = 25 * 1024 * 1024, 4 * 1024 * 1024


Responder = Callable[[dict[str, Any], Callable[[int, dict[str, str]], Callable[[bytes], None]]], Awaitable[None]]


@dataclass
class Faults:
    """What goes wrong on purpose, for tests."""

    throttle_posts: int = 0
    """This many posts are answered with 429."""
    bare_gone: bool = False
    """410 without the header that names the error, as older gateways send it."""
    corrupt_part: int = -1
    """This part of each stream carries a wrong checksum."""
    truncate_after: int = -1
    """The stream's line is cut after this many parts."""
    duplicate_events: bool = False
    """Each asynchronous invocation is delivered twice."""
    refuse_events: int = 0
    """This many asynchronous invocations are answered with 429."""


def frame(headers: dict[str, str], payload: bytes, corrupt: bool = False) -> bytes:
    """One message of the `application/vnd.amazon.eventstream` encoding: lengths, header checksum, string headers,
    payload, checksum of all before (all big-endian)."""
    coded = b"".join(
        struct.pack("!B", len(name)) + name.encode() + struct.pack("!BH", 7, len(value.encode())) + value.encode()
        for name, value in headers.items()
    )
    prelude = struct.pack("!II", 16 + len(coded) + len(payload), len(coded))
    body = prelude + struct.pack("!I", binascii.crc32(prelude)) + coded + payload
    return body + struct.pack("!I", binascii.crc32(body) ^ int(corrupt))


def part(data: bytes, corrupt: bool = False) -> bytes:
    """A PayloadPart event of a SageMaker response stream."""
    headers = {
        ":event-type": "PayloadPart",
        ":content-type": "application/octet-stream",
        ":message-type": "event",
    }
    return frame(headers, data, corrupt)


def failure(kind: str, message: str) -> bytes:
    """A ModelStreamError or InternalStreamFailure within a stream."""
    headers = {":exception-type": kind, ":content-type": "application/json", ":message-type": "exception"}
    return frame(headers, json.dumps({"Message": message, "ErrorCode": kind}).encode())


@dataclass
class Endpoint:
    """A SageMaker endpoint: its name, its container's address, and whether it is serverless (no streaming, 4 MB)."""

    container: str
    name: str = "victorian"
    serverless: bool = False
    lines: Any = field(default=None, repr=False)

    def upstream(self) -> httpx.AsyncClient:
        import httpx

        if self.lines is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
            self.lines = httpx.AsyncClient(base_url=self.container, limits=limits, timeout=INVOKE_SECONDS)
        return self.lines


class Connections(Protocol):
    """The gateway's side of `@connections`."""

    async def send(self, connection_id: str, data: bytes) -> bool: ...
    async def close(self, connection_id: str) -> bool: ...
    def describe(self, connection_id: str) -> dict[str, Any] | None: ...


class Table:
    """A DynamoDB table with the key attributes `keys` and the few expressions that the relay uses."""

    def __init__(self, *keys: str) -> None:
        self.keys = keys
        self.items: dict[tuple[str, ...], dict[str, Any]] = {}

    def call(self, operation: str, request: dict[str, Any]) -> dict[str, Any] | None:
        """The answer's body; None when the condition fails."""
        values = request.get("ExpressionAttributeValues", {})
        if operation == "Query":
            wanted = values[request["KeyConditionExpression"].split("=")[1].strip()]["S"]
            found = [item for key, item in self.items.items() if key[0] == wanted]
            found = [item for item in found if holds(request.get("FilterExpression", ""), item, values)]
            return {"Items": found, "Count": len(found)}
        source = request.get("Item") or request["Key"]
        key = tuple(source[name]["S"] for name in self.keys)
        if operation == "GetItem":
            return {"Item": self.items[key]} if key in self.items else {}
        if not holds(request.get("ConditionExpression", ""), self.items.get(key, {}), values):
            return None
        if operation == "PutItem":
            self.items[key] = request["Item"]
        elif operation == "UpdateItem":
            item = self.items.setdefault(key, dict(request["Key"]))
            for name, value in re.findall(r"(\w+) = (:\w+)", request["UpdateExpression"]):
                item[name] = values[value]
            for name, value in re.findall(r"ADD (\w+) (:\w+)", request["UpdateExpression"]):
                before = int(item.get(name, {"N": "0"})["N"])
                item[name] = {"N": str(before + int(values[value]["N"]))}
        else:
            raise KeyError(operation)
        return {}


def holds(condition: str, item: dict[str, Any], values: dict[str, Any]) -> bool:
    """Whether one of the conjunctions, separated by OR, of `attribute_exists(a)`, `attribute_not_exists(a)`, `a > :v` and
    `a <= :v` is true."""
    return any(_all_hold(part, item, values) for part in condition.split(" OR "))


def _all_hold(condition: str, item: dict[str, Any], values: dict[str, Any]) -> bool:
    for term in filter(None, condition.split(" AND ")):
        exists = re.fullmatch(r"attribute_(not_)?exists\((\w+)\)", term)
        if exists:
            if (exists[2] in item) == bool(exists[1]):
                return False
            continue
        name, sign, value = term.split(" ")
        if name not in item:
            return False
        found, bound = int(item[name]["N"]), int(values[value]["N"])
        if not (found > bound if sign == ">" else found <= bound):
            return False
    return True


def fault(status: int, kind: str, message: str, bare: bool = False, **more: Any) -> Response:
    """An AWS error: the class in a header, the message in the body."""
    headers = {} if bare else {"x-amzn-ErrorType": kind}
    return JSONResponse({"Message": message, "message": message, **more}, status, headers)


@dataclass
class Services:
    """The services' handlers. `invoke(function, event, wait)` runs a Lambda function."""

    endpoint: Endpoint
    invoke: Callable[[str, dict[str, Any], bool], Awaitable[Any]]
    connections: Connections
    faults: Faults
    tables: dict[str, Table] = field(default_factory=dict)
    respond: Responder | None = None

    async def dynamodb(self, request: Request) -> Response:
        """DynamoDB: one operation on the table."""
        operation = request.headers.get("x-amz-target", "").rpartition(".")[2]
        asked = await request.json()
        answer = self.tables[asked["TableName"]].call(operation, asked)
        if answer is None:
            kind = "com.amazonaws.dynamodb.v20120810#ConditionalCheckFailedException"
            return JSONResponse({"__type": kind, "message": "The conditional request failed"}, 400)
        return JSONResponse(answer, media_type="application/x-amz-json-1.0")

    async def invoke_function(self, request: Request) -> Response:
        """Lambda's Invoke, synchronous or as an event."""
        body = await request.body()
        event = request.headers.get("x-amz-invocation-type", "RequestResponse") == "Event"
        if event and len(body) > EVENT_BYTES:
            return fault(413, "RequestTooLargeException", "Request must be smaller than 1048576 bytes")
        if event and self.faults.refuse_events > 0:
            self.faults.refuse_events -= 1
            return fault(429, "TooManyRequestsException", "Rate Exceeded.")
        name = request.path_params["name"].rpartition(":")[2]
        try:
            for _ in range(2 if event and self.faults.duplicate_events else 1):
                result = await self.invoke(name, json.loads(body or b"{}"), not event)
        except KeyError:
            return fault(404, "ResourceNotFoundException", f"Function not found: {name}")
        return Response(status_code=202) if event else JSONResponse(result)

    async def function_url(self, request: Request) -> Response:
        """A function URL in the mode RESPONSE_STREAM: what the function sends, as it sends it.

        A client that hangs up is not told to the function, as on AWS.
        """
        body = await request.body()
        if len(body) > URL_BYTES:
            return fault(413, "RequestTooLargeException", "Request must be smaller than 6291456 bytes")
        text, coded = body.decode("utf-8", "replace"), False
        if text.encode() != body or request.headers.get("content-type", "").startswith("application/octet"):
            text, coded = base64.b64encode(body).decode(), True
        path = f"/{request.path_params['path']}"
        event = {
            "version": "2.0",
            "rawPath": path,
            "headers": dict(request.headers),
            "requestContext": {"http": {"method": request.method, "path": path, "sourceIp": "127.0.0.1"}},
            "body": text,
            "isBase64Encoded": coded,
        }
        assert self.respond is not None
        loop, parts = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def put(item: Any) -> None:
            loop.call_soon_threadsafe(parts.put_nowait, item)

        def start(status: int, headers: dict[str, str]) -> Callable[[bytes], None]:
            put((status, headers))
            return put

        running = asyncio.ensure_future(self.respond(event, start))
        running.add_done_callback(lambda done: parts.put_nowait(None))
        first = await parts.get()
        if first is None:
            throttled = isinstance(running.exception(), BlockingIOError)
            return fault(429, "TooManyRequestsException", "Rate Exceeded.") if throttled else Response("Internal Server Error", 502)  # fmt: skip

        async def rest() -> AsyncIterator[bytes]:
            while (part := await parts.get()) is not None:
                yield part

        return StreamingResponse(rest(), first[0], first[1])

    async def post_to_connection(self, request: Request) -> Response:
        """`@connections`: a message to a WebSocket."""
        connection_id, data = request.path_params["id"], await request.body()
        wrong = self.unknown(connection_id)
        if wrong:
            return wrong
        if self.faults.throttle_posts > 0:
            self.faults.throttle_posts -= 1
            return fault(429, "LimitExceededException", "Too Many Requests")
        if len(data) > MESSAGE_BYTES:
            return fault(413, "PayloadTooLargeException", "The data has exceeded the maximum size allowed.")
        if not await self.connections.send(connection_id, data):
            return fault(410, "GoneException", "Gone", self.faults.bare_gone)
        return Response(status_code=200)

    async def describe_connection(self, request: Request) -> Response:
        """`@connections`: what is known of a WebSocket."""
        wrong = self.unknown(request.path_params["id"])
        return wrong or JSONResponse(self.connections.describe(request.path_params["id"]))

    async def close_connection(self, request: Request) -> Response:
        """`@connections`: close a WebSocket."""
        wrong = self.unknown(request.path_params["id"])
        if not wrong:
            await self.connections.close(request.path_params["id"])
        return wrong or Response(status_code=204)

    def unknown(self, connection_id: str) -> Response | None:
        """The error for an unknown connection id, or None."""
        if not re.fullmatch(r"[\w-]{15}=", connection_id):
            return fault(400, "BadRequestException", "Invalid connectionId: " + connection_id[:64])
        if self.connections.describe(connection_id) is None:
            return fault(410, "GoneException", "Gone", self.faults.bare_gone)
        return None

    def refused(self, request: Request, body: bytes) -> Response | None:
        """The error for a body that the endpoint refuses, or None."""
        name = request.path_params["name"]
        if name != self.endpoint.name:
            return fault(400, "ValidationError", f"Endpoint {name} of account 000000000000 not found.")
        limit = SERVERLESS_BYTES if self.endpoint.serverless else REALTIME_BYTES
        if len(body) > limit:
            return fault(400, "ValidationError", f"Body has {len(body)} bytes, the limit is {limit}")
        return None

    async def invoke_endpoint(self, request: Request) -> Response:
        """SageMaker's InvokeEndpoint: the whole answer."""
        import httpx

        body = await request.body()
        wrong = self.refused(request, body)
        if wrong:
            return wrong
        try:
            answer = await self.endpoint.upstream().post(
                "/invocations", content=body, headers=forwarded_headers(request)
            )
        except httpx.TimeoutException:
            return model_error(0, "Your invocation timed out while waiting for a response from container primary")
        except httpx.TransportError:
            return model_error(0, "could not reach the container")
        if answer.status_code >= 400:
            return model_error(answer.status_code, answer.text)
        return Response(answer.content, 200, {"Content-Type": answer.headers.get("content-type", "application/json")})

    async def invoke_endpoint_streamed(self, request: Request) -> Response:
        """SageMaker's InvokeEndpointWithResponseStream: the answer as an event stream."""
        import httpx

        body = await request.body()
        wrong = self.refused(request, body)
        if wrong:
            return wrong
        if self.endpoint.serverless:
            return fault(400, "ValidationError", f"Endpoint {self.endpoint.name} does not support response streaming.")
        upstream = self.endpoint.upstream()
        asked = upstream.build_request(
            "POST", "/invocations", content=body, headers=forwarded_headers(request), timeout=STREAM_SECONDS
        )
        try:
            answer = await upstream.send(asked, stream=True)
        except httpx.TransportError:
            return model_error(0, "could not reach the container")
        if answer.status_code >= 400:
            text = (await answer.aread()).decode("utf-8", "replace")
            await answer.aclose()
            return model_error(answer.status_code, text)
        headers = {
            "X-Amzn-SageMaker-Content-Type": answer.headers.get("content-type", "application/octet-stream"),
            "x-Amzn-Invoked-Production-Variant": "primary",
        }
        return StreamingResponse(
            parts(answer, self.faults), 200, headers, media_type="application/vnd.amazon.eventstream"
        )


def model_error(status: int, text: str) -> Response:
    """SageMaker's error for the container's error response, or for none."""
    message = f'Received client error ({status}) from primary with message "{text}".'
    more: dict[str, Any] = {
        "OriginalStatusCode": status,
        "OriginalMessage": text,
        "LogStreamArn": "arn:aws:logs:local",
    }
    return fault(424, "ModelError", message, **more)


def application(services: Services) -> Starlette:
    """The services as one ASGI application."""
    connection, model = "/{stage}/@connections/{id}", "/endpoints/{name}"
    routes = [
        Route("/", services.dynamodb, methods=["POST"]),
        Route("/2015-03-31/functions/{name}/invocations", services.invoke_function, methods=["POST"]),
        Route(f"{model}/invocations", services.invoke_endpoint, methods=["POST"]),
        Route(f"{model}/invocations-response-stream", services.invoke_endpoint_streamed, methods=["POST"]),
        Route("/url/{path:path}", services.function_url, methods=["GET", "POST", "OPTIONS"]),
        Route(connection, services.post_to_connection, methods=["POST"]),
        Route(connection, services.describe_connection, methods=["GET"]),
        Route(connection, services.close_connection, methods=["DELETE"]),
    ]
    return Starlette(routes=routes)


def forwarded_headers(request: Request) -> dict[str, str]:
    """The headers of a request that reach the container."""
    accept = request.headers.get("x-amzn-sagemaker-accept") or request.headers.get("accept") or "*/*"
    return {"Content-Type": request.headers.get("content-type", "application/json"), "Accept": accept}


async def parts(answer: httpx.Response, faults: Faults) -> AsyncIterator[bytes]:
    """The container's chunks as events; closing it closes the connection to the container."""
    import httpx

    count = 0
    try:
        async for chunk in answer.aiter_raw():
            if count == faults.truncate_after:
                raise ConnectionAbortedError("cut on purpose")
            yield part(chunk, corrupt=count == faults.corrupt_part)
            count += 1
    except httpx.TransportError as error:
        yield failure("ModelStreamError", f"The container broke off: {type(error).__name__}")
    finally:
        await answer.aclose()
