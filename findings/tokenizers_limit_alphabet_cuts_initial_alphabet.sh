#!/usr/bin/env bash
# Expected: what BpeTrainer gets as initial_alphabet is included "even if not seen in the training dataset"; limit_alphabet bounds what the
# texts add to it. So a byte-level vocabulary can write every text.
# Seen with tokenizers 0.23.3: the limit cuts the initial alphabet too. Which bytes go depends on the texts; what needs them is dropped in
# encoding without an error (a model without an unknown token).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

alphabet = pre_tokenizers.ByteLevel.alphabet()
for limit in ({}, {"limit_alphabet": 60}):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False, **limit)
    tokenizer.train_from_iterator(["the fog lay on the river"] * 20, trainer)
    kept = sum(letter in tokenizer.get_vocab() for letter in alphabet)
    text = tokenizer.decode(tokenizer.encode("fog ~ £5").ids)
    print(f"tokenizers {tokenizers.__version__} {limit}: {kept} of {len(alphabet)} bytes, 'fog ~ £5' -> {text!r}")
    assert (kept == 256) == (text == "fog ~ £5") == (not limit), "the initial alphabet is kept now"
PY
