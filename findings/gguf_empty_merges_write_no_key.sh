#!/usr/bin/env bash
# gguf 0.19.0: GGUFWriter.add_token_merges([]) raises nothing and writes no key at all, while add_token_list writes its
# array. A byte-level BPE vocabulary without merges (letters only) is valid, but a program that requires
# `tokenizer.ggml.merges` for the model "gpt2" cannot load the file that results.
# What one would expect: an empty array under the key, or an error.
# Exit code 0 while this is so, 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check gguf==0.19.0
"$folder/venv/bin/python" - "$folder/letters.gguf" <<'PY'
import sys

import gguf

writer = gguf.GGUFWriter(sys.argv[1], "gpt2")
writer.add_tokenizer_model("gpt2")
writer.add_token_list(["a", "b", "c"])
writer.add_token_merges([])
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
keys = [name for name in gguf.GGUFReader(sys.argv[1]).fields if name.startswith("tokenizer.")]
print(*keys, sep="\n")
if keys != ["tokenizer.ggml.model", "tokenizer.ggml.tokens"]:
    sys.exit("gguf writes other keys now")
PY
