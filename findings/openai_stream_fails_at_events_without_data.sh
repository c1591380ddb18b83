#!/usr/bin/env bash
# Expected: the openai client reads any valid stream of server-sent events. By the standard (HTML, "Server-sent events", interpreting an event stream) an
# event without data, as `retry: 100` or `event: ping` alone, is not dispatched, and one byte order mark in front is ignored.
# Seen with openai 3.52.0 for Python: such an event raises json.JSONDecodeError, which is no openai.OpenAIError, and ends the stream; with a byte
# order mark the first token is lost without a word. A server keeps such connections alive with comments (`: ping`), which are skipped.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check openai==3.52.0 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai


def event(text):
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None}
    return "data: " + json.dumps({"id": "c", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}) + "\n\n"


STREAMS = {
    "tokens only": event("It ") + event("was"),
    "a comment between": event("It ") + ": ping\n\n" + event("was"),
    "retry between": event("It ") + "retry: 100\n\n" + event("was"),
    "an event without data between": event("It ") + "event: ping\n\n" + event("was"),
    "a byte order mark in front": "\ufeff" + event("It ") + event("was"),
}


class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        data = (STREAMS[body["prompt"]] + "data: [DONE]\n\n").encode()
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="x", max_retries=0)
print(f"openai {openai.__version__}")
found = []
for name in STREAMS:
    text, end = "", "no error"
    try:
        for chunk in client.completions.create(model="m", prompt=name, stream=True):
            text += chunk.choices[0].text
    except Exception as error:
        end = type(error).__name__
    found.append((text, end))
    print(f"{name}: {text!r}, {end}")
seen = [("It was", "no error")] * 2 + [("It ", "JSONDecodeError")] * 2 + [("was", "no error")]
assert found == seen, "these streams are read otherwise now"
PY
