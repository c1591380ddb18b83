#!/usr/bin/env bash
# Expected: by the standard (HTML, "Server-sent events", interpreting an event stream) one space behind the colon is left out of a field's value, no more,
# and what is left of several `data` lines is joined by newlines. So a writing server can send a language model's words as they are: " came", "\n".
# Seen with requests-sse 0.5.3 (Python) and fetch-event-stream 0.1.6 (npm): both leave out all the spaces, so the words of the text run together, and
# requests-sse drops newlines at an event's end, so its paragraphs do as well. httpx-sse 0.4.3 and eventsource-parser 3.1.0 keep them. Needs Node 20.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check requests-sse==0.5.3 httpx-sse==0.4.3 httpx==0.28.1 2>/dev/null
npm init --yes >/dev/null
npm install --silent --no-fund --no-audit fetch-event-stream@0.1.6 eventsource-parser@3.1.0
cat > serve.py <<'PY'
"""Serves one stream of three events on a free port, until it is ended."""

import http.server


class Story(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for piece in ("He", " came", ".\n"):
            self.wfile.write("".join(f"data: {line}\n" for line in piece.split("\n")).encode() + b"\n")

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Story)
print(f"http://127.0.0.1:{server.server_port}/", flush=True)
server.serve_forever()
PY
cat > show.mjs <<'JS'
import { createParser } from "eventsource-parser";
import { events } from "fetch-event-stream";

const [stripped, kept] = [[], []];
for await (const event of events(await fetch(process.argv[2]))) stripped.push(event.data);
createParser({ onEvent: (event) => kept.push(event.data) }).feed(await (await fetch(process.argv[2])).text());
console.log("fetch-event-stream 0.1.6:", JSON.stringify(stripped), " eventsource-parser 3.1.0:", JSON.stringify(kept));
if (JSON.stringify(kept) !== '["He"," came",".\\n"]') throw new Error("the stream is not what it should be");
if (stripped[1] !== "came") throw new Error("fetch-event-stream keeps the spaces now");
JS
venv/bin/python serve.py > address &
server=$!
trap 'kill $server; rm -rf "$folder"' EXIT
until [ -s address ]; do sleep 0.1; done
node show.mjs "$(cat address)"
venv/bin/python - "$(cat address)" <<'PY'
import itertools
import sys

import httpx
import httpx_sse
import requests_sse

with requests_sse.EventSource(sys.argv[1]) as source:
    stripped = [event.data for event in itertools.islice(source, 3)]
with httpx.Client() as client, httpx_sse.connect_sse(client, "GET", sys.argv[1]) as source:
    kept = [event.data for event in source.iter_sse()]
print(f"requests-sse 0.5.3: {stripped}  httpx-sse 0.4.3: {kept}")
assert kept == ["He", " came", ".\n"]
assert stripped == ["He", "came", "."], "requests-sse keeps spaces and newlines now"
PY
