#!/usr/bin/env bash
# Expected: n_predict=0 of llama.cpp's server reads the prompt and writes nothing: "no tokens will be generated but the prompt is evaluated into the cache",
# says its README, which makes it the way to warm the cache; max_tokens=0 of its /v1/completions does as much.
# Seen with llama.cpp b11549 (xllamacpp 2026.10.11549): both write one token and say so in their counts, as if asked for one. echo=true, which asks for the
# prompt's own log-probabilities with max_tokens=0, is not refused but ignored, so the one number that comes back is that of the token nobody
# asked for, and a loss made of it is of the wrong text. (llama.cpp issue 27174 tells of the echo. The tiny model has random weights.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check xllamacpp==2026.10.11549 gguf==0.19.0 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - "$folder/model.gguf" <<'PY'
import json
import string
import sys
import urllib.request

import gguf
import numpy as np
import xllamacpp

WIDTH, CONTEXT = 32, 128
random = np.random.default_rng(0)
tokens = [*string.ascii_letters, "Ġ", "th", "<|endoftext|>"]
writer = gguf.GGUFWriter(sys.argv[1], "gpt2")
writer.add_context_length(CONTEXT)
writer.add_embedding_length(WIDTH)
writer.add_feed_forward_length(4 * WIDTH)
writer.add_block_count(1)
writer.add_head_count(2)
writer.add_layer_norm_eps(1e-5)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("gpt-2")
writer.add_token_list(tokens)
writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL])
writer.add_token_merges(["t h"])
writer.add_bos_token_id(len(tokens) - 1)
writer.add_eos_token_id(len(tokens) - 1)
writer.add_add_bos_token(False)
matrices = {"token_embd": (len(tokens), WIDTH), "position_embd": (CONTEXT, WIDTH), "blk.0.attn_qkv": (3 * WIDTH, WIDTH)}
matrices |= {"blk.0.attn_output": (WIDTH, WIDTH), "blk.0.ffn_up": (4 * WIDTH, WIDTH), "blk.0.ffn_down": (WIDTH, 4 * WIDTH)}
for name, shape in matrices.items():
    writer.add_tensor(f"{name}.weight", random.normal(0, 0.3, shape).astype(np.float32))
    if name.startswith("blk"):
        writer.add_tensor(f"{name}.bias", np.zeros(shape[0], np.float32))
for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
    writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    writer.add_tensor(f"{name}.bias", np.zeros(WIDTH, np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

params = xllamacpp.CommonParams()
params.model.path, params.verbosity, params.warmup, params.n_parallel = sys.argv[1], -1, False, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)


def ask(route, **body):
    data = json.dumps({"prompt": "the fog", "temperature": 0, **body}).encode()
    request = urllib.request.Request(server.listening_address + route, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


found = []
for count in (0, 1, 2):
    answer, other = ask("/completion", n_predict=count), ask("/v1/completions", max_tokens=count)
    found.append((answer["tokens_predicted"], other["usage"]["completion_tokens"]))
    print(f"n_predict={count}: {answer['content']!r}, {found[-1][0]} tokens; max_tokens={count}: {other['choices'][0]['text']!r}, {found[-1][1]}")
answer = ask("/v1/completions", max_tokens=0, echo=True, logprobs=1)
print(f"max_tokens=0, echo=true, logprobs=1: {answer['choices'][0]['text']!r}, {len(answer['choices'][0]['logprobs']['content'])} log-probability")
assert found[1:] == [(1, 1), (2, 2)]
if found[0] != (1, 1) or answer["choices"][0]["text"].startswith("the fog"):
    print("no tokens are written now, or the prompt is scored")
    sys.exit(1)
PY
