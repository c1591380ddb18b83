#!/usr/bin/env bash
# Expected: trafilatura.extract removes repeated paragraphs only where deduplicate=True asks for it ("Remove duplicate segments and documents"; the default
# is False), so a poem keeps its refrain.
# Seen with trafilatura 2.3.1: of two equal paragraphs in a row, of more than 50 characters each, one goes, whatever the options: a ballad whose long line is
# sung twice has it once. Shorter ones, and those with another line between, stay. A <q>, HTML's element for spoken words, ends its line and loses
# its quotation marks besides. No warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check trafilatura==2.3.1 lxml_html_clean==0.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import trafilatura

OPENING = "It was a dull evening in November when the carrier came to the inn, and the landlord had gone to bed."
CLOSING = "So ends the tale of the carrier, which the people of the valley tell on winter nights to this day."
SHORT = "Toll slowly, bells of the river."
LONG = "Toll slowly, toll for the river and the fog and the drowned men."


def lines(*paragraphs, **options):
    page = "".join(f"<p>{paragraph}</p>" for paragraph in (OPENING, *paragraphs, CLOSING))
    text = trafilatura.extract(f"<html><body><article><h1>I</h1>{page}</article></body></html>", **options).split("\n")
    assert text[:2] == ["I", OPENING] and text[-1] == CLOSING
    return text[2:-1]


print(f"trafilatura {trafilatura.__version__}")
kept = []
for paragraphs in ([SHORT, SHORT], [LONG, LONG], [LONG, LONG, LONG], [LONG, SHORT, LONG]):
    for options in ({}, {"deduplicate": False, "favor_recall": True}):
        kept.append(len(lines(*paragraphs, **options)))
        print(f"lines of {', '.join(str(len(text)) for text in paragraphs)} characters, {options}: {kept[-1]} of {len(paragraphs)}")
spoken = lines("The host said <q>No</q> and went to bed.")
print(f"a sentence with <q>: {spoken}")
assert kept[:2] == [2, 2] and kept[-2:] == [3, 3]
assert kept[2:6] == [1, 1, 1, 1], "repeated long lines are kept now"
assert len(spoken) == 2, "a sentence with <q> stays in one line now"
PY
