#!/usr/bin/env bash
# mammoth 1.13.0 drops what a Word run holds in <w:cr/> and <w:ruby>: words on both sides of a carriage return join, and
# a word with a reading above it vanishes altogether. <w:br/>, which looks the same in Word, becomes a line break.
# What one would expect: <w:cr/> is a line break (ECMA-376 part 1, 17.3.3.4), the base text of a ruby stays.
# Exit code 0 while this is so, 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check mammoth==1.13.0
"$folder/venv/bin/python" - "$folder/letter.docx" <<'PY'
import sys
import zipfile

import mammoth

W = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
TYPES = "http://schemas.openxmlformats.org/package/2006/content-types"
RELATIONS = "http://schemas.openxmlformats.org/package/2006/relationships"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"
MAIN = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"

RUBY = (
    "<w:ruby><w:rubyPr/><w:rt><w:r><w:t>reading</w:t></w:r></w:rt>"
    "<w:rubyBase><w:r><w:t>base</w:t></w:r></w:rubyBase></w:ruby>"
)
BODY = (
    "<w:p><w:r><w:t>Dear</w:t><w:br/><w:t>Sister</w:t></w:r></w:p>"
    "<w:p><w:r><w:t>Dear</w:t><w:cr/><w:t>Sister</w:t></w:r></w:p>"
    f'<w:p><w:r><w:t xml:space="preserve">one </w:t></w:r><w:r>{RUBY}</w:r><w:r><w:t xml:space="preserve"> two</w:t></w:r></w:p>'
)
with zipfile.ZipFile(sys.argv[1], "w") as archive:
    archive.writestr(
        "[Content_Types].xml",
        f'<Types xmlns="{TYPES}"><Default Extension="rels" ContentType='
        '"application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/word/document.xml" ContentType="{MAIN}"/></Types>',
    )
    archive.writestr(
        "_rels/.rels",
        f'<Relationships xmlns="{RELATIONS}"><Relationship Id="r1" Type="{OFFICE}" Target="word/document.xml"/></Relationships>',
    )
    archive.writestr("word/document.xml", f'<w:document xmlns:w="{W}"><w:body>{BODY}</w:body></w:document>')
with open(sys.argv[1], "rb") as file:
    found = mammoth.convert_to_html(file)
print(found.value)
for message in found.messages:
    print(message.type, message.message)
seen = "<p>Dear<br />Sister</p><p>DearSister</p><p>one  two</p>"
if found.value != seen:
    sys.exit("mammoth reads them otherwise now")
PY
