#!/usr/bin/env bash
# Expected: the paragraphs of an OpenDocument text, read with odfpy's getElementsByType and teletype.extractText as its examples do, are what the book's
# reader sees.
# Seen with odfpy 1.4.1: a paragraph that was deleted with change tracking on comes back, at the very front, because the format keeps it there until
# the change is accepted. An editor's comment stands in the middle of the sentence it is about, with the editor's name and the date, and so does a footnote with
# its number; both follow a second time as paragraphs of their own. No warning. Take text:tracked-changes, office:annotation and text:note out first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check odfpy==1.4.1 2>/dev/null
"$folder/venv/bin/python" - "$folder/tale.odt" <<'PY'
import importlib.metadata
import sys
import zipfile

from odf import teletype
from odf.opendocument import load
from odf.text import P

OASIS = "urn:oasis:names:tc:opendocument:xmlns"
SIGNED = "<dc:creator>Editor</dc:creator><dc:date>2026-01-02T03:04:05</dc:date>"
CONTENT = f"""<?xml version="1.0" encoding="UTF-8"?>
<office:document-content xmlns:office="{OASIS}:office:1.0" xmlns:text="{OASIS}:text:1.0"
 xmlns:dc="http://purl.org/dc/elements/1.1/" office:version="1.3"><office:body><office:text>
<text:tracked-changes><text:changed-region text:id="c1"><text:deletion><office:change-info>{SIGNED}</office:change-info>
<text:p>It was all a dream.</text:p></text:deletion></text:changed-region></text:tracked-changes>
<text:p>The fog<office:annotation>{SIGNED}<text:p>Is this so?</text:p></office:annotation> lay on the river<text:note
 text:note-class="footnote"><text:note-citation>1</text:note-citation><text:note-body><text:p>The Thames.</text:p></text:note-body>
</text:note>.</text:p><text:change text:change-id="c1"/></office:text></office:body></office:document-content>"""
MANIFEST = f"""<manifest:manifest xmlns:manifest="{OASIS}:manifest:1.0" manifest:version="1.3">
<manifest:file-entry manifest:full-path="/" manifest:media-type="application/vnd.oasis.opendocument.text"/>
<manifest:file-entry manifest:full-path="content.xml" manifest:media-type="text/xml"/></manifest:manifest>"""
with zipfile.ZipFile(sys.argv[1], "w") as packed:
    packed.writestr("mimetype", "application/vnd.oasis.opendocument.text")
    packed.writestr("content.xml", CONTENT)
    packed.writestr("META-INF/manifest.xml", MANIFEST)

print(f"odfpy {importlib.metadata.version('odfpy')}; the reader sees 'The fog lay on the river.' with a footnote")
found = [teletype.extractText(element) for element in load(sys.argv[1]).getElementsByType(P)]
print(*map(repr, found), sep="\n")
assert any("The fog" in text and "river" in text for text in found)
assert found[0] == "It was all a dream.", "deleted text stays away now"
assert "The fog lay on the river." not in found, "comments and notes stay out of the sentence now"
PY
