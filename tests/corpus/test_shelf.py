"""One book in every format, and what is not read of a folder: the text is the same, character for character."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from corpus.documents import ReadOptions
from corpus.finder import inspect, search
from storage.catalogue import Catalogue
from storage.shards import Manifest
from support import shelf
from support.samples import run, told

BOOKS = shelf.books()


def texts_of(name: str, data: bytes, folder: Path, **options: bool) -> list[str]:
    """The documents in a file of this name and content."""
    (folder / name).write_bytes(data)
    read = ReadOptions(**options)  # type: ignore[arg-type]
    found = []
    for path, own in search([str(folder / name)], folder / "unpacked").files:
        file = inspect(path, own, read)
        assert not isinstance(file, str), file
        found += [piece.text for chunk in file.chunks(0) for piece in chunk.read(read)]
    return found


@pytest.mark.parametrize("name", BOOKS)
def test_every_format_gives_the_text_character_for_character(name: str, tmp_path: Path) -> None:
    assert [text.rstrip("\n") for text in texts_of(name, BOOKS[name], tmp_path)] == [shelf.WHOLE]


@pytest.mark.parametrize("name", ["page.html", "notes.md", "two.epub", "three.epub", "fiction.fb2", "word.docx", "open.odt", "rich.rtf"])  # fmt: skip
def test_notes_are_left_out_where_asked(name: str, tmp_path: Path) -> None:
    assert texts_of(name, BOOKS[name], tmp_path, footnotes=False) == [shelf.TEXT]


@pytest.mark.parametrize("name", [name for name in BOOKS if not name.endswith((".json", ".jsonl"))])
def test_the_content_tells_the_format_whatever_the_name(name: str, tmp_path: Path) -> None:
    if name != "notes.md":  # Markdown is told by its name alone
        assert [text.strip() for text in texts_of("other.txt", BOOKS[name], tmp_path)] == [shelf.WHOLE]


def test_a_folder_is_read_whole_and_tells_what_it_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = shelf.build(tmp_path / "shelf")
    (tmp_path / "shelf" / ".hidden.txt").write_text("hidden")
    (tmp_path / "shelf" / "README.md").write_text("about")
    (tmp_path / "shelf" / "meta.json").write_text('{"a": 1}')
    out = tmp_path / "shelf" / "out"
    arguments = ["--input", tmp_path / "shelf", "--tokenizer", "char", "--workers", 2]
    assert run(*arguments, "--out", out) == 0
    shown = capsys.readouterr().err
    assert f"{len(names)} of {len(names) + 6} files read; 6 skipped:" in shown
    for part in ("cover.jpg (picture)", "drm.epub (encrypted)", "books.zip/inner/cover.jpg (picture)", "1 hidden", "README.md (about the folder)", "meta.json (no list of rows)"):  # fmt: skip
        assert part in shown
    texts = [text.rstrip("\n") for split in ("train", "val") for text in told(out, split)]
    assert texts == [shelf.WHOLE] * len(names)
    assert {path.name for path in (tmp_path / "shelf").iterdir() if "out." in path.name} <= {".out.lock"}
    assert run(*arguments, "--out", out) == 0  # the folder it wrote is no text
    assert "already prepared" in capsys.readouterr().err
    facts = (Catalogue.load(out) or pytest.fail("no catalogue")).facts
    told_all = {"author": shelf.AUTHOR, "title": shelf.TITLE, "year": shelf.YEAR}
    for name in ("page.html", "notes.md", "two.epub", "three.epub", "fiction.fb2", "open.odt", "rich.rtf"):
        assert told_all.items() <= facts[name].items()
    assert facts["three.epub"]["language"] == "en" and facts["word.docx"] == {"author": shelf.AUTHOR}
    arguments[1:2] = [tmp_path / "shelf" / name for name in ("two.epub", "word.docx", "notes.md")]
    assert run(*arguments, "--control", "author", "--out", tmp_path / "styled") == 0
    assert "jane-q-roe" in Manifest.load(tmp_path / "styled").tokenizer.styles


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.epub", shelf.epub({"c1": "<p>x</p>"})[:-300], "damaged or incomplete"),
        ("a.epub", b"words", "not an EPUB book"),
        ("a.odt", shelf.odt_book(encrypted=True), "this document is encrypted: open it with its password"),
        ("a.odt", b"words", "not an OpenDocument text"),
        ("a.fb2", b"words", "not a FictionBook"),
        ("a.rtf", b"words", "not a Rich Text file"),
        ("a.zip", BOOKS["books.zip"][:-300], "a damaged or incomplete archive"),
        ("a.txt.gz", BOOKS["packed.txt.gz"][:-9], "a damaged or incomplete archive"),
        ("a.json", b'[{"text": "one"}, {"text": ', "not a JSON list"),
        ("a.json", b'{"text": 1}', "one JSON object, not a list of rows"),
        ("a.md", b"caf\xe9", "not UTF-8 at byte offset 3"),
        ("a.epub", shelf.epub({"c1": "x"}, spine='<itemref idref="c9"/>'), "its reading order names 'c9'"),
        ("a.epub", shelf.zipped({"META-INF/container.xml": shelf.CONTAINER}), "without its package document"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else str(value)[:20],
)
def test_what_cannot_be_read_is_named(
    name: str, data: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(data)
    assert run("--input", tmp_path / name, "--tokenizer", "char", "--out", tmp_path / "out") == 1
    shown = capsys.readouterr().err
    assert message in shown and name in shown
    assert {path.name for path in tmp_path.iterdir()} <= {name, ".out.lock"}


def test_a_folder_is_read_without_what_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = "EncryptedPackage".encode("utf-16-le")
    bad = {
        "cut.epub": (shelf.epub({"c1": "<p>x</p>"})[:-300], "damaged"),
        "locked.odt": (shelf.odt_book(encrypted=True), "encrypted"),
        "locked.docx": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600) + package, "encrypted"),
        "cut.zip": (BOOKS["books.zip"][:-300], "damaged"),
        "cut.txt.gz": (BOOKS["packed.txt.gz"][:-9], "damaged"),
        "cut.parquet": (shelf.parquet_book()[:-20], "damaged"),
        "list.json": (b'[{"text": "one"}, {"text": ', "damaged"),
        "named.txt": (b"%PDF-1.7 words", "PDF"),
        "old.txt": ("Café, in an old encoding.".encode("latin-1"), "not UTF-8"),
        "old.md": ("Café, in an old encoding.".encode("latin-1"), "not UTF-8"),
        "old.json": ('["Café"]'.encode("latin-1"), "not UTF-8"),
        "old.html": (b'<meta charset="utf-8"><p>caf\xe9</p>', "not utf-8"),
        "odd.html": (b'<meta charset="utf-99"><p>cafe</p>', "unknown encoding"),
        "wide.txt": ("Café".encode("utf-16"), "UTF-16"),
        "wide.jsonl": ('{"text": "Café"}'.encode("utf-16"), "UTF-16"),
        "zero.txt": (b"some text\0more", "binary"),
    }
    texts = tmp_path / "texts"
    texts.mkdir()
    for name, (data, _) in bad.items():
        (texts / name).write_bytes(data)
    for number in range(3):
        (texts / f"good {number}.txt").write_text(f"number {number}, a text long enough.\n" * 9, encoding="utf-8")
    arguments = ("--input", texts, "--tokenizer", "char", "--out", tmp_path / "out")
    assert run(*arguments) == 0
    line = next(line for line in capsys.readouterr().err.splitlines() if "files read" in line)
    assert line.startswith(f"3 of {3 + len(bad)} files read; {len(bad)} skipped: ")
    assert all(f"{name} ({kind})" in line for name, (_, kind) in bad.items())
    for name in bad:  # what is given by name is not skipped
        assert run("--input", texts, texts / name, *arguments[2:-1], tmp_path / "named") == 1
        assert name in capsys.readouterr().err


EPUB_CASES: list[tuple[dict[str, str], dict[str, str], str]] = [
    ({"c1": "<p>one</p>", "c2": "<p>two</p>", "c10": "<p>ten</p>"}, {"spine": "<itemref idref='c2'/><itemref idref='c1'/><itemref idref='c10'/>"}, "two\n\none\n\nten"),
    ({"c1": "<p>one</p>", "c2": "<p>aside</p>"}, {"spine": "<itemref idref='c1'/><itemref idref='c2' linear='no'/>"}, "one"),
    ({"c1": "<p>one</p>", "c2": "<section epub:type='endnotes'><p>The note.</p></section>"}, {"spine": "<itemref idref='c1'/><itemref idref='c2' linear='no'/>"}, "one\n\nThe note."),
    ({"c1": "<p>one</p><nav epub:type='landmarks'><p>x</p></nav>"}, {}, ""),
    ({"c1": "<p>c&nbsp;af&eacute;&mdash;&hellip;&#8217;&#x2019;&amp;</p>"}, {}, "c\xa0afé—…’’&"),
    ({"c1": "<p><span class='drop-cap'>T</span> he</p><p><span class='dropcap'>A</span> house</p>"}, {}, "The\n\nA house"),
    ({"c1": "<div class='dropcap'>W</div><p>hen</p><p><b class='lettrine'><i>O</i></b>nce</p>"}, {}, "When\n\nOnce"),
    ({"c1": "<p>T<span class='sc'>HE END</span> of <small>IT</small></p>"}, {}, "THE END of IT"),
    ({"c1": "<p>a<span class='pagenum'>[Pg 7]</span>b<a href='n.xhtml#f1'><sup>1</sup></a> c<a href='#f'>[2]</a></p>"}, {}, "ab c"),
    ({"c1": "<p>Years <a href='#i'>1853</a> and a<sup>2</sup></p>"}, {}, "Years 1853 and a2"),
    ({"c1": "<section class='pg-boilerplate pgheader'><p>licence</p></section><p>x</p>"}, {}, "x"),
    ({"c1": "<svg:svg><svg:text>t</svg:text></svg:svg><p>x</p>"}, {}, "x"),
    ({"c1": "<p class='v'>one<br/>two</p><p>&nbsp;</p><p>three</p>"}, {}, "one\ntwo\n\n\nthree"),
    ({"c1": "<h2>I</h2>\n<p>a</p><p style='text-align:center'>* * *</p><p>b</p>"}, {}, "I\n\na\n\n* * *\n\nb"),
    ({"c1": "<p>x</p>"}, {"META-INF/encryption.xml": "<e><EncryptedData><EncryptionMethod Algorithm='http://www.idpf.org/2008/embedding'/><CipherReference URI='OEBPS/f.otf'/></EncryptedData></e>"}, "x"),
    ({"c1": "<p>x</p>"}, {"META-INF/container.xml": "<broken"}, "x"),
    ({"c 1": "<p>x</p>"}, {}, "x"),
    ({"c1": "<p>a \t\n b\u2003c&#160; d</p><p>&#160;e \n</p>"}, {}, "a b\u2003c\xa0 d\n\n\xa0e"),
    ({"c1": "<p>soft\xadly, so&shy;ft&#173;ly</p>"}, {}, "softly, softly"),
    ({"c1": "<p>x<span role='doc-pagebreak'>12</span>y<i class='pageno'>3</i></p>"}, {}, "xy"),
    ({"c1": "<p><ruby>漢<rp>(</rp><rt>kan</rt><rp>)</rp></ruby>字</p>"}, {}, "漢字"),
    ({"c1": "<p>one</p><hr/><hr class='x'/><p>two</p>"}, {}, "one\n\n* * *\n\n* * *\n\ntwo"),
    ({"c1": "<p>a<![CDATA[ <b> & ]]>c</p>"}, {}, "a <b> & c"),
    ({"c1": "<p>one</p><br/><br/><br/><br/><br/><p>two</p>"}, {}, "one\n\n\ntwo"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(EPUB_CASES)))
def test_an_epub_is_read_as_a_reader_shows_it(number: int, tmp_path: Path) -> None:
    chapters, others, text = EPUB_CASES[number]
    parts = {name: part for name, part in others.items() if name != "spine"}
    data = shelf.epub(chapters, spine=others.get("spine", ""), parts=parts)
    assert texts_of("a.epub", data, tmp_path) == [text] if text else not "".join(texts_of("a.epub", data, tmp_path))


def test_an_entity_of_a_books_own_is_kept(tmp_path: Path) -> None:
    page = '<?xml version="1.0"?><!DOCTYPE html [<!ENTITY house "Höllow & Co">]><html><body><p>At &house;.</p></body></html>'
    assert texts_of("a.xhtml", page.encode(), tmp_path) == ["At Höllow & Co."]


def test_a_list_of_rows_longer_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from corpus.readers import archive

    monkeypatch.setattr(archive, "BLOCK", 16)
    rows = ["short", "long " * 30, 'with "quotes" and ] and \\', "é"]
    (tmp_path / "a.json").write_text("\ufeff [" + ",\n".join(map(shelf.json.dumps, rows)) + " ]\n", encoding="utf-8")
    assert texts_of("a.json", (tmp_path / "a.json").read_bytes(), tmp_path) == rows
    (tmp_path / "numbers.json").write_text(json.dumps([12345678901234567890, 2, 345678]), encoding="utf-8")
    monkeypatch.setattr(archive, "BLOCK", 5)  # a number may go on in the next block
    assert list(archive._list_items(tmp_path / "numbers.json")) == [12345678901234567890, 2, 345678]


def test_no_member_of_an_archive_leaves_its_folder(tmp_path: Path) -> None:
    data = shelf.zipped(
        {"../../up.txt": b"one", "/root.txt": b"two", "a/../b.txt": b"three", "A.txt": b"4", "a.txt": b"5"}
    )
    assert sorted(texts_of("a.zip", data, tmp_path)) == ["4", "5", "one", "three", "two"]
    assert {path.name for path in tmp_path.iterdir()} == {"a.zip", "unpacked"}
    twice = shelf.zipped({"b.txt": b"one", "../b.txt": b"two", "./b.txt": b"three"})  # of one name in the folder
    assert sorted(texts_of("b.zip", twice, tmp_path)) == ["one", "three", "two"]


def test_archives_in_archives(tmp_path: Path) -> None:
    inner = shelf.zipped({"deep.txt.gz": BOOKS["packed.txt.gz"], "deep.txt": b"plain"})
    assert texts_of("a.tar", shelf.tarred({"in.zip": inner, "x.md": b"*md*"}, "w"), tmp_path) == ["plain", shelf.WHOLE + "\n", "md"]  # fmt: skip
    for _ in range(4):
        inner = shelf.zipped({"in.zip": inner})
    with pytest.raises(ValueError, match=re.escape("more than 3 deep")):
        texts_of("b.zip", inner, tmp_path)
