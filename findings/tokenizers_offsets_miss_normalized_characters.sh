#!/usr/bin/env bash
# Expected: the offsets of an encoding are a token's place in the original text, so that text[start:end] is what the token came from and nothing lies between
# two tokens that touch.
# Seen with tokenizers 0.23.3: where a normalizer makes one character of two, the offsets cover only one of them: after NFC the letter without its accent,
# after Replace the last one of those replaced. Notes, quotations and highlights cut by offsets lose characters.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import tokenizers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

print(f"tokenizers {tokenizers.__version__}")
CASES = {
    "no normalizer": (None, "cafe\u0301", ["c", "a", "f", "e", "\u0301"]),
    "NFC": (normalizers.NFC(), "cafe\u0301", ["c", "a", "f", "e"]),
    "Replace('--', dash)": (normalizers.Replace("--", "\u2014"), "fog--rain", [*"fog", "-", *"rain"]),
}
for name, (normalizer, text, seen) in CASES.items():
    letters = {letter: i for i, letter in enumerate(sorted(set("cafoginr\u00e9e\u0301\u2014")))}
    tokenizer = Tokenizer(models.WordLevel(vocab=letters, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if normalizer:
        tokenizer.normalizer = normalizer
    encoding = tokenizer.encode(text)
    parts = [text[start:end] for start, end in encoding.offsets]
    print(f"{name}: {ascii(text)}, offsets {encoding.offsets} = {ascii(''.join(parts))}")
    assert parts == seen, "the offsets cover other characters now"
PY
