#!/usr/bin/env bash
# Expected: BpeTrainer(max_token_length=N) "prevents creating tokens longer than the specified size": the longest token has N characters.
# Seen with tokenizers 0.23.3: the longest has N - 1, so 3 keeps three-letter tokens out, and 1 does not keep pairs out, as the pairs
# that the text begins with are never checked.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

found = {}
for limit in (1, 2, 3, 4, 5):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=100, max_token_length=limit, show_progress=False)
    tokenizer.train_from_iterator(["cat sat mat here there where"] * 20, trainer)
    found[limit] = max(map(len, tokenizer.get_vocab()))
print(f"tokenizers {tokenizers.__version__}: max_token_length -> longest token: {found}")
assert found == {1: 2, 2: 2, 3: 2, 4: 3, 5: 4}, "the limit counts otherwise now"
PY
