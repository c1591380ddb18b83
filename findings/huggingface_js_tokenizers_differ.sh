#!/usr/bin/env bash
# Expected: npm's @huggingface/tokenizers reads the tokenizer.json that Python's tokenizers wrote and gives the same ids.
# Seen with @huggingface/tokenizers 0.2.0 and tokenizers 0.23.3: (1) an added token with single_word=True, such as an author's name, is also found
# inside longer words; (2) the unk_token that a WordLevel model states in tokenizer.json is not read (only that of tokenizer_config.json
# is), so the id of an unknown word is `undefined` instead of the unknown token's. Both without an error. Needs Node 20.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check tokenizers==0.23.3 2>/dev/null
npm init --yes >/dev/null
npm install --silent --no-fund --no-audit @huggingface/tokenizers@0.2.0
cat > write.py <<'PY'
import json

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

cases = []
letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
names = Tokenizer(models.BPE(vocab=letters, merges=[]))
names.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
names.add_tokens([AddedToken("Dickens", single_word=True)])
words = Tokenizer(models.WordLevel(vocab={"?": 0, "the": 1, "fog": 2}, unk_token="?"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
for name, tokenizer, texts in (("names", names, ["by Dickens.", "a Dickensian"]), ("words", words, ["the fog", "the rain"])):
    tokenizer.save(f"{name}.json")
    cases += [{"name": name, "text": text, "ids": tokenizer.encode(text).ids} for text in texts]
json.dump(cases, open("cases.json", "w"))
PY
cat > show.mjs <<'JS'
import assert from "node:assert";
import { readFileSync } from "node:fs";
import { Tokenizer } from "@huggingface/tokenizers";

const read = (name) => JSON.parse(readFileSync(name));
const same = {};
for (const { name, text, ids } of read("cases.json")) {
  const found = new Tokenizer(read(`${name}.json`), {}).encode(text).ids;
  same[text] = JSON.stringify(found) === JSON.stringify(ids);
  console.log(`${name}, "${text}": Python [${ids}], JavaScript`, found);
}
assert.deepEqual(same, { "by Dickens.": true, "a Dickensian": false, "the fog": true, "the rain": false }, "the ids agree now");
JS
venv/bin/python write.py
echo "@huggingface/tokenizers $(node -p 'JSON.parse(fs.readFileSync("node_modules/@huggingface/tokenizers/package.json")).version')"
node show.mjs
