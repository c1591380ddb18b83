"""The relay's side of AWS: settings, boto3 clients, posting to a connection, and the tables of requests and tokens.

connection = Connection("https://ID.execute-api.eu-west-1.amazonaws.com/prod", "d3vGtd5yIAMCJnA=")
connection.post({"type": "token", "request_id": "1", "seq": 0, "index": 0, "text": "It"})
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import threading
import time
from dataclasses import dataclass
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from limits import FLUSH_MS, MAX_ACTIVE, MAX_PROMPT_BYTES, MAX_SAMPLES, MAX_TOKENS, SILENCE_S, STOP_POLL_MS, Message

POST_CHARACTERS = 5000  # a character takes at most 6 bytes in JSON, and a frame holds 32 KB
POST_ATTEMPTS = 7  # the pause starts at 50 ms and doubles: survives 3 s of throttling


@dataclass(frozen=True)
class RelaySettings:
    """The functions' environment (set by `template.yaml`; fallbacks in `limits.py`)."""

    endpoint: str
    mode: str
    worker: str
    table: str
    tokens_table: str
    flush_s: float
    max_tokens: int
    max_samples: int
    max_prompt_bytes: int
    max_active: int
    poll_s: float
    silence_s: float
    management: str

    @classmethod
    def read(cls) -> RelaySettings:
        get = os.environ.get
        mode = get("ENDPOINT_MODE", "auto")
        if mode not in ("auto", "stream", "buffered"):
            raise RuntimeError(f"ENDPOINT_MODE {mode!r}: use auto, stream or buffered")
        return cls(
            endpoint=get("ENDPOINT_NAME", ""),
            mode=mode,
            worker=get("WORKER_FUNCTION", ""),
            table=get("TABLE_NAME", ""),
            tokens_table=get("TOKENS_TABLE", ""),
            flush_s=float(get("FLUSH_MS", FLUSH_MS)) / 1000,
            max_tokens=int(get("MAX_TOKENS", "0")) or MAX_TOKENS,
            max_samples=int(get("MAX_SAMPLES", "0")) or MAX_SAMPLES,
            max_prompt_bytes=int(get("MAX_PROMPT_BYTES", MAX_PROMPT_BYTES)),
            max_active=int(get("MAX_ACTIVE", MAX_ACTIVE)),
            poll_s=float(get("STOP_POLL_MS", STOP_POLL_MS)) / 1000,
            silence_s=float(get("SILENCE_S", SILENCE_S)),
            management=get("MANAGEMENT_ENDPOINT", ""),
        )


class ConnectionClosed(Exception):
    """The client's connection no longer exists."""


_clients = threading.Lock()


@functools.cache
def client(service: str, endpoint_url: str | None, attempts: int) -> Any:
    config = Config(
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=5,
        read_timeout=70 if service == "sagemaker-runtime" else 10,
        max_pool_connections=100,
    )
    with _clients:
        return boto3.client(service, endpoint_url=endpoint_url, config=config)


def runtime() -> Any:
    """The SageMaker runtime client, without retries: a retry would pay for, and show, another generation."""
    return client("sagemaker-runtime", None, 1)


def management(event: Message, settings: RelaySettings) -> str:
    """URL to which messages for the event's connection are posted; `MANAGEMENT_ENDPOINT` is for custom domains."""
    context = event["requestContext"]
    local = os.environ.get("AWS_ENDPOINT_URL_APIGATEWAYMANAGEMENTAPI", "")
    return settings.management or local or f"https://{context['domainName']}/{context['stage']}"


class Connection:
    """Sends messages to one client."""

    def __init__(self, endpoint: str, connection_id: str):
        self.endpoint, self.id = endpoint, connection_id

    def post(self, message: Message) -> None:
        """Deliver one message, retrying after throttling and server errors; raises ConnectionClosed for a closed connection."""
        data = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
        api = client("apigatewaymanagementapi", self.endpoint, 1)
        for attempt in range(POST_ATTEMPTS):
            try:
                api.post_to_connection(ConnectionId=self.id, Data=data)
                return
            except ClientError as error:
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
                if status == 410 or error.response.get("Error", {}).get("Code") == "GoneException":
                    raise ConnectionClosed from None
                if (status != 429 and status < 500) or attempt == POST_ATTEMPTS - 1:
                    raise
            except BotoCoreError:
                if attempt == POST_ATTEMPTS - 1:
                    raise
            time.sleep(0.05 * 2**attempt * random.uniform(0.8, 1.2))


class RequestTable:
    """One DynamoDB item per request: whether it was registered, started, requested to stop, and ended.

    A second delivery of the same event is recognised by it, and `stop` reaches the worker through it.
    """

    def __init__(self, settings: RelaySettings, connection_id: str):
        self.settings, self.connection_id = settings, connection_id
        self.db = client("dynamodb", None, 3)

    def _key(self, request_id: str) -> Message:
        return {"connection_id": {"S": self.connection_id}, "request_id": {"S": request_id}}

    def _set(self, request_id: str, attribute: str, condition: str) -> bool:
        try:
            self.db.update_item(
                TableName=self.settings.table,
                Key=self._key(request_id),
                UpdateExpression=f"SET {attribute} = :now",
                ConditionExpression=condition,
                ExpressionAttributeValues={":now": {"N": str(int(time.time()))}},
            )
        except self.db.exceptions.ConditionalCheckFailedException:
            return False
        return True

    def register(self, request_id: str) -> bool:
        """Register a request; False if this connection has used the id before."""
        now = int(time.time())
        item = self._key(request_id) | {"lapses": {"N": str(now + 960)}, "forget_at": {"N": str(now + 10_800)}}
        try:
            self.db.put_item(
                TableName=self.settings.table, Item=item, ConditionExpression="attribute_not_exists(request_id)"
            )
        except self.db.exceptions.ConditionalCheckFailedException:
            return False
        return True

    def start(self, request_id: str) -> bool:
        """Mark the request as started; True for the first worker, False for every later delivery."""
        return self._set(request_id, "began", "attribute_exists(request_id) AND attribute_not_exists(began)")

    def end(self, request_id: str) -> bool:
        """Mark the request as ended; False if it was before."""
        return self._set(request_id, "ended", "attribute_exists(request_id) AND attribute_not_exists(ended)")

    def request_stop(self, request_id: str) -> bool:
        """Ask the worker to stop; False if there is no such request."""
        return self._set(request_id, "halted", "attribute_exists(request_id)")

    def stop_requested(self, request_id: str) -> bool:
        item = self.db.get_item(TableName=self.settings.table, Key=self._key(request_id), ConsistentRead=True)
        return "halted" in item.get("Item", {})

    def active(self) -> list[str]:
        """Requests of this connection that have not ended."""
        pages = self.db.get_paginator("query").paginate(
            TableName=self.settings.table,
            KeyConditionExpression="connection_id = :connection",
            FilterExpression="attribute_not_exists(ended) AND lapses > :now",
            ExpressionAttributeValues={
                ":connection": {"S": self.connection_id},
                ":now": {"N": str(int(time.time()))},
            },
            ConsistentRead=True,
        )
        return [item["request_id"]["S"] for page in pages for item in page["Items"]]


@dataclass(frozen=True)
class Access:
    """Whose token a connection was opened with, how many tokens of text a day it is good for, and until when (seconds
    since 1970); 0: without a limit."""

    id: str
    name: str
    daily: int = 0
    expires: int = 0

    @property
    def expired(self) -> bool:
        return 0 < self.expires <= time.time()

    def context(self) -> Message:
        """As an authorizer's context, whose values are strings, numbers or booleans."""
        return {"id": self.id, "name": self.name, "daily": self.daily, "expires": self.expires}

    @classmethod
    def of(cls, context: Message) -> Access:
        """From the context of a later event, in which API Gateway has made every value a string."""
        daily, expires = (int(context.get(name) or 0) for name in ("daily", "expires"))
        return cls(str(context.get("id", "")), str(context.get("name", "")), daily, expires)


class TokenTable:
    """One DynamoDB item per access token, under its SHA-256, and one for what it was used for on a day.

    `id` (hash), `name`, and optionally `expires` (seconds since 1970) and `daily` (tokens of text); `id#DAY` with `used`.
    """

    def __init__(self, settings: RelaySettings):
        self.table = settings.tokens_table
        self.db = client("dynamodb", None, 3)

    def find(self, token: str) -> Access | None:
        """The owner of a token; None if it is unknown or has expired."""
        digest = hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()
        item = self.db.get_item(TableName=self.table, Key={"id": {"S": digest}}, ConsistentRead=True).get("Item")
        if item is None or "name" not in item:
            return None
        daily, expires = (int(float(item.get(name, {"N": "0"})["N"])) for name in ("daily", "expires"))
        access = Access(digest, item["name"]["S"], daily, expires)
        return None if access.expired else access

    def spend(self, access: Access, amount: int) -> str | None:
        """Take tokens of text from the day's allowance; the day, "" where there is no allowance, None if too few are left."""
        if not access.daily:
            return ""
        day = time.strftime("%Y-%m-%d", time.gmtime())
        if amount > access.daily or not self._add(access.id, day, amount, access.daily - amount):
            return None
        return day

    def give_back(self, access_id: str, day: str, amount: int) -> None:
        self._add(access_id, day, -amount, None)

    def _add(self, access_id: str, day: str, amount: int, room: int | None) -> bool:
        values = {":amount": {"N": str(amount)}, ":forget": {"N": str(int(time.time()) + 3 * 86_400)}}
        condition: Message = {}
        if room is not None:
            values[":room"] = {"N": str(room)}
            condition = {"ConditionExpression": "attribute_not_exists(used) OR used <= :room"}
        try:
            self.db.update_item(
                TableName=self.table,
                Key={"id": {"S": f"{access_id}#{day}"}},
                UpdateExpression="SET forget_at = :forget ADD used :amount",
                ExpressionAttributeValues=values,
                **condition,
            )
        except self.db.exceptions.ConditionalCheckFailedException:
            return False
        return True
