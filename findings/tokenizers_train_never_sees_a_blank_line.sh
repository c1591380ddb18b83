#!/usr/bin/env bash
# Expected: Tokenizer.train(files) learns the same vocabulary as train_from_iterator over the same files' texts: it reads "line by line, while keeping all
# the whitespace, even new lines".
# Seen with tokenizers 0.23.3: each line is split by itself, so nothing that spans a line end is ever counted. With a pattern that keeps line ends together, as
# those of recent models do, no token for a blank line is learned, and every paragraph break of a book costs two tokens instead of one. No warning.
# Pass the texts to train_from_iterator.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3 2>/dev/null
"$folder/venv/bin/python" - "$folder/book.txt" <<'PY'
import pathlib
import sys

import tokenizers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

book = "It was a foggy day.\n\nThe river ran.\n\n  O river,\n  O fog!\n\n" * 40
path = pathlib.Path(sys.argv[1])
path.write_bytes(book.encode())
print(f"tokenizers {tokenizers.__version__}: a text of {book.count(chr(10) * 2)} paragraph breaks")
found = {}
for way in ("train", "train_from_iterator"):
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r" ?[^\s]+|\s*\n+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    if way == "train":
        tokenizer.train([str(path)], trainer)
    else:
        tokenizer.train_from_iterator([path.read_bytes().decode()], trainer)
    blank = [token for token in tokenizer.get_vocab() if token.count("Ċ") > 1]
    found[way] = (len(blank), len(tokenizer.encode(book).ids))
    print(f"{way}: tokens with two line ends: {blank}; the text has {found[way][1]} tokens")
assert found["train_from_iterator"][0] == 1, "the texts give no token for a blank line"
assert found["train"][0] == 0 and found["train"][1] > found["train_from_iterator"][1], "files give a token for a blank line now"
PY
