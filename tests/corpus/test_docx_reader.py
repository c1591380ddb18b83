"""readers/docx.py: what is kept of a Word document, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from corpus.documents import ReadOptions
from corpus.finder import inspect
from corpus.readers.docx import DocxFile
from storage.shards import Manifest
from support.samples import run, told
from support.shelf import paragraph, run_of, word_file, zipped


def text_of(data: bytes, folder: Path) -> str:
    (folder / "a.docx").write_bytes(data)
    return DocxFile.extract(folder / "a.docx").whole(ReadOptions())


CELL = "<w:tc><w:p><w:r><w:t>{}</w:t></w:r></w:p></w:tc>"
TABLE = "<w:tbl>" + 2 * ("<w:tr>" + CELL.format("one") + CELL.format("two") + "</w:tr>") + "</w:tbl>"
BOX = (
    "<w:r><mc:AlternateContent><mc:Choice/><mc:Fallback><w:pict><v:textbox><w:txbxContent>"
    + paragraph("boxed")
    + "</w:txbxContent></v:textbox></w:pict></mc:Fallback></mc:AlternateContent></w:r>"
)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (paragraph("It was ", "<w:r><w:rPr><w:b/></w:rPr><w:t>dark</w:t></w:r>", "; so.") + paragraph("Then"), "It was dark; so.\n\nThen"),
        (paragraph("Tyger,", "<w:r><w:br/></w:r>", "burning", "<w:r><w:cr/></w:r>", "bright"), "Tyger,\nburning\nbright"),
        (paragraph("a", "<w:r><w:br w:type='page'/></w:r>", "b"), "a\nb"),
        (paragraph("two  spaces", "<w:r><w:tab/></w:r>", "a tab"), "two  spaces\ta tab"),
        (paragraph("a") * 3 + paragraph() + paragraph("b") * 3, "a\n\na\n\na\n\n\nb\n\nb\n\nb"),
        ((paragraph("a") + paragraph()) * 3, "a\n\na\n\na"),
        (TABLE, "one\ttwo\none\ttwo"),
        (paragraph("kept ", f"<w:ins w:id='1'>{run_of('new ')}</w:ins>", "<w:del w:id='2'><w:r><w:delText>old</w:delText></w:r></w:del>", "end"), "kept new end"),
        (paragraph("in ", f"<w:smartTag w:element='place'>{run_of('London')}</w:smartTag>", " town"), "in London town"),
        (f"<w:sdt><w:sdtContent>{paragraph('controlled')}</w:sdtContent></w:sdt>", "controlled"),
        (paragraph("soft", "<w:r><w:softHyphen/></w:r>", "en non", "<w:r><w:noBreakHyphen/></w:r>", "stop"), "soften non\u2011stop"),
        (paragraph("a", BOX), "a\n\nboxed"),
        (paragraph("on ", f"<w:r><w:ruby><w:rt>{run_of('kan')}</w:rt><w:rubyBase>{run_of('漢')}</w:rubyBase></w:ruby></w:r>", "字"), "on 漢字"),
        (paragraph("page ", "<w:r><w:fldChar w:fldCharType='begin'/><w:instrText>PAGE</w:instrText><w:fldChar w:fldCharType='separate'/></w:r>", "7", "<w:r><w:fldChar w:fldCharType='end'/></w:r>"), "page 7"),
        (paragraph("seen", "<w:r><w:rPr><w:vanish/></w:rPr><w:t> unseen</w:t></w:r>", "<w:r><w:rPr><w:vanish w:val='0'/></w:rPr><w:t>, too</w:t></w:r>"), "seen, too"),
        (paragraph("on ", f"<w:fldSimple w:instr=' DATE '>{run_of('the first of May')}</w:fldSimple>", " we went"), "on the first of May we went"),
        (paragraph("see ", f"<w:fldSimple w:instr='REF'><w:fldSimple w:instr='REF'>{run_of('below')}</w:fldSimple></w:fldSimple>"), "see below"),
        (paragraph("so ", f"<w:dir w:val='rtl'>{run_of('it ')}<w:bdo w:val='ltr'>{run_of('was')}</w:bdo></w:dir>"), "so it was"),
    ],
)  # fmt: skip
def test_paragraphs_lines_and_all_text_are_kept(body: str, text: str, tmp_path: Path) -> None:
    assert text_of(word_file(body), tmp_path) == text


def test_notes_come_at_the_end_and_their_marks_go(tmp_path: Path) -> None:
    body = paragraph("Noted", '<w:r><w:footnoteReference w:id="2"/></w:r>', ".") + paragraph("More.")
    notes = f'<w:footnote w:id="2">{paragraph("The note.")}</w:footnote>'
    assert text_of(word_file(body, notes), tmp_path) == "Noted.\n\nMore.\n\nThe note."


def locked_archive() -> bytes:
    """A document whose archive says that its entries need a password."""
    data = bytearray(word_file(paragraph("x")))
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(signature)
        while at >= 0:
            data[at + flags] |= 1
            at = data.find(signature, at + 1)
    return bytes(data)


def other_archive() -> bytes:
    return zipped({"mimetype": "application/epub+zip"})


OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(512)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"just text", "not a Word document"),
        (OLE + "EncryptedPackage".encode("utf-16-le"), "encrypted: open it with its password"),
        (OLE + "WordDocument".encode("utf-16-le"), "Word before 2007 (.doc)"),
        (locked_archive(), "encrypted: unpack it with its password"),
        (word_file(paragraph("x" * 5000))[:-300], "damaged or incomplete"),
        (word_file(paragraph("x"))[:40], "damaged or incomplete"),
        (other_archive(), "not a Word document (it holds no word/document.xml)"),
        (word_file("<w:p><w:r>"), "not a Word document that can be read"),
    ],
    ids=["text", "encrypted", "doc", "locked zip", "cut", "cut short", "another zip", "broken xml"],  # no bytes:
)  # an archive holds the time, and each process of the tests must collect the same names
def test_what_cannot_be_read_is_named_with_its_remedy_and_the_rest_is_prepared(
    data: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "bad.docx").write_bytes(data)
    assert run("--input", texts, "--tokenizer", "char", "--out", tmp_path / "out") == 1  # alone
    error = capsys.readouterr().err
    assert "1 of 1 files cannot be read" in error and "bad.docx: " in error and message in error
    assert not (tmp_path / "out").exists()
    for name in ("one", "two"):
        (texts / f"{name}.docx").write_bytes(word_file(paragraph(f"The text of {name}.")))
    assert run("--input", texts, "--tokenizer", "char", "--out", tmp_path / "out") == 0  # among others
    error = capsys.readouterr().err
    assert "2 of 3 files read; 1 skipped: bad.docx (" in error and message in error
    assert sorted(told(tmp_path / "out", "train") + told(tmp_path / "out", "val")) == [
        "The text of one.",
        "The text of two.",
    ]
    assert Manifest.load(tmp_path / "out").cleaning == {"skipped_files": 1}


def test_a_document_tells_its_author(tmp_path: Path) -> None:
    for name, author in (("one", "Jane Roe"), ("two", "John Doe"), ("three", "Jane Roe")):
        (tmp_path / f"{name}.docx").write_bytes(word_file(paragraph("Some text."), author=author))
    assert run("--input", tmp_path, "--tokenizer", "char", "--control", "author", "--out", tmp_path / "out") == 0
    assert Manifest.load(tmp_path / "out").tokenizer.styles.keys() == {"jane-roe", "john-doe"}


def test_an_empty_document_is_no_document(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_bytes(word_file(paragraph() * 5))
    file = inspect(tmp_path / "a.docx", "a.docx", ReadOptions())
    assert not isinstance(file, str) and file.documents == 0
