#!/usr/bin/env bash
# striprtf turns Rich Text into plain text. Expected: a footnote's text is kept, at its place or at the end, as its tables' cells are.
# Seen with striprtf 0.0.35: the footnote is gone without a word, and a character beyond U+FFFF, which RTF writes as two numbers, comes back as
# two halves of a surrogate pair that cannot be encoded as UTF-8. corpus/readers/rtf.py takes the notes out first and joins the halves.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check striprtf==0.0.35
"$folder/venv/bin/python" - <<'PYTHON'
from striprtf.striprtf import rtf_to_text

text = rtf_to_text(r"{\rtf1\ansi Noted{\super\chftn}{\footnote\pard\plain{\super\chftn} The note.} here.}")
print("a footnote:", repr(text))
assert text == "Noted here.", "the note is kept now"
text = rtf_to_text(r"{\rtf1\ansi \u-10179?\u-8704?}")
print("a character beyond U+FFFF:", ascii(text))
assert text == "\ud83d\ude00", "the halves are joined now"
PYTHON
