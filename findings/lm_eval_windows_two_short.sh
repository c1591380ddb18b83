#!/usr/bin/env bash
# Expected: lm-eval's local-completions with max_length=N scores a long text in windows of N tokens, as its hf model does with
# a context of N: each window predicts N tokens (the first from a prefix token, the others from those before them).
# Seen with lm-eval 0.4.13: its windows predict N - 2 tokens and its requests hold N - 1 ids. To get the windows of an hf model with
# context C one has to say max_length = C + 2 (docs/clients.md).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "lm-eval[api]==0.4.13" "transformers==5.24.0" "tokenizers==0.23.3" 2>/dev/null
cat > "$folder/show.py" <<'PY'
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

requests = []


class Recorder(BaseHTTPRequestHandler):
    """A server of completions whose tokens all have log-probability -1."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/tokenize":
            answer = {"tokens": list(range(1, 1 + len(body["prompt"].split())))}
        else:
            requests.extend(body["prompt"])
            count = len(body["prompt"][0]) + 1
            logprobs = {"token_logprobs": [-1.0] * count, "top_logprobs": [{"x": -1.0}] * count, "tokens": ["x"] * count}
            answer = {"choices": [{"index": i, "logprobs": logprobs} for i in range(len(body["prompt"]))]}
        self.reply(answer)

    def do_GET(self):
        self.reply({"eos_token": "end", "bos_token": "end"})

    def reply(self, answer):
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
threading.Thread(target=server.serve_forever, daemon=True).start()

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

N, WORDS = 16, 100
model = LocalCompletionsAPI(
    model="m",
    base_url=f"http://127.0.0.1:{server.server_port}/v1/completions",
    tokenizer_backend="remote",
    max_length=N,
    batch_size=1,
)
text = " ".join(["word"] * WORDS)
model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
longest, windows = max(map(len, requests)), len(requests)
print(f"max_length {N}: {WORDS} tokens in {windows} windows, the longest request has {longest} ids")
print(f"a context of {N} needs {-(-WORDS // N)} windows; windows of {N - 2} need {-(-WORDS // (N - 2))}")
assert windows == -(-WORDS // (N - 2)) != -(-WORDS // N), "the windows hold another number of tokens now"
assert longest == N - 1, "the requests have another length now"
sys.stdout.flush()
os._exit(0)  # without waiting for the client's threads
PY
"$folder/venv/bin/python" "$folder/show.py" 2>"$folder/err" || { tail -5 "$folder/err"; exit 1; }
