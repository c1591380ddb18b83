#!/usr/bin/env bash
# Expected: include_prompt_in_result of ctranslate2's Generator.generate_batch decides whether the prompt stands in front of the answer; its documentation
# speaks of speed besides. The tokens written behind the prompt are the same.
# Seen with ctranslate2 4.8.5: with a repetition_penalty they are not. Left out of the result, the prompt is not penalised (the names in it come back at
# once); as part of it, all but its first token are. generate_tokens, which streams, is of the first kind, so a server that streams and answers at once
# writes two texts for one request; transformers counts the whole prompt. (The tiny model has random weights; it writes greedily.)
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

WORDS, WIDTH, NEW = 40, 32, 12
random = np.random.default_rng(0)
spec = TransformerDecoderModelSpec.from_config(num_layers=2, num_heads=2)
weights = {
    "linear_0": (4 * WIDTH, WIDTH),
    "linear_1": (WIDTH, 4 * WIDTH),
    "0": (3 * WIDTH, WIDTH),
    "1": (WIDTH, WIDTH),
}
spec.decoder.scale_embeddings = False
spec.decoder.embeddings.weight = random.normal(0, 0.9, (WORDS, WIDTH)).astype(np.float32)
spec.decoder.projection.weight = spec.decoder.embeddings.weight
spec.decoder.position_encodings.encodings = random.normal(0, 0.3, (64, WIDTH)).astype(np.float32)
norms = [spec.decoder.layer_norm]
for block in spec.decoder.layer:
    norms += [block.self_attention.layer_norm, block.ffn.layer_norm]
    layers = dict(zip("01", block.self_attention.linear)) | {"linear_0": block.ffn.linear_0, "linear_1": block.ffn.linear_1}
    for name, layer in layers.items():
        layer.weight = random.normal(0, 0.3, weights[name]).astype(np.float32)
        layer.bias = np.zeros(weights[name][0], np.float32)
for norm in norms:
    norm.gamma, norm.beta = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
spec.register_vocabulary(["</s>", "<s>", "<unk>", *(f"w{i}" for i in range(3, WORDS))])
spec.validate()
spec.optimize()
os.makedirs(sys.argv[1])
spec.save(sys.argv[1])

generator = ctranslate2.Generator(sys.argv[1], intra_threads=1)
prompts = [[f"w{i}" for i in random.integers(3, WORDS, 6)] for _ in range(40)]
print(f"ctranslate2 {ctranslate2.__version__}: {len(prompts)} prompts of 6 tokens, {NEW} tokens behind each")
equal = {}
for penalty in (1.0, 1.5):
    equal[penalty] = []
    for prompt in prompts:
        same = {"repetition_penalty": penalty, "end_token": []}
        alone = generator.generate_batch([prompt], include_prompt_in_result=False, max_length=NEW, **same)[0].sequences[0]
        whole = generator.generate_batch([prompt], max_length=len(prompt) - 1 + NEW, **same)[0].sequences[0]
        assert whole[: len(prompt)] == prompt and len(whole) == len(prompt) + NEW
        equal[penalty].append(whole[len(prompt) :] == alone)
        if equal[penalty].count(False) == 1 and not equal[penalty][-1]:
            print(f"prompt: {' '.join(prompt)}\n  not returned: {' '.join(alone)}\n  returned:     {' '.join(whole[len(prompt) :])}")
    print(f"repetition_penalty={penalty}: the same text for {sum(equal[penalty])} of {len(prompts)} prompts")
assert all(equal[1.0]), "the texts differ without a penalty too"
assert sum(equal[1.5]) < 0.75 * len(prompts), "returned or not, the prompt counts alike now"
PY
