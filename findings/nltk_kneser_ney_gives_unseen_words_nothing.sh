#!/usr/bin/env bash
# Expected: a smoothed model keeps something for words it has not seen, so its perplexity on another text is finite: that is what Kneser-Ney,
# Witten-Bell and absolute discounting are for, and a Vocabulary counts "<UNK>" among its words.
# Seen with nltk 3.10.4: the three interpolated models give a word that is not in the training text probability 0, as their recursion ends at the words'
# own counts and not at a uniform distribution. One new word makes the perplexity of a whole book infinite, where add-one (Laplace) gives a figure.
# A baseline to compare a small neural model with needs Vocabulary(unk_cutoff=2), which turns words seen once into "<UNK>" first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check nltk==3.10.4 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import math

import nltk
from nltk.lm import AbsoluteDiscountingInterpolated, KneserNeyInterpolated, Laplace, Vocabulary, WittenBellInterpolated
from nltk.lm.preprocessing import padded_everygram_pipeline
from nltk.util import bigrams

train = [line.split() for line in ("the cat sat on the mat", "the dog sat on the log", "a cat and a dog", "the end of the tale")]
test = list(bigrams("the cat sat on the carpet".split()))
print(f"nltk {nltk.__version__}")
infinite = {}
for kind in (KneserNeyInterpolated, WittenBellInterpolated, AbsoluteDiscountingInterpolated, Laplace):
    for cutoff in (1, 2):
        grams, words = padded_everygram_pipeline(2, train)
        model = kind(2, vocabulary=Vocabulary(words, unk_cutoff=cutoff))
        model.fit(grams)
        perplexity = model.perplexity(test)
        infinite[kind, cutoff] = math.isinf(perplexity)
        total = sum(model.score(word, ["the"]) for word in model.vocab)
        score = model.score("carpet", ["the"])
        print(f"{kind.__name__}, unk_cutoff {cutoff}: P(carpet | the) = {score:.4f}, sum {total:.4f}, perplexity {perplexity:.2f}")
assert list(infinite.values()) == [True, False] * 3 + [False, False], "unseen words are smoothed otherwise now"
PY
