"""cleaning.py: licences, wrapped lines, and cuts that change nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from corpus import cleaning
from corpus.cleaning import Layout, close_gaps, cut_after, find_layout, has_gaps, normalise_newlines, unwrap
from corpus.documents import ReadOptions, clean_document
from corpus.gutenberg import spans
from corpus.readers.text import TextFile
from storage.shards import Manifest
from support.samples import NEW_FOOTER, NEW_HEADER, OLD_FOOTER, OLD_HEADER, paragraphs, run, told, wrapped
from tokenizer import gpt2_tokenizer


def unwrapped(text: str) -> str:
    data = text.encode()
    return unwrap(data, find_layout(data))[0].decode()


def test_paragraphs_between_blank_lines_are_joined() -> None:
    made = paragraphs(60)
    text = wrapped(made, "\n\n")
    assert find_layout(text.encode()) == Layout(70, blocks=True)
    assert unwrapped(text) == "\n\n".join(made) + "\n"
    assert unwrap(text.encode(), Layout(70))[1] == text.count("\n") - 2 * len(made) + 1


def test_paragraphs_without_blank_lines_are_joined_where_the_next_word_did_not_fit() -> None:
    made = paragraphs(150, seed=2)
    text = wrapped(made, "\n")
    layout = find_layout(text.encode())
    assert not layout.blocks and 66 <= layout.width <= 70
    result = unwrapped(text).rstrip("\n").split("\n")
    assert result != text.rstrip("\n").split("\n")
    assert sum(p in result for p in made) > 0.8 * len(made)  # a last line that happens to be full cannot be told apart
    assert unwrapped(text).replace("\n", " ") == text.replace("\n", " ")


def test_turns_of_a_dialogue_stay_apart() -> None:
    layout = Layout(30, blocks=False)
    text = b'"It is a very long line here."\n"Indeed it is, and mine."\nHe said so, and went away from\nme.'
    assert unwrap(text, layout)[0].split(b"\n") == [
        b'"It is a very long line here."',
        b'"Indeed it is, and mine."',
        b"He said so, and went away from me.",
    ]


def test_accents_count_as_one_character() -> None:
    made = paragraphs(60, extra=("crèche", "naïveté", "“Œuvre”", "déjà"))
    text = wrapped(made, "\n\n")
    assert find_layout(text.encode()).width <= 70
    assert unwrapped(text) == "\n\n".join(made) + "\n"


VERSE = "\n\n".join(
    f"Upon the silent hill I lay number {n}\nAnd heard the wind among the trees\nThen rose and went away"
    for n in range(30)
)
PLAY = "\n\n".join(f"FIRST MAN:\nBefore we speak, hear me in scene {n}.\n\nALL:\nSpeak, speak." for n in range(30))


@pytest.mark.parametrize(
    "text",
    [
        VERSE,
        PLAY,
        "\n".join(paragraphs(60)),
        "\n\n".join(paragraphs(60)),
        wrapped(paragraphs(2), "\n\n"),
        "",
        "\n" * 100,
        "one line",
        "x" * 300_000,
        "\n".join(f"{n}, {n * n}, {n**3}" for n in range(500)),
        "\n".join(line[: 10 + 7 * (n % 9)].lower() for n, line in enumerate(paragraphs(200))),
        wrapped(paragraphs(60), "\n\n", width=30),
        wrapped(paragraphs(60), "\n\n", width=150),
    ],
    ids=[
        "verse",
        "play",
        "line a paragraph",
        "blank lines between long lines",
        "short",
        "empty",
        "blank",
        "line",
        "run",
        "table",
        "free verse",
        "narrow",
        "wide",
    ],
)
def test_other_layouts_stay_as_they_are(text: str) -> None:
    assert find_layout(text.encode()).width == 0
    assert unwrapped(text) == text


def test_tiny_shakespeare_stays_as_it_is(shared_data: Path) -> None:
    data = (shared_data / "tinyshakespeare.txt").read_bytes()
    assert unwrap(data, find_layout(data)) == (data, 0)


def test_verse_headings_and_indented_lines_within_wrapped_prose_stay() -> None:
    made = paragraphs(60)
    inner = "CHAPTER I.\nIn which he comes home\n\nHere lies the man\nwho lost his way\nand never came\n\n   Dear Sir and Madam, whom I have so very long and often wanted to see,\n   I am yours,"
    text = wrapped(made[:30], "\n\n") + "\n" + inner + "\n\n" + wrapped(made[30:], "\n\n")
    assert inner in unwrapped(text)
    assert unwrapped(text).count("\n") == inner.count("\n") + 2 * len(made) + 1


@pytest.mark.parametrize("pieces", [None, 3000], ids=["whole", "in pieces"])
@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\r\n"),
        lambda text: "\ufeff" + text.replace("\n\n", "\n\n\x0c", 3) + "\x1a\x1a",
        lambda text: text.replace("\n\n", "\n\x0c"),
        lambda text: "".join("     " + line + "\n" for line in text.splitlines()),
        lambda text: text.replace("\n", "\n\n"),
        lambda text: text.replace("\n", "\r\n \r\n"),
        lambda text: text.replace("\n\n", "\n\ufeff\n", 5) + "\x1a",
    ],
    ids=[
        "cr cr lf",
        "form feeds",
        "form feeds alone",
        "indented",
        "double-spaced",
        "double-spaced crlf",
        "inner marks",
    ],
)
def test_line_layouts_of_whole_books(
    change: Callable[[str], str], pieces: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = paragraphs(120)
    (tmp_path / "a.txt").write_text(change(wrapped(made, "\n\n")), encoding="utf-8", newline="")
    if pieces:
        monkeypatch.setattr(cleaning, "CHUNK_BYTES", pieces)
    file = TextFile.inspect(tmp_path / "a.txt", "a", ReadOptions(), "")
    assert isinstance(file, TextFile)
    text = "".join(piece.text for chunk in file.chunks(0) for piece in chunk.read(ReadOptions()))
    assert re.sub("\n{3,}", "\n\n", text).strip() == "\n\n".join(made)


def test_a_page_break_within_a_paragraph_does_not_end_it() -> None:
    assert normalise_newlines(b"and so\n\x0cit went.\n\x0cCHAPTER II") == b"and so\nit went.\n\nCHAPTER II"


def test_tables_and_contents_in_wrapped_prose_stay_lines() -> None:
    made = paragraphs(60)
    contents = "\n".join(f"chapter the {n}th in which he goes {'.' * 30} {n}" for n in range(9))
    spaced = "\n".join(f"another long chapter of it all, the {n}th . . . . . . . . . . . . {n}" for n in range(9))
    table = "\n".join(f"item number {n} of the list         costs      {n} pounds and a penny" for n in range(9))
    ellipsis = "he was silent.... and then after a while that seemed very long to them\nhe spoke . . . of it"
    text = "\n\n".join(
        [wrapped(made[:30], "\n\n").strip(), contents, spaced, table, ellipsis, wrapped(made[30:], "\n\n")]
    )
    assert "\n\n".join([contents, spaced, table, ellipsis.replace("\n", " ")]) in unwrapped(text)


def test_dashes_at_line_ends() -> None:
    layout = Layout(12)
    cases = {
        b"he was a well-\nknown man": b"he was a well-known man",
        b"he went away--\nand came": b"he went away--and came",
        b"he went away\n--and came": b"he went away--and came",
        b"and he went -\nand came": b"and he went - and came",
        b"and he went --\nand came": b"and he went -- and came",
        b"he went away  \nand came": b"he went away and came",
        b"he went away" + b" \t" * 20 + b"\nand came  ": b"he went away and came  ",
    }
    for text, expected in cases.items():
        assert unwrap(text, layout)[0] == expected


def test_line_ends() -> None:
    assert normalise_newlines(b"a\r\nb\rc\n\r\n") == b"a\nb\nc\n\n"
    made = paragraphs(60)
    text = wrapped(made, "\n\n").replace("\n", "\r\n").encode()
    layout = find_layout(text)
    assert layout.width == 70
    assert unwrap(normalise_newlines(text), layout)[0].decode() == "\n\n".join(made) + "\n"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("header", "footer"),
    [
        (NEW_HEADER, NEW_FOOTER),
        (OLD_HEADER, OLD_FOOTER),
        (NEW_HEADER.replace("THE PROJECT", "THIS PROJECT").replace("*** S", "***S"), NEW_FOOTER.replace("'s", "’s")),
        (NEW_HEADER, ""),
        ("", NEW_FOOTER),
        ("", OLD_FOOTER + OLD_HEADER),
        (OLD_FOOTER + NEW_HEADER, NEW_FOOTER),
    ],
    ids=["new", "old", "this", "header only", "footer only", "small print at the end", "two"],
)
@pytest.mark.parametrize("length", [1, 4000])
def test_licences_are_found(header: str, footer: str, newline: str, length: int) -> None:
    body = "\n\n".join(["CHAPTER I.", *paragraphs(length)]).replace("\n", newline).encode()
    data = header.replace("\n", newline).encode() + body + footer.replace("\n", newline).encode()
    assert [data[start:stop] for start, stop in spans(data)] == [body]


def test_texts_without_a_licence_are_left_whole() -> None:
    text = b"He read about Project Gutenberg. END OF STORY\n*** * ***\nThe small print was long.\n"
    assert spans(text) == [(0, len(text))]


@pytest.mark.parametrize(
    "text",
    [
        wrapped(paragraphs(300), "\n\n"),
        wrapped(paragraphs(300), "\n\n").replace("\n", "\r\n"),
        "\n".join(paragraphs(200, extra=("“crèche”", "don't", "1859", "—", " ", "。", "\u3000", "\u00a0"))),
        "   \n \n".join(paragraphs(200)),
        "，".join("他走了。\n" * 40 for _ in range(40)),
    ],
    ids=["wrapped", "wrapped crlf", "odd characters", "blank lines with spaces", "chinese"],
)
def test_pieces_give_the_tokens_of_the_whole(text: str) -> None:
    tokenizer = gpt2_tokenizer()
    data = text.encode()
    layout = find_layout(data)
    whole = unwrap(normalise_newlines(data), layout)[0]
    pieces, begin = [], 0
    while (cut := cut_after(data[begin + 700 :], layout)) is not None:
        pieces.append(data[begin : begin + 700 + cut])
        begin += 700 + cut
    pieces.append(data[begin:])
    clean = [unwrap(normalise_newlines(piece), layout)[0] for piece in pieces]
    assert len(pieces) > 10
    assert b"".join(clean) == whole
    assert [i for piece in clean for i in tokenizer.encode(piece.decode())] == tokenizer.encode(whole.decode())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I don't  know him  -  no.", "I don't know him - no."),
        ('She said  "Go" and  \'twas  (near) 1859  “ended”', 'She said "Go" and \'twas (near) 1859 “ended”'),
        ("  An indented line\n  and  another\t  here.  \nEnd", "  An indented line\n  and another\t  here.  \nEnd"),
        ("three   stay and  two go", "three   stay and two go"),
        ("x = 1  # a remark  | a cell", "x = 1  # a remark  | a cell"),
    ],
)
def test_double_spaces_between_words_become_one(text: str, expected: str) -> None:
    found, count = close_gaps(text.encode(), Layout(gaps=True))
    assert found.decode() == expected and count == len(text) - len(expected)
    assert close_gaps(text.encode(), Layout()) == (text.encode(), 0)


def test_columns_are_not_gaps() -> None:
    prose = "He had a  word with her, and they  went home.\n" * 20
    table = "name      born  in\nAusten    1775  Steventon\nDickens   1812  Landport\n" * 20
    assert has_gaps(prose.encode()) and not has_gaps(table.encode())
    assert not has_gaps(b"One space everywhere.\n    indented\n") and not has_gaps((prose + table).encode())


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_no_chunk_begins_inside_a_gap(ends: str, tmp_path: Path) -> None:
    """Cut everywhere it may be cut, the text is cleaned as in one piece."""
    data = ends.join("I don't  know,  and  he won't say  so.  Go" for _ in range(200)).encode()
    layout = Layout(gaps=True)
    assert cut_after(b"don't  know him", layout) == len(b"don't  know") and cut_after(b"don't ", layout) is None
    pieces, begin = [], 0
    while (cut := cut_after(data[begin + 3 :], layout)) is not None:
        pieces.append(data[begin : begin + 3 + cut])
        begin += 3 + cut
    pieces.append(data[begin:])
    clean = [close_gaps(normalise_newlines(piece), layout)[0] for piece in pieces]
    whole, count = close_gaps(normalise_newlines(data), layout)
    assert len(pieces) > 500 and count == 1000 and b"".join(clean) == whole and b"  " not in whole


def test_gaps_are_closed_in_books_and_kept_on_request(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join("It is  so, and  he does not  mind it." for _ in range(400)))
    for flags, count in (((), 1200), (("--no-unwrap",), None)):
        out = tmp_path / f"data{len(flags)}"
        assert run("--input", tmp_path / "a.txt", "--out", out, "--tokenizer", "char", *flags) == 0
        assert Manifest.load(out).cleaning.get("closed_gaps") == count


def test_wrapped_lines_are_cut_at_the_end_of_a_paragraph_only() -> None:
    text = b"one two three\nfour five\n \nsix"
    assert cut_after(text, Layout(70)) == len(b"one two three\nfour five")
    assert cut_after(text, Layout()) == 3
    assert cut_after(" x\u3000 — y".encode(), Layout()) == len(" x\u3000 —".encode())
    assert cut_after(b"one two\nthree", Layout(70)) is None
    assert cut_after(b"one two\nthree", Layout()) == 3


@pytest.mark.parametrize(
    ("text", "expected", "count"),
    [
        ("One.\n\n[Illustration]\n\nTwo.", "One.\n\nTwo.", 1),
        ("One.\n\n[Illustration: A cat\nand [1] a dog.\n\n_Page 5_]\n\n\nTwo.", "One.\n\nTwo.", 1),
        ("[Illustration]\n\nOne.\n\n  [ILLUSTRATION: a]  \n\n[Illustration]", "One.\n\n", 3),
        ("One\n[Illustration]\ntwo.\n[Illustration]\n\nThree.", "One\ntwo.\n\nThree.", 2),
        ("One [Illustration: x] two, [Illustration]three.", "One two, three.", 2),
        ("[Illustrations by Phiz] [Illustrated] [illustration] [a]", "[Illustrations by Phiz] [Illustrated] [illustration] [a]", 0),
        ("[Illustration: never closed\n\n[Illustration: nor this", "[Illustration: never closed\n\n[Illustration: nor this", 0),
        ("[Illustration: " + "x" * 5000 + "] One.", "[Illustration: " + "x" * 5000 + "] One.", 0),
    ],
)  # fmt: skip
def test_illustrations(text: str, expected: str, count: int) -> None:
    assert cleaning.strip_illustrations(text.encode()) == (expected.encode(), count)


LONG = "\n\n".join(paragraphs(60)).encode()
BOX = b"+-----------+\n|\n| Transcriber's Note: spelling\n| was kept.\n|\n+-----------+\n\n"


@pytest.mark.parametrize(
    ("text", "expected", "count"),
    [
        (b"TITLE\n\n[Transcriber's Note: see\n\nbelow [1].]\n\nText.", b"TITLE\n\nText.", 1),
        ("A word [Transcriber’s note: sic] here.".encode(), b"A word here.", 1),
        (
            b"TITLE\n\n\nTranscriber's Note:\n\nKept as it was.\n\n\n\nText.\n\n" + LONG,
            b"TITLE\n\n\nText.\n\n" + LONG,
            1,
        ),
        (b"TITLE\n\n" + BOX + b"Text.\n\n" + LONG, b"TITLE\n\nText.\n\n" + LONG, 1),
        (LONG + b"\n\n\nTRANSCRIBER'S NOTES\n\nOne.\n\n\n\nTwo.\n", LONG, 1),
        (LONG + "\n\n_Transcriber’s Notes_:\nOne.\n\nTwo.".encode(), LONG, 1),
        (b"TRANSCRIBER'S NOTE\n\n" + LONG, LONG, 1),
        (b"A word [TN: sic] here. [Transcription note: so]", b"A word here. ", 2),
        (LONG + b"\n\n\nTranscription Notes:\n\nOne.\n", LONG, 1),
        (b"[TN] and [TNT: so] stay, and the [Transcription of a letter] too.", None, 0),
        (b"The transcriber's note was lost.\n\nHe was a Transcriber's Note taker.", None, 0),
        (b"[Transcribed by hand] " + LONG, None, 0),
    ],
)
def test_transcribers_notes(text: bytes, expected: bytes | None, count: int) -> None:
    assert cleaning.strip_notes(text) == (text if expected is None else expected, count)


def test_a_note_that_does_not_end_the_text_goes_only_to_its_own_end() -> None:
    part = LONG + b"\n\n\nTRANSCRIBER'S NOTES\n\nOne.\n\n\n\nTwo.\n"
    assert cleaning.strip_notes(part, last=False) == (LONG + b"\n\n\nTwo.\n", 1)


@pytest.mark.parametrize(
    ("text", "expected", "count"),
    [
        ("It was _very_ old, “_so_” and (_I_)!", "It was very old, “so” and (I)!", 3),
        ("_Two words\nover lines_ and _é_", "Two words\nover lines and é", 2),
        ("snake_case_name and __init__ and _ _ and ____ and a_b", "snake_case_name and __init__ and _ _ and ____ and a_b", 0),
        ("Mr. _____ said _no_ to Lord ____, who", "Mr. _____ said no to Lord ____, who", 1),
        ("open _here\n\nand closed_ there", "open _here\n\nand closed_ there", 0),
        ("5 _ 6 _ 7, x_ y _z", "5 _ 6 _ 7, x_ y _z", 0),
        ("naïve_mots_naïfs", "naïve_mots_naïfs", 0),
        ("my_name_ is x_y_, but _not _ this", "my_name_ is x_y_, but _not _ this", 0),
        ("_" + "a " * 400 + "a_", "_" + "a " * 400 + "a_", 0),
        ("_" * 50_000, "_" * 50_000, 0),
    ],
)  # fmt: skip
def test_italics(text: str, expected: str, count: int) -> None:
    assert cleaning.strip_italics(text) == (expected, count)


@pytest.mark.parametrize("encoding", ["windows-1252", "latin-1"])
def test_mojibake(encoding: str) -> None:
    good = "She said, “It’s £5 at the café — naïve!” and left… ‘Yes’"
    if encoding == "latin-1":
        assert cleaning.fix_mojibake(good.encode().decode("latin-1")) == good
    else:
        broken = "".join(bytes([byte]).decode(encoding, "ignore") for byte in good.encode())
        assert "\u009d" not in broken and "â€œIt" in broken
        assert cleaning.fix_mojibake(broken) == good
        assert cleaning.fix_mojibake("â€œHiâ€") == "“Hi”"
    for text in (good, "plain", "Ärger über “Ãœ”? Château d’Éon, Â£", "ﬁne ½ ① “quoted” &amp; <b>", "Él dijo “sí”"):
        if "Ã" not in text and "Â" not in text:
            assert cleaning.fix_mojibake(text) == text


def test_the_steps_are_switched_one_by_one_and_counted(tmp_path: Path) -> None:
    made = paragraphs(60)
    body = "[Transcriber's Note: kept.]\n\n" + wrapped(made[:30], "\n\n") + "\n[Illustration]\n\n_That_ was all, and â€œsheâ€ left.\n\n" + wrapped(made[30:], "\n\n").rstrip()  # fmt: skip
    (tmp_path / "book.txt").write_text(NEW_HEADER + body + NEW_FOOTER, encoding="utf-8")
    on = {
        "unwrap": "unwrapped_documents",
        "strip-licence": "licence_documents",
        "strip-notes": "transcriber_notes",
        "strip-illustrations": "illustrations",
        "strip-italics": "italics",
        "fix-mojibake": "mojibake_documents",
    }

    def counted(*flags: str) -> tuple[dict[str, int], str]:
        out = tmp_path / f"out{len(flags)}{'-'.join(flags)}"
        assert run("--input", tmp_path / "book.txt", "--tokenizer", "char", *flags, "--out", out) == 0
        return Manifest.load(out).cleaning, "".join(told(out, "train") + told(out, "val"))

    counts, text = counted("--fix-mojibake")
    assert {name: counts[name] for name in on.values()} == dict.fromkeys(on.values(), 1)
    assert text.strip() == "\n\n".join([*made[:30], "That was all, and “she” left.", *made[30:]])
    for flag, name in on.items():
        left, _ = counted("--fix-mojibake", f"--no-{flag}")
        assert set(on.values()) - set(left) == {name}


@pytest.mark.parametrize(
    "text",
    [
        VERSE.replace("hill", "_hill_") + "\n\n[Illustration]\n\n",
        "Use _emphasis_ and my_name.\n\nTranscriber's Note: none.\n\nSee [Illustration] and [1].\n" * 3,
        PLAY + "\n\nEnter _ALL_ [Illustration: the stage]\n",
    ],
    ids=["verse", "prose", "play"],
)
def test_texts_that_are_no_books_of_project_gutenberg_keep_their_marks(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"text": text}) + "\n" + json.dumps({"text": "Other."}) + "\n", "utf-8"
    )
    for source in ("a.txt", "rows.jsonl"):
        out = tmp_path / f"out-{source}"
        assert run("--input", tmp_path / source, "--tokenizer", "char", "--out", out) == 0
        stories = told(out, "train") + told(out, "val")
        assert text in stories or "".join(stories) == text
        assert Manifest.load(out).cleaning == {}


def test_a_licence_alone_makes_a_book_and_the_bytes_are_those_of_the_clean_text() -> None:
    verse = VERSE.replace("hill", "_hill_").replace("wind", "â€œwindâ€")
    for fix in (False, True):
        piece = clean_document(0, (NEW_HEADER + verse + NEW_FOOTER).encode(), ReadOptions(fix_mojibake=fix))
        assert piece.text.startswith("Upon the silent hill I lay number 0\nAnd heard the ")
        assert ("“wind”" in piece.text) == fix
        assert piece.bytes == len(piece.text.encode())
        assert piece.counts["italics"] == 30
    assert clean_document(0, verse.encode(), ReadOptions(books=True)).counts == {"italics": 30}
    assert clean_document(0, verse.encode(), ReadOptions()).counts == {}
