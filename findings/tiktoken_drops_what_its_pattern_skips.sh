#!/usr/bin/env bash
# Expected: pat_str of a tiktoken Encoding is a pattern "used to split the input text", so every character ends up in some piece, as with the Split of
# tokenizers, and decode(encode(text)) is the text: the ranks hold all 256 bytes.
# Seen with tiktoken 0.14.0: what the pattern does not match is thrown away, without an error. A pattern of words and signs loses all spaces, one of
# letters and spaces the dates and the dashes. An own vocabulary needs a pattern that ends in "anything else" (`|\s+|.` with (?s)), and a round trip of
# real text in its test.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tiktoken==0.14.0 tokenizers==0.23.3 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import tiktoken
from tokenizers import Regex, pre_tokenizers

text = "In 1841 — no fog."
single = {bytes([byte]): byte for byte in range(256)}
print(f"tiktoken {tiktoken.__version__}, all 256 bytes in its ranks: {text!r}")
found = []
for pattern in (r"\w+|[^\w\s]+", r" ?\p{L}+|\s+", r" ?\p{L}+|\s+|."):
    encoding = tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=single, special_tokens={})
    again = encoding.decode(encoding.encode(text))
    split = pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)
    assert "".join(piece for piece, _ in split) == text
    found.append(again)
    print(f"{pattern}: {again!r}; the Split of tokenizers keeps all in {len(split)} pieces")
assert found[2] == text
assert found[0] == "In1841—nofog." and "1841" not in found[1], "characters outside the pattern are kept or refused now"
PY
