#!/usr/bin/env bash
# Expected: by the standard (HTML, "Server-sent events"; the older draft that its README names says the same) an event counts only with the empty line
# behind it: what a stream that breaks off has begun is thrown away. And an event without an id keeps the last one, to go on from after a break.
# Seen with sseclient-py 1.9.0: the half event is handed out as if it were whole, so the last word of a text cut short is a piece of one, or a number
# has lost digits; with JSON as data the loop ends in the caller's own decoding error. event.id is None behind an event that had one: a client that sends
# it as Last-Event-ID asks for everything again. httpx-sse 0.4.3 does both right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check sseclient-py==1.9.0 httpx-sse==0.4.3 httpx==0.28.1 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import importlib.metadata

import httpx
import httpx_sse
import sseclient

STREAM = b"id: 7\ndata: It was\n\ndata:  the\n\ndata:  riv"  # broken off in "river"
READERS = {
    "sseclient-py": lambda: sseclient.SSEClient(iter([STREAM])).events(),
    "httpx-sse": lambda: httpx_sse.EventSource(
        httpx.Response(200, headers={"content-type": "text/event-stream"}, content=STREAM)
    ).iter_sse(),
}
found = {}
for name, events in READERS.items():
    found[name] = [(event.data, event.id) for event in events()]
    print(f"{name} {importlib.metadata.version(name)}: {found[name]}")
assert found["httpx-sse"] == [("It was", "7"), (" the", "7")]
assert (" riv", None) in found["sseclient-py"], "half an event stays back now, or keeps its id"
PY
