"""cleaning.py: licences, wrapped lines, and cuts that change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

import cleaning
from cleaning import Layout, cut_after, find_layout, licence_bounds, normalise_newlines, unwrap
from samples import NEW_FOOTER, NEW_HEADER, OLD_FOOTER, OLD_HEADER, paragraphs, wrapped
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
    window = cleaning.LICENCE_WINDOW
    start, stop = licence_bounds(data[:window], data[-window:], len(data))
    assert data[start:stop] == body


def test_texts_without_a_licence_are_left_whole() -> None:
    text = b"He read about Project Gutenberg. END OF STORY\n*** * ***\nThe small print was long.\n"
    assert licence_bounds(text, text, len(text)) == (0, len(text))


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


def test_wrapped_lines_are_cut_at_the_end_of_a_paragraph_only() -> None:
    text = b"one two three\nfour five\n \nsix"
    assert cut_after(text, Layout(70)) == len(b"one two three\nfour five")
    assert cut_after(text, Layout()) == 3
    assert cut_after(" x\u3000 — y".encode(), Layout()) == len(" x\u3000 —".encode())
    assert cut_after(b"one two\nthree", Layout(70)) is None
    assert cut_after(b"one two\nthree", Layout()) == 3
