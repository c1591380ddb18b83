#!/usr/bin/env bash
# Expected: where a connection breaks in the middle of an event stream (a streaming SageMaker endpoint), iterating over response["Body"] raises, at the
# latest when the body is shorter than its Content-Length or ends inside a frame.
# Seen with botocore 1.44.8 and urllib3 2.8.0: only a broken chunked body raises (urllib3's ProtocolError, not botocore's). With a Content-Length, with
# Connection: close, and where a proxy ends the chunks properly, the loop just ends and half a frame is thrown away: a text cut short looks complete.
# A protocol of its own needs a last message that says so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check boto3==1.44.5 botocore==1.44.8 urllib3==2.8.0
"$folder/venv/bin/python" - <<'PY'
import socket
import struct
import threading
import zlib

import boto3
import botocore
import urllib3
from botocore.config import Config

HEADERS = {":message-type": "event", ":event-type": "PayloadPart", ":content-type": "application/octet-stream"}


def frame(payload):
    headers = b"".join(
        struct.pack("!B", len(name)) + name.encode() + struct.pack("!BH", 7, len(value)) + value.encode()
        for name, value in HEADERS.items()
    )
    start = struct.pack("!II", 16 + len(headers) + len(payload), len(headers))
    start += struct.pack("!I", zlib.crc32(start)) + headers + payload
    return start + struct.pack("!I", zlib.crc32(start))


first, second = frame(b"It "), frame(b"was ")
sent = first + second[:20]  # the connection breaks inside the second frame
chunk = b"%x\r\n%b\r\n" % (len(sent), sent)
BODIES = {
    "Content-Length": b"Content-Length: %d\r\n\r\n%b" % (len(first + second), sent),
    "Connection: close": b"Connection: close\r\n\r\n" + sent,
    "chunked, last chunk sent": b"Transfer-Encoding: chunked\r\n\r\n" + chunk + b"0\r\n\r\n",
    "chunked, cut": b"Transfer-Encoding: chunked\r\n\r\n" + chunk,
}


def serve(body):
    listener = socket.create_server(("127.0.0.1", 0))

    def answer():
        connection, _ = listener.accept()
        request = b""
        while not request.endswith(b"\r\n\r\n{}"):
            request += connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.amazon.eventstream\r\n" + body)
        connection.shutdown(socket.SHUT_WR)
        connection.close()

    threading.Thread(target=answer, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


print(f"botocore {botocore.__version__}, urllib3 {urllib3.__version__}; one whole frame and twenty bytes of the next are sent")
found = {}
for name, body in BODIES.items():
    client = boto3.client(
        "sagemaker-runtime",
        region_name="eu-west-1",
        aws_access_key_id="x",
        aws_secret_access_key="x",
        endpoint_url=serve(body),
        config=Config(retries={"total_max_attempts": 1}),
    )
    parts, end = [], "ends without an error"
    try:
        for event in client.invoke_endpoint_with_response_stream(EndpointName="letters", Body=b"{}")["Body"]:
            parts.append(event["PayloadPart"]["Bytes"])
    except Exception as error:
        end = f"{type(error).__module__}.{type(error).__name__}"
    found[name] = end
    print(f"{name}: {parts}, {end}")
silent = [name for name, end in found.items() if end == "ends without an error"]
assert silent == list(BODIES)[:3], "a cut stream is noticed elsewhere now"
PY
