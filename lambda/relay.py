"""Relays between a WebSocket API and a SageMaker endpoint: three Lambda handlers that need only the runtime's boto3.

`relay.authorizer` admits a connection by its token. `relay.router` answers every route within milliseconds and hands
`generate` and `settings` to `relay.worker` by asynchronous invocation, because API Gateway waits 29 seconds and a story
or a cold model takes longer.
The worker posts the endpoint's messages to the connection, one token each, until the text is complete or the client has disconnected.

    python lambda/local_stack.py --model runs/sample/best     # these handlers, unmodified, on one machine
    make aws-deploy                                           # and on AWS
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import endpoint
from limits import InvalidRequest, Message, described, identity, longest, parse, validate
from wire import (
    POST_CHARACTERS,
    Access,
    Connection,
    ConnectionClosed,
    RelaySettings,
    RequestTable,
    TokenTable,
    client,
    management,
)

INBOX = 64  # messages read ahead of posting; when it is full, reading pauses
MARGIN_S = 3.0  # reserved before the function's timeout for the last message


def log(event: str, **values: Any) -> None:
    """Write one JSON line to the function's log. Prompts and texts are never logged."""
    print(json.dumps({"event": event, **values}), flush=True)


def where(error: BaseException) -> str:
    """An exception's class and line; its message may quote the request and stays out of the log."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{type(error).__name__} at line {trace.tb_lineno if trace else '?'}"


def authorizer(event: Message, context: Any) -> Message:
    """Allow or deny `$connect`. A token counts until it expires, and nobody gets in without one.

    It comes as `?token=`, because a browser cannot set headers on a WebSocket, or as `Authorization: Bearer`. With
    ALLOWED_ORIGINS a browser's page must come from one of them. What the token's owner may do goes into the context,
    which API Gateway adds to each later event of the connection.
    """
    headers = {key.lower(): value for key, value in (event.get("headers") or {}).items()}
    query = event.get("queryStringParameters") or {}
    token = query.get("token") or bearer(headers)
    access = TokenTable(RelaySettings.read()).find(token) if token else None
    if access is not None and not origin_allowed(headers.get("origin")):
        access = None
    if access is None:
        log("denied", origin="origin" in headers, token=bool(token))
    statement = {
        "Action": "execute-api:Invoke",
        "Effect": "Allow" if access else "Deny",
        "Resource": event["methodArn"],
    }
    return {
        "principalId": access.name if access else "nobody",
        "policyDocument": {"Version": "2012-10-17", "Statement": [statement]},
        "context": access.context() if access else {},
    }


def bearer(headers: dict[str, str]) -> str:
    """The token of an Authorization header."""
    given = headers.get("authorization", "")
    return given[7:] if given[:7].lower() == "bearer " else ""


def origin_allowed(origin: str | None) -> bool:
    """Whether a page of this origin may connect; without ALLOWED_ORIGINS, and for what is no browser, yes."""
    allowed = os.environ.get("ALLOWED_ORIGINS", "").replace(" ", "")
    return not allowed or not origin or origin in allowed.split(",")


def router(event: Message, context: Any) -> Message:
    """Every route of the WebSocket API. Answers go to the connection; the return value is only the route's status.

    Also the destination of the worker's events that could not be run.
    """
    if "requestPayload" in event:
        return undelivered(event)
    route = event["requestContext"]["routeKey"]
    if route == "$connect":
        return {"statusCode": 200}
    settings = RelaySettings.read()
    connection = Connection(management(event, settings), event["requestContext"]["connectionId"])
    requests = RequestTable(settings, connection.id)
    if route == "$disconnect":
        for request_id in requests.active():
            requests.request_stop(request_id)
        return {"statusCode": 200}
    message: Message = {}
    try:
        try:
            message = parse(event.get("body"))
            access = Access.of(event["requestContext"].get("authorizer") or {})
            _route(route, message, connection, requests, access)
        except InvalidRequest as refused:
            log("refused", route=route, code=refused.error["code"], param=refused.error["param"])
            connection.post(_error(message.get("request_id"), refused.error))
        except ConnectionClosed:
            raise
        except Exception as error:
            log("failed", route=route, error=where(error))
            unavailable = InvalidRequest(
                "the gateway could not take the request: try again", code="unavailable", type="unavailable_error"
            )
            connection.post(_error(message.get("request_id"), unavailable.error))
    except ConnectionClosed:
        log("gone", route=route)
    return {"statusCode": 200}


def _error(request_id: Any, error: Message) -> Message:
    return {"type": "error", "request_id": request_id if isinstance(request_id, str) else None, "error": error}


def undelivered(event: Message) -> Message:
    """Tell a client that its text will not be written: Lambda had no place for the worker in time, or the worker died.

    The event is Lambda's record for an on-failure destination
    (https://docs.aws.amazon.com/lambda/latest/dg/invocation-async-retain-records.html).
    """
    job, condition = event["requestPayload"], event["requestContext"].get("condition", "")
    if job.get("action") == "settings":
        return describe(job, lambda settings: None)
    connection = Connection(job["management"], job["connection_id"])
    requests = RequestTable(RelaySettings.read(), connection.id)
    log("undelivered", condition=condition)
    if not requests.end(job["request_id"]):
        return {"outcome": "ended before"}
    settle(requests.settings, job, 0)
    if condition == "EventAgeExceeded":
        error = InvalidRequest(
            "all writers are busy: try again in a minute", code="unavailable", type="unavailable_error"
        ).error
    else:
        error = InvalidRequest("the writer failed: try again", code="endpoint_failed", type="server_error").error
    with contextlib.suppress(ConnectionClosed):
        connection.post(_error(job["request_id"], error))
    return {"outcome": condition}


def admitted(message: Message, requests: RequestTable, access: Access) -> Message:
    """The checked request of a `generate` message, registered, its tokens taken from the day's allowance."""
    settings = requests.settings
    if access.expired:  # on a connection that was opened before; a text that has begun is written to its end
        raise InvalidRequest("this connection's token has expired: connect with a new one", code="unauthorized")
    request_id = identity(message)
    request = validate(message, settings.max_tokens, settings.max_samples, settings.max_prompt_bytes)
    if len(requests.active()) >= settings.max_active:
        raise InvalidRequest(
            f"{settings.max_active} generations already run on this connection: wait for one to end",
            code="too_many_requests",
            type="rate_limit_error",
        )
    if not requests.register(request_id):
        raise InvalidRequest(
            "request_id was used before: choose a new one", param="request_id", code="duplicate_request"
        )
    amount = longest(request) * request.get("n", 1)
    day = TokenTable(settings).spend(access, amount)
    if day is None:
        requests.end(request_id)
        raise InvalidRequest(
            f"{amount} tokens are more than is left of today's {access.daily}: ask for fewer, or come back tomorrow (UTC)",
            code="allowance_exceeded",
            type="rate_limit_error",
        )
    return {"request_id": request_id, "request": request, "reserved": [access.id, day, amount]}


def settle(settings: RelaySettings, job: Message, used: int) -> None:
    """Give back what a text did not use of the tokens that were taken for it."""
    access, day, amount = job.get("reserved") or ("", "", 0)
    if day:
        TokenTable(settings).give_back(access, day, max(0, amount - used))


def _route(route: str, message: Message, connection: Connection, requests: RequestTable, access: Access) -> None:
    settings = requests.settings
    if route == "ping":
        connection.post({"type": "pong"})
    elif message.get("action") == "settings":  # comes by $default
        if access.expired:
            raise InvalidRequest("this connection's token has expired: connect with a new one", code="unauthorized")
        invoke_worker(
            settings, {"action": "settings", "connection_id": connection.id, "management": connection.endpoint}
        )
    elif route == "stop":
        if not requests.request_stop(identity(message)):
            raise InvalidRequest("no such request on this connection", param="request_id", code="unknown_request")
    elif route == "generate":
        message.setdefault("request_id", uuid.uuid4().hex)
        job = {
            "connection_id": connection.id, "management": connection.endpoint, **admitted(message, requests, access)
        }  # fmt: skip
        try:
            connection.post({"type": "queued", "request_id": job["request_id"]})
            invoke_worker(settings, job)
        except Exception:
            requests.end(job["request_id"])
            settle(settings, job, 0)
            raise
    else:
        raise InvalidRequest(
            "unknown action: send generate, settings, stop or ping", param="action", code="unknown_action"
        )


def invoke_worker(settings: RelaySettings, job: Message) -> None:
    """Hand a job to the worker, which may have to start first."""
    client("lambda", None, 2).invoke(
        FunctionName=settings.worker, InvocationType="Event", Payload=json.dumps(job).encode()
    )


class Reader(threading.Thread):
    """Reads the endpoint in a thread, so that posting can keep its timeouts."""

    def __init__(self, read: Callable[[Reader], Iterable[Message]]):
        super().__init__(daemon=True)
        self.inbox: queue.Queue[Message | Exception | None] = queue.Queue(INBOX)
        self.stopping = threading.Event()
        self.body: Any = None
        self.cancel: Callable[[], None] = lambda: None
        self._read = read

    def run(self) -> None:
        last: Exception | None = None
        try:
            for message in self._read(self):
                if not self._put(message):
                    break
        except Exception as error:
            last = error
        finally:
            if self.body is not None:
                with contextlib.suppress(Exception):
                    self.body.close()
            self._put(last)

    def _put(self, item: Message | Exception | None) -> bool:
        while not self.stopping.is_set():
            try:
                self.inbox.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def stop(self) -> None:
        """Stop the endpoint's generation: close the connection even while a read is waiting."""
        self.stopping.set()
        self.cancel()
        stream = getattr(self.body, "_raw_stream", None)
        line = getattr(getattr(stream, "connection", None), "sock", None)
        if isinstance(line, socket.socket):
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
        self.join(timeout=1.0)


class Relay:
    """Relays one generation from the endpoint to one connection."""

    def __init__(
        self, settings: RelaySettings, connection: Connection, requests: RequestTable, request_id: str, seconds: float
    ):
        self.settings, self.connection, self.requests, self.request_id = settings, connection, requests, request_id
        self.began = self.flushed = self.heard = self.polled = time.monotonic()
        self.deadline = self.began + seconds
        self.seq = self.tokens = 0
        self.prompt_tokens: int | None = None
        self.first: float | None = None
        self.pending: dict[int, Message] = {}

    def post(self, message: Message) -> None:
        self.connection.post({**message, "request_id": self.request_id})

    def token(self, message: Message) -> None:
        """Post a token or buffer it: the first is sent at once, later ones every FLUSH_MS."""
        self.tokens += 1
        if self.first is None:
            self.first = time.monotonic() - self.began
        index = message.get("index", 0)
        held = self.pending.get(index)
        if held is None:
            self.pending[index] = dict(message)
        else:
            held["text"] += message.get("text", "")
            held["count"] = held.get("count", 1) + 1
        long = len(self.pending[index].get("text", "")) >= POST_CHARACTERS
        if long or self.seq == 0 or time.monotonic() - self.flushed >= self.settings.flush_s:
            self.flush()

    def flush(self) -> None:
        for message in self.pending.values():
            self.post({**message, "seq": self.seq})
            self.seq += 1
        self.pending.clear()
        self.flushed = time.monotonic()

    def fail(self, error: Message) -> None:
        self.flush()
        self.post({"type": "error", "error": error})

    def run(self, reader: Reader) -> str:
        """Relay until the end; returns the outcome in one word. Raises ConnectionClosed."""
        reader.start()
        while True:
            now = time.monotonic()
            if now >= self.deadline:
                return self._cut(reader, "deadline")
            if now - self.polled >= self.settings.poll_s:
                self.polled = now
                if self._stop_requested():
                    return self._cut(reader, "cancelled")
            if reader.body is not None and now - self.heard >= self.settings.silence_s:
                self.fail(endpoint.explain(TimeoutError()))
                return "stalled"
            clocks = [self.deadline, self.polled + self.settings.poll_s]
            if self.pending:
                clocks.append(self.flushed + self.settings.flush_s)
            try:
                item = reader.inbox.get(timeout=max(0.001, min(clocks) - now))
            except queue.Empty:
                if self.pending and time.monotonic() - self.flushed >= self.settings.flush_s:
                    self.flush()
                continue
            self.heard = time.monotonic()
            if isinstance(item, Exception):
                log("endpoint", error=where(item), code=getattr(item, "response", {}).get("Error", {}).get("Code"))
                self.fail(endpoint.explain(item))
                return "failed"
            if item is None:
                self.fail(endpoint.explain(ValueError()))
                return "failed"
            outcome = self._take(item)
            if outcome:
                return outcome

    def _cut(self, reader: Reader, reason: str) -> str:
        """Stop the generation on the relay's side."""
        reader.stop()
        self.flush()
        total = None if self.prompt_tokens is None else self.prompt_tokens + self.tokens
        usage = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens, "total_tokens": total}
        streamed = reader.body is not None
        self.post({"type": "complete", "finish_reason": reason, "usage": usage, "streamed": streamed})
        return reason

    def _take(self, message: Message) -> str | None:
        kind = message.get("type")
        if kind == "token":
            self.token(message)
        elif kind == "started":
            self.prompt_tokens = message.get("prompt_tokens")
            self.post(message)
        elif kind == "error":
            self.flush()
            self.post(message)
            return "failed"
        elif kind == "complete":
            self.flush()
            self.tokens = (message.get("usage") or {}).get("completion_tokens") or self.tokens
            self.post({"streamed": True, **message})
            return "complete"
        return None

    def _stop_requested(self) -> bool:
        try:
            return self.requests.stop_requested(self.request_id)
        except Exception as error:
            log("poll", error=where(error))
            return False


def worker(event: Message, context: Any) -> Message:
    """Handle one generation, described by the router's `event`. A second delivery of it does nothing."""
    if event.get("action") == "settings":
        return describe(event, endpoint.description)
    return work(event, context, endpoint.messages)


def describe(event: Message, source: Callable[[RelaySettings], Message | None]) -> Message:
    """Tell a connection the model and its settings as `source` describes them, or this gateway's where it cannot say."""
    settings = RelaySettings.read()
    try:
        own = source(settings)
    except Exception as error:
        log("description", error=where(error))
        own = None
    message = {"type": "settings", **described(own, settings.max_tokens, settings.max_samples)}
    with contextlib.suppress(ConnectionClosed):
        Connection(event["management"], event["connection_id"]).post(message)
    return {"outcome": "described", "model": own is not None}


Source = Callable[[RelaySettings, Message, str, Reader], Iterable[Message]]


def work(event: Message, context: Any, source: Source, connection: Connection | None = None) -> Message:
    """Post what `source` writes to the connection of the event, or to another one, and keep the request's books."""
    settings = RelaySettings.read()
    request_id = event["request_id"]
    connection = connection or Connection(event["management"], event["connection_id"])
    requests = RequestTable(settings, connection.id)
    if not requests.start(request_id):
        log("duplicate", aws_request=context.aws_request_id)
        return {"outcome": "duplicate"}
    trace = uuid.uuid4().hex  # clients choose their request_id; the container's must be unique
    seconds = max(0.0, context.get_remaining_time_in_millis() / 1000 - MARGIN_S)
    relay = Relay(settings, connection, requests, request_id, seconds)
    reader = Reader(lambda reader: source(settings, event["request"], trace, reader))
    outcome = "failed"
    try:
        outcome = relay.run(reader)
    except ConnectionClosed:
        outcome = "gone"
    except Exception as error:
        log("relay", error=where(error), trace=trace)
    finally:
        reader.stop()
        measure(relay, outcome, settings.endpoint, context.aws_request_id, trace, event["request"])
        try:
            if requests.end(request_id):
                settle(settings, event, relay.tokens)
        except Exception as error:
            log("request_table", error=where(error), trace=trace)
    return {"outcome": outcome, "tokens": relay.tokens}


def measure(relay: Relay, outcome: str, name: str, aws_request: str, trace: str, request: Message) -> None:
    """Log one line in CloudWatch's embedded metric format, from which CloudWatch extracts the metrics."""
    values: Message = {
        "Requests": 1,
        "Failed": int(outcome in ("failed", "stalled")),
        "Gone": int(outcome == "gone"),
        "Tokens": relay.tokens,
        "Duration": round((time.monotonic() - relay.began) * 1000),
    }
    if relay.first is not None:
        values["FirstToken"] = round(relay.first * 1000)
    times = ("Duration", "FirstToken")
    metrics = [{"Name": name, "Unit": "Milliseconds" if name in times else "Count"} for name in values]
    space = {"Namespace": "VictorianGenerator", "Dimensions": [["Endpoint"]], "Metrics": metrics}
    line = {
        "_aws": {"Timestamp": int(time.time() * 1000), "CloudWatchMetrics": [space]},
        "Endpoint": name,
        "outcome": outcome,
        "aws_request": aws_request,
        "trace": trace,
        "prompt_bytes": len(request.get("prompt", "").encode()),
        **values,
    }
    print(json.dumps(line), flush=True)
