#!/usr/bin/env bash
# Expected: Tokenizer.add_tokens gives each new token an id that no other token has.
# Seen with tokenizers 0.23.3: it numbers them from the size of the vocabulary. Where the ids have a gap (rows of a table left out, or special tokens set
# apart at the end, as tiktoken allows), the new token gets the id of an existing one: both are encoded as that id, decoding
# gives the new one's text, and the texts of the old one come back changed. No warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers

print(f"tokenizers {tokenizers.__version__}")
found = {}
for vocab in ({"the": 0, "fog": 1, "river": 2}, {"the": 0, "fog": 1, "river": 3}):
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="the"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_tokens(["Dickens", "Eliot"])
    ids = {word: tokenizer.token_to_id(word) for word in (*vocab, "Dickens", "Eliot")}
    again = tokenizer.decode(tokenizer.encode("the river").ids)
    print(f"{ids}: 'the river' -> {again!r}")
    found[max(vocab.values())] = (len(set(ids.values())) == len(ids), again)
assert found == {2: (True, "the river"), 3: (False, "the Dickens")}, "new tokens get free ids now"
PY
