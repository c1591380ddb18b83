#!/usr/bin/env bash
# Expected: Paragraph.text of python-docx holds the words that Word shows, hyperlinks included, as its documentation says.
# Seen with python-docx 1.2.0: what a reviser inserted with change tracking on (<w:ins>) is left out, as is what stands in a content control
# (<w:sdt>) or a field (<w:fldSimple>) inside a line. No warning: a manuscript that came back from its editor loses words in mid-sentence, and only those
# that were changed. mammoth 1.13.0 keeps the first two and drops the field as well.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check python-docx==1.2.0 mammoth==1.13.0 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import io

import docx
import mammoth
from docx.oxml import parse_xml

W = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
YELLOW = "<w:r><w:t>yellow</w:t></w:r>"
CASES = {
    "a run": YELLOW,
    "a tracked insertion": f'<w:ins w:id="1" w:author="E" w:date="2020-01-01T00:00:00Z">{YELLOW}</w:ins>',
    "a content control": f"<w:sdt><w:sdtContent>{YELLOW}</w:sdtContent></w:sdt>",
    "a field": f'<w:fldSimple w:instr="TITLE">{YELLOW}</w:fldSimple>',
}
print(f"python-docx {docx.__version__}, mammoth 1.13.0")
found = {}
for name, middle in CASES.items():
    document = docx.Document()
    start, end = ('<w:r><w:t xml:space="preserve">The </w:t></w:r>', '<w:r><w:t xml:space="preserve"> fog</w:t></w:r>')
    document.element.body.insert(0, parse_xml(f'<w:p xmlns:w="{W}">{start}{middle}{end}</w:p>'))
    file = io.BytesIO()
    document.save(file)
    found[name] = docx.Document(file).paragraphs[0].text
    other = mammoth.extract_raw_text(file).value.strip()
    print(f"{name}: {found[name]!r}, by mammoth {other!r}")
    assert other == ("The  fog" if name == "a field" else "The yellow fog"), "mammoth reads these otherwise now"
assert list(found.values()) == ["The yellow fog", "The  fog", "The  fog", "The  fog"], "python-docx keeps these words now"
PY
