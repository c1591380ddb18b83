#!/usr/bin/env bash
# Expected: textstat.sentence_count "returns the number of sentences present in the given text", and the readability formulas divide the words by it.
# Seen with textstat 0.7.13: sentences of one or two words are not counted, though their words are, and the full stop of "Mr." ends one that never was. So
# eight sentences of brisk dialogue count as two, and it is rated as harder to read than one long sentence of plain words. Of a novel's chapters those with
# the most talk are measured worst.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check textstat==0.7.13 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import importlib.metadata

import textstat

talk = '"Is he come?" "Yes." "Who?" "Mr. Dombey." "When?" "At noon." "Oh!" The door was shut again.'  # eight sentences
prose = "The door was shut again and nobody came to open it for the whole of the evening."  # one
found = [(textstat.sentence_count(text), round(textstat.automated_readability_index(text), 1)) for text in (talk, prose)]
print(f"textstat {importlib.metadata.version('textstat')}: sentences and readability index of the dialogue and of the prose: {found}")
print(f"'She met Mr. Dombey at the door.': {textstat.sentence_count('She met Mr. Dombey at the door.')} sentences")
assert found[1][0] == 1 and found[0][0] == 2, "short sentences count now"
assert found[0][1] > found[1][1]
assert textstat.sentence_count("She met Mr. Dombey at the door.") == 2, "Mr. ends no sentence now"
PY
