"""A shelf of one book in every format that is read: verse, letters, dialogue, a table, footnotes, drop capitals, an accent.

build(folder)                       # the whole shelf; returns the names of its books
TEXT, NOTES                         # what each of them says, in plain text
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from html import escape
from pathlib import Path

TITLE, AUTHOR, YEAR = "The Café at Nôtre Dame & Co.", "Jane Q. Roe", "1853"
NOTES = ["A note about the <café>, in italics.", "The second note."]
NOTE = "\N{REFERENCE MARK}"  # stands in BLOCKS where a mark of the next note is
BLOCKS: list[tuple[str, str]] = [
    ("heading", "Chapter I. — In which it begins"),
    ("drop", f"It was a truth{NOTE} not always told, that Mr. O’Hara & Sons cost £5 at the café — naïve, and 3 < 4."),
    ("p", f"“Oh!” said she; ‘it can’t be.’{NOTE} He laughed… and *left* at 5 * 3 o’clock, with snake_case words."),
    ("p", "“Why [not]?”"),
    ("lines", "My dear Sir,\nI beg to remain,\nYours, # 7"),
    ("verse", "Tyger Tyger, burning bright\nIn the forests of the night"),
    ("verse", "What immortal hand or eye\nCould frame thy fearful symmetry?"),
    ("break", "* * *"),
    ("table", "Item\tPrice\nTea\t2s. 6d.\nCrème\t—"),
    ("p", "1. Not a list, but the last paragraph \\ of {all}; Ελλάς, 漢字, \N{GRINNING FACE}."),
]
TEXT = "\n\n".join(text.replace(NOTE, "") for _, text in BLOCKS)
WHOLE = "\n\n".join([TEXT, *NOTES])

CONTAINER = (
    '<container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles><rootfile '
    'full-path="OEBPS/content.opf" media-type="application/oebps-package+xml"/></rootfiles></container>'
)
W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
WORD_OTHERS = (
    'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006" '
    'xmlns:v="urn:schemas-microsoft-com:vml" xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships"'
)
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"
ODF = "urn:oasis:names:tc:opendocument:xmlns:"
DC = "http://purl.org/dc/elements/1.1/"


def zipped(parts: dict[str, str | bytes], stored: tuple[str, ...] = ()) -> bytes:
    """An archive of these parts, in their order; those named in `stored` are not compressed."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as package:
        for name, content in parts.items():
            package.writestr(name, content, zipfile.ZIP_STORED if name in stored else None)
    return file.getvalue()


def with_notes(text: str, mark: Callable[[int], str], quote: Callable[[str], str]) -> str:
    """`text` in markup: each NOTE becomes the mark of the next note, numbered over the book."""
    before = sum(block.count(NOTE) for _, block in BLOCKS[: [block for _, block in BLOCKS].index(text)])
    first, *rest = map(quote, text.split(NOTE))
    return first + "".join(mark(before + at) + part for at, part in enumerate(rest))


def word_file(body: str, notes: str = "", author: str = "") -> bytes:
    """A Word document with this body, and these footnotes, as WordprocessingML."""
    types = f'<Types xmlns="{PACKAGE}/content-types"><Default Extension="xml" ContentType="application/xml"/></Types>'
    relation = '<Relationship Id="r{}" Type="{}" Target="{}"/>'
    parts: dict[str, str | bytes] = {
        "[Content_Types].xml": types,
        "_rels/.rels": relation.format(1, f"{OFFICE}/officeDocument", "word/document.xml"),
        "word/_rels/document.xml.rels": relation.format(1, f"{OFFICE}/footnotes", "footnotes.xml"),
        "word/document.xml": f"<w:document {W} {WORD_OTHERS}><w:body>{body}</w:body></w:document>",
        "word/footnotes.xml": f"<w:footnotes {W}>{notes}</w:footnotes>",
        "docProps/core.xml": f'<c:x xmlns:c="c" xmlns:dc="{DC}"><dc:creator>{author}</dc:creator></c:x>',
        "word/media/image1.png": b"\x89PNG",
    }
    for name in [name for name in parts if name.endswith(".rels")]:
        parts[name] = f'<Relationships xmlns="{PACKAGE}/relationships">{parts[name]}</Relationships>'
    return zipped(parts)


def run_of(text: str) -> str:
    return f'<w:r><w:t xml:space="preserve">{text}</w:t></w:r>'


def paragraph(*parts: str) -> str:
    """A paragraph of a Word document; parts that are no markup become runs."""
    return f"<w:p>{''.join(part if part.startswith('<') else run_of(part) for part in parts)}</w:p>"


def word_book() -> bytes:
    def block(kind: str, text: str) -> str:
        if kind == "table":
            rows = [f"<w:tr>{''.join(f'<w:tc>{paragraph(escape(cell))}</w:tc>' for cell in row.split(chr(9)))}</w:tr>" for row in text.split("\n")]  # fmt: skip
            return f"<w:tbl>{''.join(rows)}</w:tbl>"
        marked = with_notes(text, lambda at: f'\0<w:r><w:footnoteReference w:id="{at + 2}"/></w:r>\0', lambda part: escape(part, False))  # fmt: skip
        return paragraph(*[part for part in marked.replace("\n", "\0<w:r><w:br/></w:r>\0").split("\0") if part])

    notes = "".join(
        f'<w:footnote w:id="{at + 2}">{paragraph(escape(note, False))}</w:footnote>' for at, note in enumerate(NOTES)
    )
    return word_file("".join(block(*item) for item in BLOCKS), notes, AUTHOR)


def html_blocks(mark: str, rich: bool) -> str:
    """The book as XHTML. mark: how a mark of a note is written, with its number. rich: with what readers leave out."""
    made = []
    for kind, text in BLOCKS:
        inner = with_notes(text, lambda at: mark.format(at + 1), lambda part: escape(part, False))
        inner = inner.replace("é", "&eacute;").replace(" — ", "&nbsp;&mdash; ").replace("&nbsp;&mdash;", " &mdash;")
        if kind == "drop":
            first = '<span class="dropcap">I</span><span class="smallcap">t was</span>' if rich else "It was"
            inner = first + inner.removeprefix("It was")
        if rich:
            inner = inner.replace("always", 'al\xadways<span epub:type="pagebreak" id="p1">12</span>')
            inner = inner.replace("漢字", "<ruby>漢<rt>kan</rt></ruby>字")
        if kind == "table":
            rows = [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row.split(chr(9)))}</tr>" for row in inner.split("\n")]  # fmt: skip
            made.append(f"<table>{''.join(rows)}</table>")
        elif kind == "heading":
            made.append(f"<h1>{inner}</h1>")
        elif kind == "break":
            made.append("<hr/>")
        else:
            made.append("<p>" + inner.replace("\n", "<br/>\n") + "</p>")
    return "\n".join(made)


def html_book() -> bytes:
    notes = "".join(f'<p class="footnote" id="n{at}">{escape(note)}</p>' for at, note in enumerate(NOTES, 1))
    body = html_blocks('<sup><a href="#n{0}">{0}</a></sup>', False) + notes
    head = (
        f'<meta name="author" content="{AUTHOR}"/><meta name="dc.date" content="{YEAR}"/><title>{escape(TITLE)}</title>'
    )
    return f"<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'/>{head}</head><body>{body}</body></html>".encode()


def xhtml_page(body: str, version: int) -> str:
    """A chapter of an EPUB of this version; version 2 has a DOCTYPE that names characters such as `&nbsp;`."""
    doctype = "<!DOCTYPE html>" if version == 3 else (
        '<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.1//EN" "http://www.w3.org/TR/xhtml11/DTD/xhtml11.dtd">'
    )  # fmt: skip
    return (
        f'<?xml version="1.0" encoding="utf-8"?>{doctype}<html xmlns="http://www.w3.org/1999/xhtml" '
        f'xmlns:epub="http://www.idpf.org/2007/ops"><head><title>t</title></head><body>{body}</body></html>'
    )


def epub(chapters: dict[str, str], version: int = 3, spine: str = "", parts: dict[str, str] | None = None) -> bytes:
    """An EPUB whose chapters (name -> body) are read in the order of their names, although listed the other way round.

    spine: its entries, where they are to be others. parts: further parts.
    """
    manifest = "".join(
        f'<item id="{name}" href="{name}.xhtml" media-type="application/xhtml+xml"/>' for name in reversed(chapters)
    )
    navigation = xhtml_page(
        '<nav epub:type="toc"><ol><li><a href="c1.xhtml">Contents here</a></li></ol></nav>', version
    )
    if version == 3:
        manifest += '<item id="nav" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>'
    else:
        manifest += '<item id="ncx" href="toc.ncx" media-type="application/x-dtbncx+xml"/>'
        manifest += '<item id="nav" href="nav.xhtml" media-type="application/xhtml+xml"/>'
    spine = spine or "".join(f'<itemref idref="{name}"/>' for name in ["nav", *sorted(chapters)])
    guide = '<guide><reference type="toc" title="Contents" href="nav.xhtml"/></guide>' if version == 2 else ""
    package = (
        f'<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf" version="{version}.0" unique-identifier="id"><metadata '
        f'xmlns:dc="{DC}" xmlns:opf="http://www.idpf.org/2007/opf"><dc:title>{escape(TITLE)}</dc:title><dc:creator>{AUTHOR}</dc:creator>'
        f'<dc:language>en</dc:language><dc:date>{YEAR}-05-01</dc:date><dc:identifier id="id">urn:uuid:b3c7f9c4-2b8e-4f4e-9d0a-0c5d8a1f2e3d'
        f"</dc:identifier>{'<meta property=' + chr(34) + 'dcterms:modified' + chr(34) + '>2020-01-01T00:00:00Z</meta>' if version == 3 else ''}"
        f"</metadata><manifest>{manifest}</manifest><spine{' toc=' + chr(34) + 'ncx' + chr(34) if version == 2 else ''}>{spine}</spine>{guide}</package>"
    )
    ncx = (
        '<ncx xmlns="http://www.daisy.org/z3986/2005/ncx/" version="2005-1"><head><meta name="dtb:uid" '
        'content="urn:uuid:b3c7f9c4-2b8e-4f4e-9d0a-0c5d8a1f2e3d"/></head><docTitle><text>t</text></docTitle><navMap>'
        '<navPoint id="a" playOrder="1"><navLabel><text>Contents here</text></navLabel><content src="nav.xhtml"/></navPoint>'
        "</navMap></ncx>"
    )
    files: dict[str, str | bytes] = {"mimetype": "application/epub+zip", "META-INF/container.xml": CONTAINER}
    files |= {"OEBPS/content.opf": package, "OEBPS/nav.xhtml": navigation if version == 3 else xhtml_page("<p><a href='c1.xhtml'>Contents here</a></p>", 2)}  # fmt: skip
    files |= {"OEBPS/toc.ncx": ncx} if version == 2 else {}
    files |= {f"OEBPS/{name}.xhtml": xhtml_page(body, version) for name, body in chapters.items()}
    return zipped(files | (parts or {}), ("mimetype",))


def epub_book(version: int) -> bytes:
    if version == 3:
        notes = "".join(f'<aside epub:type="footnote" id="n{at}"><p>{escape(note)}</p></aside>' for at, note in enumerate(NOTES, 1))  # fmt: skip
        mark = '<a epub:type="noteref" href="#n{0}">{0}</a>'
    else:
        notes = "".join(f'<div class="footnote" id="n{at}"><p>{escape(note)}</p></div>' for at, note in enumerate(NOTES, 1))  # fmt: skip
        mark = '<sup><a href="#n{0}">{0}</a></sup>'
    body = html_blocks(mark, version == 3)
    if version == 3:  # whose DOCTYPE names no characters
        body = body.replace("&eacute;", "&#233;").replace("&mdash;", "&#8212;")
    cut = body.index("<hr/>")
    chapters = {"c1": body[:cut] + notes, "c2": "<div>" + body[cut:] + "</div>"}
    return epub(chapters, version)


def markdown_book() -> bytes:
    def quote(text: str) -> str:
        text = "".join("\\" + char if char in "\\*_[]{}<#" else char for char in text)
        return "1\\. " + text[3:] if text.startswith("1. ") else text

    made = []
    for kind, text in BLOCKS:
        inner = with_notes(text, lambda at: f"[^{at + 1}]", quote)
        if kind == "table":
            head, *rows = [f"| {' | '.join(row.split(chr(9)))} |" for row in inner.split("\n")]
            inner = "\n".join([head, "|---|---|", *rows])
        elif kind == "break":
            inner = "* * *"
        elif kind == "drop":
            inner = inner.replace("truth", "*truth*").replace(" that ", "\nthat ")
        made.append("# " + inner if kind == "heading" else inner.replace("\n", "\\\n") if kind in ("lines", "verse") else inner)  # fmt: skip
    made += [f"[^{at}]: {quote(note)}" for at, note in enumerate(NOTES, 1)]
    return f'---\ntitle: "{TITLE}"\nauthor: {AUTHOR}\ndate: {YEAR}\n---\n\n{"".join(part + chr(10) * 2 for part in made)}'.encode()  # fmt: skip


def fb2_book(encoding: str = "utf-8") -> bytes:
    made = []
    for kind, text in BLOCKS:
        inner = with_notes(text, lambda at: f'<a l:href="#n{at + 1}" type="note">[{at + 1}]</a>', lambda part: escape(part, False))  # fmt: skip
        lines = inner.split("\n")
        if kind == "heading":
            made.append(f"<title><p>{inner}</p></title>")
        elif kind == "verse":
            made.append(f"<stanza>{''.join(f'<v>{line}</v>' for line in lines)}</stanza>")
        elif kind == "lines":
            made.append(f"<poem><stanza>{''.join(f'<v>{line}</v>' for line in lines)}</stanza></poem>")
        elif kind == "break":
            made.append("<subtitle>* * *</subtitle>")
        elif kind == "table":
            made.append(f"<table>{''.join('<tr>' + ''.join(f'<td>{cell}</td>' for cell in line.split(chr(9))) + '</tr>' for line in lines)}</table>")  # fmt: skip
        else:
            made.append(f"<p>{inner}</p>")
    notes = "".join(f'<section id="n{at}"><title><p>{at}</p></title><p>{escape(note)}</p></section>' for at, note in enumerate(NOTES, 1))  # fmt: skip
    body = "".join(made).replace("<stanza><v>Tyger", "<poem><stanza><v>Tyger").replace("symmetry?</v></stanza>", "symmetry?</v></stanza></poem>")  # fmt: skip
    book = (
        f'<?xml version="1.0" encoding="{encoding}"?><FictionBook xmlns="http://www.gribuser.ru/xml/fictionbook/2.0" '
        f'xmlns:l="http://www.w3.org/1999/xlink"><description><title-info><genre>prose</genre><author><first-name>Jane</first-name>'
        f"<middle-name>Q.</middle-name><last-name>Roe</last-name></author><book-title>{escape(TITLE)}</book-title>"
        f"<date>{YEAR}</date><lang>en</lang></title-info></description><body><section>{body}</section></body>"
        f'<body name="notes">{notes}</body><binary id="x" content-type="image/png">AAAA</binary></FictionBook>'
    )
    return book.encode(encoding, "xmlcharrefreplace")


def odt_book(encrypted: bool = False) -> bytes:
    made = []
    for kind, text in BLOCKS:
        inner = with_notes(text, lambda at: f'<text:note text:note-class="footnote"><text:note-citation>{at + 1}</text:note-citation><text:note-body><text:p>{escape(NOTES[at])}</text:p></text:note-body></text:note>', lambda part: escape(part, False))  # fmt: skip
        if kind == "heading":
            made.append(f'<text:h text:outline-level="1">{inner}</text:h>')
        elif kind == "table":
            rows = ["<table:table-row>" + "".join(f"<table:table-cell><text:p>{cell}</text:p></table:table-cell>" for cell in row.split("\t")) + "</table:table-row>" for row in inner.split("\n")]  # fmt: skip
            made.append(f"<table:table>{''.join(rows)}</table:table>")
        else:
            inner = inner.replace("\n", "<text:line-break/>").replace("truth", "<text:span>truth</text:span>")
            made.append(f"<text:p>{inner}</text:p>")
    body = (
        "<text:tracked-changes><text:changed-region><text:deletion><text:p>gone</text:p></text:deletion></text:changed-region>"
        "</text:tracked-changes><text:table-of-content><text:index-body><text:p>Chapter I 7</text:p></text:index-body></text:table-of-content>"
        + "\n  ".join(made)
    )
    spaces = " ".join(f'xmlns:{name}="{ODF}{name}:1.0"' for name in ("office", "text", "table", "meta", "manifest"))
    locked = "<manifest:encryption-data/>" if encrypted else ""
    return zipped(
        {
            "mimetype": "application/vnd.oasis.opendocument.text",
            "content.xml": f"<office:document-content {spaces}><office:body><office:text>{body}</office:text></office:body></office:document-content>",
            "meta.xml": f'<office:document-meta {spaces} xmlns:dc="{DC}"><office:meta><dc:title>{escape(TITLE)}</dc:title><meta:initial-creator>{AUTHOR}</meta:initial-creator><meta:creation-date>{YEAR}-01-01</meta:creation-date></office:meta></office:document-meta>',
            "META-INF/manifest.xml": f'<manifest:manifest {spaces}><manifest:file-entry manifest:full-path="content.xml">{locked}</manifest:file-entry></manifest:manifest>',
        },
        ("mimetype",),
    )


def rtf_book() -> bytes:
    def quote(text: str) -> str:
        units = text.encode("utf-16-le")
        numbers = [int.from_bytes(units[at : at + 2], "little") for at in range(0, len(units), 2)]
        return "".join("\\" + chr(n) if chr(n) in "\\{}" else chr(n) if n < 128 else f"\\'{n:02x}" if n < 256 else f"\\u{n if n < 32768 else n - 65536}?" for n in numbers)  # fmt: skip

    made = []
    for kind, text in BLOCKS:
        inner = with_notes(text, lambda at: "{\\super\\chftn}{\\footnote\\pard\\plain{\\super\\chftn} " + quote(NOTES[at]) + "}", quote)  # fmt: skip
        if kind == "table":
            made += ["{\\trowd\\cellx1000\\cellx2000\\intbl " + "".join(f"{cell}\\cell " for cell in row.split("\t")) + "\\row}\n" for row in inner.split("\n")]  # fmt: skip
        else:
            made.append("\\pard " + inner.replace("\n", "\\line ").replace("truth", "{\\i truth}") + "\\par\n")
    info = f"{{\\info{{\\title {quote(TITLE)}}}{{\\author {AUTHOR}}}{{\\creatim\\yr{YEAR}\\mo1}}}}"
    return f"{{\\rtf1\\ansi\\ansicpg1252\\deff0{{\\fonttbl{{\\f0 Times;}}}}{info}{''.join(made)}}}".encode("ascii")


def parquet_book() -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": [WHOLE]}), file)
    return file.getvalue()


def tarred(parts: dict[str, bytes], mode: str = "w:gz") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def books() -> dict[str, bytes]:
    """Name and content of each book of the shelf; each holds the same text, WHOLE."""
    plain = (WHOLE + "\n").encode()
    return {
        "plain.txt": plain,
        "page.html": html_book(),
        "notes.md": markdown_book(),
        "two.epub": epub_book(2),
        "three.epub": epub_book(3),
        "fiction.fb2": fb2_book(),
        "word.docx": word_book(),
        "open.odt": odt_book(),
        "rich.rtf": rtf_book(),
        "packed.txt.gz": gzip.compress(plain, mtime=0),
        "books.zip": zipped({"inner/fiction.fb2": fb2_book("windows-1251"), "inner/cover.jpg": b"\xff\xd8\xff"}),
        "books.tar.gz": tarred({"rich.rtf": rtf_book()}),
        "list.json": json.dumps([{"text": WHOLE}]).encode(),
        "rows.jsonl": json.dumps({"text": WHOLE}).encode() + b"\n",
        "rows.parquet": parquet_book(),
    }


def build(folder: Path) -> list[str]:
    """Write the shelf into `folder`; returns the names of the books. Beside them lie a picture and an encrypted book."""
    folder.mkdir(parents=True, exist_ok=True)
    made = books()
    locked = '<encryption xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><EncryptedData xmlns="http://www.w3.org/2001/04/xmlenc#"><EncryptionMethod Algorithm="http://www.w3.org/2001/04/xmlenc#aes128-cbc"/><CipherData><CipherReference URI="OEBPS/c1.xhtml"/></CipherData></EncryptedData></encryption>'  # fmt: skip
    others = {
        "cover.jpg": b"\xff\xd8\xff\xe0",
        "drm.epub": epub({"c1": "x"}, parts={"META-INF/encryption.xml": locked}),
    }
    for name, data in (made | others).items():
        (folder / name).write_bytes(data)
    return list(made)
