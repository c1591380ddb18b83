#!/usr/bin/env bash
# Expected: EbookLib's get_body_content gives the text of any chapter that the EPUB standard allows: XHTML, so XML, in UTF-8 or UTF-16.
# Seen with EbookLib 0.20 and lxml 6.1.3: it reads chapters as HTML and as UTF-8. One in UTF-16 has an empty body, and text in a CDATA section becomes a comment;
# neither raises. read_epub followed by write_epub loses the CDATA text for good. (The product reads EPUB itself, as XML.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check EbookLib==0.20 lxml==6.1.3 2>/dev/null
"$folder/venv/bin/python" - "$folder/book.epub" 2>/dev/null <<'PY'
import sys
import zipfile
from importlib.metadata import version

from ebooklib import epub

CONTAINER = (
    '<container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
    '<rootfile full-path="book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>'
)
PACKAGE = (
    '<package xmlns="http://www.idpf.org/2007/opf" version="3.0" unique-identifier="id">'
    '<metadata xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:identifier id="id">urn:x:1</dc:identifier><dc:title>Letters</dc:title>'
    '<dc:language>en</dc:language><meta property="dcterms:modified">2020-01-01T00:00:00Z</meta></metadata>'
    '<manifest><item id="nav" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>'
    '<item id="one" href="one.xhtml" media-type="application/xhtml+xml"/></manifest><spine><itemref idref="one"/></spine></package>'
)
PAGE = (
    '<?xml version="1.0" encoding="{}"?>\n<html xmlns="http://www.w3.org/1999/xhtml" xmlns:epub="http://www.idpf.org/2007/ops">'
    "<head><title>Letters</title></head><body>{}</body></html>"
)
NAVIGATION = PAGE.format("UTF-8", '<nav epub:type="toc"><ol><li><a href="one.xhtml">One</a></li></ol></nav>')
CASES = {
    "UTF-8": ("<p>Dear Sister, five &amp; six</p>", True),
    "UTF-16": ("<p>Dear Sister, five &amp; six</p>", False),
    "UTF-8, CDATA": ("<p><![CDATA[Dear Sister, five & six]]></p>", False),
}
print("EbookLib", version("EbookLib"), "lxml", version("lxml"))
for name, (body, right) in CASES.items():
    encoding = name.split(",")[0]
    with zipfile.ZipFile(sys.argv[1], "w") as archive:
        archive.writestr("mimetype", "application/epub+zip")
        archive.writestr("META-INF/container.xml", CONTAINER)
        archive.writestr("book.opf", PACKAGE)
        archive.writestr("nav.xhtml", NAVIGATION)
        archive.writestr("one.xhtml", PAGE.format(encoding, body).encode(encoding))
    found = epub.read_epub(sys.argv[1]).get_item_with_id("one").get_body_content().decode()
    print(f"{name}: {found.strip()!r}")
    if ("<p>Dear Sister, five &amp; six</p>" in found) != right:
        print("such chapters are read otherwise now")
        sys.exit(1)
PY
