#!/usr/bin/env bash
# Expected: convert_tiktoken_to_fast(encoding, folder) of transformers writes a tokenizer.json that gives the ids of the tiktoken Encoding, its special
# tokens included: they are a dictionary of text to id.
# Seen with transformers 5.23.0 and tiktoken 0.14.0: the ids of that dictionary are not used. Special tokens are numbered from the first free id in the
# dictionary's order, so a gap before them (a table padded to a round size) closes, and two of them swap if listed the other way round: the model
# then reads one for the other. No warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 tiktoken==0.14.0 blobfile==3.2.0 tokenizers==0.23.3 2>/dev/null
"$folder/venv/bin/python" - "$folder" 2>/dev/null <<'PY'
import sys

import tiktoken
import transformers
from tokenizers import Tokenizer
from transformers.integrations.tiktoken import convert_tiktoken_to_fast

ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}
text = "<|start|>the<|end|>"
print(f"transformers {transformers.__version__}, tiktoken {tiktoken.__version__}")
for number, (special, same) in enumerate(
    (
        ({"<|start|>": 258, "<|end|>": 259}, True),
        ({"<|end|>": 259, "<|start|>": 258}, False),
        ({"<|start|>": 300, "<|end|>": 301}, False),
    )
):
    encoding = tiktoken.Encoding("own", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=special)
    convert_tiktoken_to_fast(encoding, f"{sys.argv[1]}/{number}")
    expected = encoding.encode(text, allowed_special="all")
    found = Tokenizer.from_file(f"{sys.argv[1]}/{number}/tokenizer.json").encode(text).ids
    print(f"{special}: tiktoken {expected}, converted {found}")
    if (expected == found) != same:
        print("the special tokens' ids are converted otherwise now")
        sys.exit(1)
PY
