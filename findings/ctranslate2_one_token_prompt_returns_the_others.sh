#!/usr/bin/env bash
# Expected: with include_prompt_in_result=False ctranslate2's Generator.generate_batch returns what it wrote, and a prompt's answer does not depend on the
# other prompts of its batch: its documentation takes prompts of several lengths together.
# Seen with ctranslate2 4.8.5: one prompt of a single token in the batch, as a start token alone (a text from nothing) is, and every other prompt comes
# back in front of its answer, but for its first token, and takes up room in max_length: the answers are cut short. With two tokens it is right.
# A server that batches requests hands one writer's words out as the model's. (The tiny model has random weights; it writes greedily.)
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

LETTERS, WIDTH = "abcdefghijklmnopqrstuvwxyz", 16
random = np.random.default_rng(3)


def weights(*shape):
    return random.normal(0, 0.5, shape).astype(np.float32)


spec = TransformerDecoderModelSpec.from_config(num_layers=1, num_heads=2)
decoder, block = spec.decoder, spec.decoder.layer[0]
decoder.scale_embeddings = False
decoder.embeddings.weight = decoder.projection.weight = weights(3 + len(LETTERS), WIDTH)
decoder.position_encodings.encodings = weights(64, WIDTH)
query, out = block.self_attention.linear
for layer, rows, columns in ((query, 3, 1), (out, 1, 1), (block.ffn.linear_0, 4, 1), (block.ffn.linear_1, 1, 4)):
    layer.weight, layer.bias = weights(rows * WIDTH, columns * WIDTH), np.zeros(rows * WIDTH, np.float32)
for norm in (decoder.layer_norm, block.self_attention.layer_norm, block.ffn.layer_norm):
    norm.gamma, norm.beta = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
spec.register_vocabulary(["<unk>", "<s>", "</s>", *LETTERS])
spec.validate()
spec.optimize()
os.makedirs(sys.argv[1])
spec.save(sys.argv[1])

generator = ctranslate2.Generator(sys.argv[1], intra_threads=1)
print(f"ctranslate2 {ctranslate2.__version__}, max_length=12")
found = {}
for other in (None, ["<s>", "a"], ["<s>"]):
    batch = [["<s>", *"dickens"]] + ([other] if other else [])
    answers = generator.generate_batch(batch, max_length=12, end_token=[], include_prompt_in_result=False)
    found[len(other or [])] = answers[0].sequences[0]
    print(f"<s>dickens beside {''.join(other or ['nothing'])}: {''.join(answers[0].sequences[0])}")
assert found[0] == found[2] and found[0][:7] != list("dickens")
assert found[1] == [*"dickens", *found[0]][:12], "a prompt of one token leaves the others alone now"
PY
