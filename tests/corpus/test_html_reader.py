"""readers/html.py and markup.py: the text of a page as a browser shows it, and pages in every encoding."""

from __future__ import annotations

from pathlib import Path

import pytest

from corpus.documents import ReadOptions
from corpus.finder import inspect
from corpus.readers.markup import markup_text, parse_markup
from storage.shards import Manifest
from support.samples import NEW_FOOTER, NEW_HEADER, run, told

XHTML = (
    '<html xmlns="http://www.w3.org/1999/xhtml" xmlns:epub="http://www.idpf.org/2007/ops"><head><title/></head><body>'
)


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>It is <b>a</b> truth</p>\n\n<p>univers<i>ally</i> known.</p>", "It is a truth\n\nuniversally known."),
        ("<p>one  two\n three <i> four</i> </p>", "one two three four"),
        ("<p>He said <q>I will, <q>not</q> soon</q> and went.", "He said “I will, ‘not’ soon” and went."),
        ("<p><q>“I will,”</q> he said, <q>soon.</q></p>", "“I will,” he said, “soon.”"),
        ("<h2>I</h2>One.<blockquote>Two.</blockquote>Three.", "I\n\nOne.\n\nTwo.\n\nThree."),
        (
            "<p>Tyger Tyger,<br/>\n   burning bright,<br></p><p>In the forests",
            "Tyger Tyger,\nburning bright,\n\nIn the forests",
        ),
        (
            '<div class="poem"><div class="stanza"><div>one</div><div>two</div></div>'
            '<div class="stanza"><div>three</div></div></div><p>end</p>',
            "one\ntwo\n\nthree\n\nend",
        ),
        ("<div>one</div>\n<div>two</div> three", "one\ntwo\nthree"),
        ("<ul><li>one</li><li>two</li></ul>", "one\ntwo"),
        ("<p>a</p><hr><p>b</p>", "a\n\n* * *\n\nb"),
        ("<p>a</p><p>&nbsp;</p><p>b</p>", "a\n\n\nb"),
        ("<p>a</p><br><br><br><br><br><p>b</p>", "a\n\n\nb"),
        ("<p>&nbsp;&nbsp;indented</p>", "\xa0\xa0indented"),
        ("<pre>\n  a \n\n   b</pre>\n<p>c&nbsp; </p>", "  a\n\n   b\n\nc"),
        ("<table><tr><th>1</th><td> 2 </td></tr><tr><td>3<td><p>4</p></table>", "1\t2\n3\t4"),
        ("<table><tr><td><p>a</p><p>b</p></td><td>c</td></tr></table>", "a\n\nb\n\nc"),
        ('<p><span class="dropcap">I</span>t was <small>THE</small> end</p>', "It was THE end"),
        ('<p><img alt="I" src="i.png">t was <img alt="a fine view"> here</p>', "It was here"),
        ("<p>ca\xadlam\xadity <ruby>漢<rp>(</rp><rt>kan</rt><rp>)</rp></ruby>字</p>", "calamity 漢字"),
        ("<p>a<!-- no --> b<script>c</script><style>d</style> <del>e</del>f</p><svg><text>g</text></svg>", "a b f"),
        ('<p>noted<sup><a href="#n1">1</a></sup>. 10<sup>3</sup></p>', "noted. 103"),
        ('<p>The note. <a href="#r1">↑</a></p><p><a href="#two">See two</a></p>', "The note.\n\nSee two"),
        ("<p>caf&eacute;&mdash;a &amp; b &lt; c &#8220;d&#8221;</p>", "café—a & b < c “d”"),
        (
            XHTML + '<p>caf&eacute;&mdash;<a id="x"/>a &amp; b<br/>c</p><div/><p>d</p></body></html>',
            "café—a & b\nc\n\nd",
        ),
        (
            XHTML
            + '<p>a<span epub:type="pagebreak">12</span>b<a epub:type="noteref" href="#n">*</a></p></body></html>',
            "ab",
        ),
        (XHTML + "<p>a <![CDATA[<b> & c]]></p><script>//<![CDATA[\nx < y\n//]]></script></body></html>", "a <b> & c"),
        (XHTML + "<p>not <b>well-formed</p><p>but read</p></body></html>", "not well-formed\n\nbut read"),
        (
            "<p>a <span hidden>no</span>b</p><div style='color:red; DISPLAY: none'><p>no</p></div><p style='x-display:none'>c</p>",
            "a b\n\nc",
        ),
        (
            "<p>a<a epub:type='noteref' href='#n'>1</a></p><aside epub:type='footnote' id='n' hidden>The note.</aside>",
            "a\n\nThe note.",
        ),
        ("plain words", "plain words"),
        ("", ""),
    ],
)
def test_the_text_is_what_a_browser_shows(html: str, text: str) -> None:
    assert markup_text(parse_markup(html)) == text


def test_deep_nesting_is_no_fault() -> None:
    assert markup_text(parse_markup("<div>" * 200 + "deep" + "</div>" * 200)) == "deep"


PAGE = "<html><head>{}<title>T</title></head><body><p>“Été” costs £5</p></body></html>"
LATIN = "<html><head>{}</head><body><p>Été costs £5</p></body></html>"


@pytest.mark.parametrize(
    "data",
    [
        PAGE.format("").encode("utf-8"),
        b"\xef\xbb\xbf" + PAGE.format("").encode("utf-8"),
        PAGE.format('<meta charset="utf-8">').encode("utf-8"),
        PAGE.format('<meta http-equiv="Content-Type" content="text/html; charset=iso-8859-1">').encode("cp1252"),
        PAGE.format("<meta charset=windows-1252>").encode("cp1252"),
        PAGE.format("").encode("cp1252"),
        PAGE.format("").encode("utf-16"),
        b'<?xml version="1.0" encoding="UTF-8"?>\n' + PAGE.format("").encode("utf-8"),
    ],
)
def test_a_page_is_read_in_its_encoding(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_bytes(data)
    file = inspect(tmp_path / "a.html", "a.html", ReadOptions())
    assert not isinstance(file, str)
    assert [piece.text for chunk in file.chunks(0) for piece in chunk.read(ReadOptions())] == ["“Été” costs £5"]


def test_a_page_that_declares_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.htm").write_bytes(b'<meta charset="utf-8"><p>caf\xe9')
    assert "a.htm: it is not the utf-8 that it declares" in str(inspect(tmp_path / "a.htm", "a.htm", ReadOptions()))
    (tmp_path / "a.htm").write_bytes(b'<meta charset="klingon"><p>cafe')
    assert "a.htm: it declares the unknown encoding klingon" in str(inspect(tmp_path / "a.htm", "a.htm", ReadOptions()))


def test_pages_are_prepared_as_documents_with_their_authors(tmp_path: Path) -> None:
    for number in range(4):
        body = f"<h1>Tale {number}</h1><p>Once there was <i>a</i> cat.</p><p>“Oh!”</p>"
        author = f'<meta name="DC.Creator" content="Author {number % 2}">'
        page = f"<html><head>{author}</head><body>{body}</body></html>"
        (tmp_path / f"{number}.html").write_text(page, encoding="utf-8")
    licensed = NEW_HEADER.replace("\n", "<br>") + "<p>Only this.</p>" + NEW_FOOTER.replace("\n", "<br>")
    (tmp_path / "licensed.xhtml").write_text(f"<body>{licensed}</body>", encoding="utf-8")
    (tmp_path / "empty.html").write_text("<html><body> <p>&nbsp;</p></body></html>", encoding="utf-8")
    out = tmp_path / "out"
    assert (
        run("--input", tmp_path, "--tokenizer", "char", "--val-fraction", 0.2, "--control", "author", "--out", out) == 0
    )
    texts = [text for split in ("train", "val") for text in told(out, split)]
    plain = [text.split("Tale")[1].split("\n\n", 1)[1] for text in texts if "Tale" in text]
    assert plain == ["Once there was a cat.\n\n“Oh!”"] * 4
    assert sum(text.endswith("Only this.") for text in texts) == 1 and len(texts) == 5
    manifest = Manifest.load(out)
    assert manifest.cleaning["licence_documents"] == 1 and manifest.cleaning["empty_files"] == 1
    assert manifest.tokenizer.styles.keys() == {"author-0", "author-1"}
