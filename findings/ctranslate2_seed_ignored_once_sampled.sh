#!/usr/bin/env bash
# Expected: ctranslate2.set_random_seed(1) before a request makes its text repeatable, as torch.manual_seed does: its documentation says that it
# "sets the seed of random generators".
# Seen with ctranslate2 4.8.5: a generator that has sampled once goes on with the random numbers it had. The seed holds for generators made later;
# so a server that promises one text a seed has to load the model anew for each request, or draw its tokens itself.
# (CTranslate2 issue 1757 has the complaint. The tiny model has random weights.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ctranslate2==4.8.5 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - "$folder/model" <<'PY'
import os
import sys

import ctranslate2
import numpy as np
from ctranslate2.specs import TransformerDecoderModelSpec

random = np.random.default_rng(0)


def fill(layer, *shape):
    layer.weight = random.normal(0, 0.5, shape).astype(np.float32)
    layer.bias = np.zeros(shape[0], np.float32)


def norm(layer):
    layer.gamma, layer.beta = np.ones(8, np.float32), np.zeros(8, np.float32)


spec = TransformerDecoderModelSpec.from_config(num_layers=1, num_heads=2)
decoder = spec.decoder
decoder.scale_embeddings = False
decoder.embeddings.weight = random.normal(0, 0.5, (12, 8)).astype(np.float32)
decoder.projection.weight = decoder.embeddings.weight
decoder.position_encodings.encodings = random.normal(0, 0.5, (16, 8)).astype(np.float32)
norm(decoder.layer_norm)
for layer in decoder.layer:
    norm(layer.self_attention.layer_norm)
    norm(layer.ffn.layer_norm)
    fill(layer.self_attention.linear[0], 24, 8)
    fill(layer.self_attention.linear[1], 8, 8)
    fill(layer.ffn.linear_0, 32, 8)
    fill(layer.ffn.linear_1, 8, 32)
spec.register_vocabulary(["<unk>", "<s>", "</s>", *"abcdefghi"])
spec.validate()
spec.optimize()
os.makedirs(sys.argv[1])
spec.save(sys.argv[1])


def sample(generator):
    ctranslate2.set_random_seed(1)
    found = generator.generate_batch(
        [["a"]], sampling_topk=0, sampling_temperature=3, min_length=12, max_length=12, include_prompt_in_result=False
    )
    return found[0].sequences_ids[0]


ctranslate2.set_random_seed(1)
first = ctranslate2.Generator(sys.argv[1], device="cpu", intra_threads=1)
one, two, three = sample(first), sample(first), sample(ctranslate2.Generator(sys.argv[1], device="cpu", intra_threads=1))
print(f"ctranslate2 {ctranslate2.__version__}, seed 1 each time")
print("one generator, first request: ", one)
print("the same one, second request: ", two)
print("a new generator:              ", three)
assert one == three, "a new generator does not follow the seed either"
assert one != two, "the seed is taken over by a running generator now"
PY
