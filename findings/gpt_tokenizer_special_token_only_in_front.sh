#!/usr/bin/env bash
# Expected: encode(text, { allowedSpecial: "all" }) of npm's gpt-tokenizer makes one id of <|endoftext|> wherever it stands, as tiktoken does
# (its README shows one at the end of a text), so that documents joined by it can be counted and encoded in JavaScript.
# Seen with gpt-tokenizer 4.0.0: behind other text it becomes seven ordinary ids, and behind another end-of-text the ids are those of another
# text: the second one appears twice and what follows it is lost. No error. js-tiktoken 1.0.21 finds all of them. Needs Node 20.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
npm init --yes >/dev/null
npm install --silent --no-fund --no-audit gpt-tokenizer@4.0.0 js-tiktoken@1.0.21
cat > show.mjs <<'JS'
import { readFileSync } from "node:fs";
import { decode, encode } from "gpt-tokenizer/encoding/r50k_base";
import { getEncoding } from "js-tiktoken";

const other = getEncoding("gpt2");
const { version } = JSON.parse(readFileSync("node_modules/gpt-tokenizer/package.json"));
const same = [];
for (const text of ["<|endoftext|>The fog", "The fog<|endoftext|>It was", "<|endoftext|><|endoftext|>It was"]) {
  const [here, there] = [encode(text, { allowedSpecial: "all" }), other.encode(text, "all")];
  same.push(JSON.stringify(here) === JSON.stringify(there));
  console.log(`${text}\n  gpt-tokenizer ${version}: [${here}] = ${JSON.stringify(decode(here))}\n  js-tiktoken 1.0.21: [${there}]`);
}
if (String(same) !== "true,false,false") {
  console.log("special tokens are found elsewhere now");
  process.exit(1);
}
JS
node show.mjs
