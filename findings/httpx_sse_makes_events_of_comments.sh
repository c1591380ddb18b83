#!/usr/bin/env bash
# Expected: a line that begins with a colon is a comment, which servers send every few seconds to keep a connection open, and no event comes of it (HTML,
# "Server-sent events": an event whose data is empty is not dispatched).
# Seen with httpx-sse 0.4.3: so it is until an event has had an id. From then on each comment arrives as an event "message" with empty data, as its id is
# kept and counts as content: a loop of json.loads(event.data) ends with an error as soon as the server has to wait.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check httpx-sse==0.4.3 httpx==0.28.1 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import importlib.metadata

import httpx
import httpx_sse


def events(stream: bytes) -> list[str]:
    response = httpx.Response(200, headers={"content-type": "text/event-stream"}, content=stream)
    return [event.data for event in httpx_sse.EventSource(response).iter_sse()]


without = events(b': wait\n\ndata: {"text": "It"}\n\n: wait\n\ndata: {"text": " was"}\n\n')
behind = events(b': wait\n\nid: 1\ndata: {"text": "It"}\n\n: wait\n\nid: 2\ndata: {"text": " was"}\n\n')
print(f"httpx-sse {importlib.metadata.version('httpx-sse')}: without ids {without}; with ids {behind}")
assert without == ['{"text": "It"}', '{"text": " was"}']
assert behind == ['{"text": "It"}', "", '{"text": " was"}'], "a comment makes no event now"
PY
