#!/usr/bin/env bash
# Expected: the same text and the same options give the same SentencePiece vocabulary on every machine, with any number of threads: num_threads is described
# as the number of threads for training, and nothing in it is drawn at random.
# Seen with sentencepiece 0.2.3: true of model_type="bpe". The default, "unigram", adds up its counts thread by thread, and the last bits of the sums decide
# which pieces are pruned and how they are ordered: with 1, 2, 4 and 16 (the default) threads some pieces differ and many ids stand for another piece, so
# a model trained with one reads nonsense in the other's ids. The number of cores does not matter. State num_threads, and keep the .model file.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check sentencepiece==0.2.3 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import io
from pydoc_data.topics import topics

import sentencepiece

lines = [line for line in "\n".join(topics.values()).split("\n") if line.strip()]  # Python's own help: English prose


def train(kind, threads):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type=kind, vocab_size=800, num_threads=threads, minloglevel=2
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size())]


print(f"sentencepiece {sentencepiece.__version__}: {len(lines)} lines, 800 pieces")
same = {}
for kind in ("bpe", "unigram"):
    first = train(kind, 1)
    same[kind] = [train(kind, 1) == first]
    for threads in (2, 4, 16):
        other = train(kind, threads)
        same[kind].append(other == first)
        moved = sum(a != b for a, b in zip(first, other))
        print(f"{kind}, {threads} threads beside 1: {len(set(first) ^ set(other))} pieces in one alone, {moved} ids stand for another piece")
assert same["bpe"] == [True] * 4 and same["unigram"][0], "the vocabulary of one thread varies"
assert not all(same["unigram"]), "the threads do not matter any more"
PY
