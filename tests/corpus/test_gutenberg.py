"""gutenberg.py: every layout that Project Gutenberg has had, alone and one after the other, gives exactly the prose."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from corpus.gutenberg import spans
from storage.shards import Manifest
from support.samples import paragraphs, run, told, wrapped

FINE_PRINT = "\n\n".join(paragraphs(12, seed=9))
SMALL = f"***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***\n{FINE_PRINT}\n*END{{}}THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n\n"
LICENCE = (
    "\nUpdated editions will replace the previous one. Project Gutenberg-tm is a mark.\n\n*** START: FULL LICENSE ***\n\n"
    f"THE FULL PROJECT GUTENBERG LICENSE\n\nSection 1. Terms of Project Gutenberg-tm.\n\n{FINE_PRINT}\n"
)
HEAD = "The Project Gutenberg EBook of A House, by Nobody\n\nTitle: A House\n\nAuthor: Nobody\n\n"
STAR = "\n\n*** END OF THE PROJECT GUTENBERG EBOOK A HOUSE ***\n" + LICENCE
LAYOUTS: dict[str, tuple[str, str]] = {  # what precedes a book, what follows it; docs/data.md lists them by year
    "1993 small print first": ("**The Project Gutenberg Etext of A House**\n\n" + SMALL.format("*"), "\n\n\nEnd of The Project Gutenberg Etext of A House, by Nobody\n\n"),
    "1994 small print last": ("", "\n\nEnd of Project Gutenberg's A House, by Nobody\n\nThe Project Gutenberg Etext of A House\n\n" + SMALL.format("*")),
    "1994 small print last without an end line": ("", "\n\n" + SMALL.format("*")),
    "1996 two blanks in the mark": ("Project Gutenberg's Etext of A House, by Nobody\n\n" + SMALL.format("*  "), "\n\nEnd of this Project Gutenberg Etext of A House\n\n"),
    "2000 END without stars": (HEAD + SMALL.format(" "), "\n\nEnd of the Project Gutenberg Etext of A House\n\n"),
    "2003 small print and start line": (HEAD + SMALL.format("*") + "*** START OF THE PROJECT GUTENBERG EBOOK, A HOUSE ***\n\n", STAR),
    "2003 no blanks in the line": (HEAD + "***START OF THE PROJECT GUTENBERG ETEXT A HOUSE***\n\n", "\n\n***END OF THE PROJECT GUTENBERG ETEXT A HOUSE***\n" + LICENCE),
    "2005 this, with credits": (HEAD + "*** START OF THIS PROJECT GUTENBERG EBOOK A HOUSE ***\n\n\n\n\nProduced by Jane Roe and the Team at\nhttp://www.example.org\n\n\n\n", "\n\nEnd of the Project Gutenberg EBook of A House, by Nobody\n\n*** END OF THIS PROJECT GUTENBERG EBOOK A HOUSE ***\n" + LICENCE),
    "2006 transcribed from": (HEAD + "***START OF THE PROJECT GUTENBERG EBOOK A HOUSE***\n\n\nTranscribed from the 1859 edition by John Doe\n\nE-text prepared by Jane Roe\n\n", STAR),
    "2007 e-book": (HEAD + "*** START OF THIS PROJECT GUTENBERG E-BOOK A HOUSE ***\n\n", "\n\n*** END OF THIS PROJECT GUTENBERG E-BOOK A HOUSE ***\n" + LICENCE),
    "2008 copyrighted": (HEAD + "*** START OF THE COPYRIGHTED PROJECT GUTENBERG EBOOK A HOUSE ***\n\n", "\n\n*** END OF THE COPYRIGHTED PROJECT GUTENBERG EBOOK A HOUSE ***\n" + LICENCE),
    "2009 indented": (HEAD + "  *** START OF THIS PROJECT GUTENBERG EBOOK A HOUSE ***\n\n", "\n\n     *** END OF THIS PROJECT GUTENBERG EBOOK A HOUSE ***\n" + LICENCE),
    "2010 German": (HEAD + "*** START OF THE PROJECT GUTENBERG EBOOK EIN HAUS ***\n\n", "\n\nEnde dieses Projekt Gutenberg Etextes Ein Haus, von Niemand\n\n*** END OF THE PROJECT GUTENBERG EBOOK EIN HAUS ***\n" + LICENCE),
    "2001 German without stars": (HEAD + SMALL.format("*"), "\n\nEnde dieses Project Gutenberg Etextes Ein Haus, von Niemand\n\n"),
    "2002 French without stars": (HEAD + SMALL.format("*"), "\n\nFin de ce Projet Gutenberg Etext Une Maison, par Personne\n\n"),
    "2011 French": (HEAD + "*** START OF THE PROJECT GUTENBERG EBOOK UNE MAISON ***\n\n", "\n\nFin du Project Gutenberg EBook de Une Maison\n\n*** END OF THE PROJECT GUTENBERG EBOOK UNE MAISON ***\n" + LICENCE),
    "2021 title over two lines": (HEAD + "*** START OF THE PROJECT GUTENBERG EBOOK A HOUSE, OR A VERY LONG\nTITLE ***\n\nCredits: Jane Roe and the Team\n\n", STAR),
    "Australia": ("Title: A House\nAuthor: Nobody\n* A Project Gutenberg of Australia eBook *\neBook No.: 0100.txt\n\nProject Gutenberg of Australia eBooks are made from printed editions.\n\nGo to http://gutenberg.net.au\n\n\n------------------------\n\n", "\n\n\nThis site is full of FREE ebooks - Project Gutenberg Australia\n\n"),
    "Canada": ("* A Project Gutenberg Canada Ebook *\n\nMade available at no cost. See gutenberg.ca/links before sharing.\n\nTitle: A House\n\n*** START OF THE PROJECT GUTENBERG CANADA EBOOK A HOUSE ***\n\nThis ebook was produced by Jane Roe\n\n", "\n\n[End of A House, by Nobody]\n\n*** END OF THE PROJECT GUTENBERG CANADA EBOOK A HOUSE ***\n"),
}  # fmt: skip
TRAPS = [
    "End of Project Gutenberg's first year came early, and nobody minded.",
    "Project Gutenberg was founded in 1971. The small print was long.",
    "End of Project Gutenberg's Works, Volume 1",
    "“End of the Project Gutenberg Etext,” he read aloud. *** * ***",
    "Ende gut, alles gut. Fin de siècle. [End of the first letter]",
    "*** THE START OF IT ALL ***",
]


def prose(draw: random.Random) -> str:
    """Some paragraphs, among them some that speak of Project Gutenberg, the first and the last of which do not."""
    made = paragraphs(draw.choice([2, 5, 40, 300]), seed=draw.randrange(10**6))
    for trap in draw.sample(TRAPS, draw.randint(0, 3)):
        made.insert(draw.randint(1, len(made) - 1), trap)
    return "\n\n".join(made) if draw.random() < 0.5 else wrapped(made, "\n\n").rstrip()


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_the_prose(layout: str, newline: str) -> None:
    before, after = LAYOUTS[layout]
    for seed in range(4):
        text = prose(random.Random(seed))
        data = (before + text + after).replace("\n", newline).encode()
        assert [data[start:stop].decode() for start, stop in spans(data)] == [text.replace("\n", newline)]


@pytest.mark.parametrize("seed", range(60))
def test_any_books_one_after_the_other_give_exactly_their_prose(seed: int) -> None:
    draw = random.Random(seed)
    texts, parts = [], []
    for _ in range(draw.randint(2, 6)):
        # a book that begins with its text cannot be told from the licence before it
        layout = draw.choice([name for name in LAYOUTS if LAYOUTS[name][0] or not parts])
        before, after = LAYOUTS[layout]
        texts.append(prose(draw))
        parts.append(before + texts[-1] + after + "\n" * draw.randint(1, 4))
    newline = draw.choice(["\n", "\r\n"])
    data = "".join(parts).replace("\n", newline).encode()
    assert [data[start:stop].decode().replace("\r\n", "\n") for start, stop in spans(data)] == texts


BODY = "\n\n".join(paragraphs(30, seed=3))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BODY + "\n\n" + TRAPS[0] + "\n\n" + BODY, [BODY + "\n\n" + TRAPS[0] + "\n\n" + BODY]),
        (BODY + "\nEnd of Project Gutenberg's A House\n\n", [BODY + "\nEnd of Project Gutenberg's A House\n\n".rstrip()]),
        (HEAD + "*** START OF THE PROJECT GUTENBERG EBOOK X ***\n\n" + BODY + "\n\n*** END OF THE PROJECT GUTENBERG EBOOK VOLUME 1 ***\n\n" + BODY + STAR, [BODY, BODY]),
        (HEAD + "*** START OF THE PROJECT GUTENBERG EBOOK X ***\n\n" + BODY + "\n\n" + HEAD + "*** START OF THE PROJECT GUTENBERG EBOOK Y ***\n\n" + BODY + STAR, [BODY, BODY]),
        (BODY + STAR, [BODY]),
        (BODY + "\n\n" + HEAD + "*** START OF THE PROJECT GUTENBERG EBOOK Y ***\n\n" + BODY + STAR, [BODY, BODY]),
        ("***START**THE SMALL PRINT!**\n" + "*END*THE SMALL PRINT! x*END*\n\n" + BODY, [BODY]),
    ],
    ids=["prose about it", "no blank line before", "two ends", "no end", "no header", "text first", "no end line"],
)  # fmt: skip
def test_what_is_missing_or_doubled(text: str, expected: list[str]) -> None:
    data = text.encode()
    assert [data[start:stop].decode().strip() for start, stop in spans(data)] == expected


def test_books_in_one_file_are_documents_and_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short, long = paragraphs(20, seed=1), paragraphs(900, seed=2)
    parts = []
    for number, made in enumerate((short, long, short[::-1])):
        header = (
            HEAD.replace("Nobody", f"Author {number}") + f"*** START OF THE PROJECT GUTENBERG EBOOK {number} ***\n\n"
        )
        parts.append(header + wrapped(made, "\n\n") + STAR)
    (tmp_path / "three.txt").write_text("".join(parts), encoding="utf-8")
    (tmp_path / "other.txt").write_text("Another text of one line.", encoding="utf-8")
    out = tmp_path / "out"
    assert run("--input", tmp_path, "--tokenizer", "char", "--control", "author", "--out", out) == 0
    assert "three.txt: 3 books" in capsys.readouterr().err
    texts = {
        text.split("\n\n", 1)[1] if "Author" in text[:9] else text for s in ("train", "val") for text in told(out, s)
    }
    wanted = {"\n\n".join(made) for made in (short, long, short[::-1])}
    assert {text for text in texts for want in wanted if text.endswith(want)} == {
        text for text in texts if len(text) > 99
    }
    manifest = Manifest.load(out)
    assert manifest.source.documents == 4 and manifest.cleaning["books_in_shared_files"] == 3
    assert {"author-0", "author-1", "author-2"} >= manifest.tokenizer.styles.keys() != set()


def test_a_file_whose_marks_would_leave_nothing_is_kept_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "*** START OF THE PROJECT GUTENBERG EBOOK X ***\n\nOh.\n\n*** END OF THE PROJECT GUTENBERG EBOOK X ***\n\nGutenberg-tm. " + BODY * 9  # fmt: skip
    (tmp_path / "odd.txt").write_text(text, encoding="utf-8")
    assert run("--input", tmp_path, "--tokenizer", "char", "--out", tmp_path / "out") == 0
    assert "odd.txt: left whole" in capsys.readouterr().err
    assert "".join(told(tmp_path / "out", "train")).startswith("*** START OF")
