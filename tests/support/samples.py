"""Made-up texts for tests (paragraphs, wrapped lines, licences) and what prepare_data.py makes of them."""

from __future__ import annotations

import hashlib
import random
import textwrap
from pathlib import Path

import numpy as np

from prepare_data import main
from storage.shards import Manifest
from tokenizer import END_OF_TEXT, load_tokenizer

WORDS = [
    "the",
    "a",
    "of",
    "and",
    "house",
    "lady",
    "said",
    "was",
    "very",
    "old",
    "which",
    "came",
    "upon",
    "him",
    "garden",
    "window",
    "evening",
    "letter",
    "remembered",
]
NEW_HEADER = (
    "The Project Gutenberg eBook of A House\n\nThis ebook is for the use of anyone anywhere.\n\n"
    "*** START OF THE PROJECT GUTENBERG EBOOK A HOUSE, OR THE VERY LONG TITLE\nTHAT GOES OVER TWO LINES ***\n\n\n"
)
NEW_FOOTER = "\n\nEnd of Project Gutenberg's A House, by Nobody\n\n*** END OF THE PROJECT GUTENBERG EBOOK A HOUSE ***\n\nLicence.\n"
OLD_HEADER = (
    "The Project Gutenberg Etext of A House\n\n***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***\nfine print\n"
    "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n\n\n"
)
OLD_FOOTER = "\n\n\nEnd of The Project Gutenberg Etext of A House, by Nobody\n\n"


def paragraphs(count: int, seed: int = 1, extra: tuple[str, ...] = ()) -> list[str]:
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        sentences = []
        for _ in range(draw.randint(1, 6)):
            words = draw.choices([*WORDS, *extra], k=draw.randint(5, 20))
            sentences.append(" ".join(words).capitalize() + draw.choice(".?!"))
        made.append(" ".join(sentences))
    return made


def wrapped(made: list[str], between: str, width: int = 70) -> str:
    return between.join(textwrap.fill(p, width, break_on_hyphens=False, break_long_words=False) for p in made) + "\n"


def make_texts(folder: Path) -> Path:
    """Twelve documents with accents, among them one wrapped, one with a licence, one that names the end of text."""
    (folder / "more").mkdir(parents=True)
    for number in range(12):
        text = "\n".join([f"Story {number}", *paragraphs(12, seed=number, extra=("“naïve”", "£5"))]) + "\n"
        (folder / ("more" if number % 2 else "") / f"s{number:02d}.txt").write_text(text, encoding="utf-8")
    (folder / "s00.txt").write_text(wrapped(paragraphs(40), "\n\n"), encoding="utf-8")
    (folder / "s02.txt").write_text(NEW_HEADER + f"They wrote {END_OF_TEXT} there." + NEW_FOOTER, encoding="utf-8")
    return folder


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def tokens(out: Path, split: str) -> np.ndarray:
    manifest = Manifest.load(out)
    files = getattr(manifest.splits, split).shards
    return np.concatenate(
        [np.fromfile(out / shard.file, dtype=f"<u{np.dtype(manifest.dtype).itemsize}") for shard in files]
    )


def hashes(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


def told(out: Path, split: str) -> list[str]:
    """The documents of a split, decoded."""
    tokenizer = load_tokenizer(out)
    found, current = [], []
    for token in tokens(out, split).tolist():
        if token == tokenizer.eot:
            found.append(tokenizer.decode(current))
            current = []
        else:
            current.append(token)
    return [*found, tokenizer.decode(current)] if current else found
