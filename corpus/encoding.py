"""The training and validation split, and the tokens of each: the work that is spread over processes.

`corpus/preparation.py` makes an `EncodingPlan`; its batches go to the workers, each of which calls `encode`:

    for encoded in pool.map(encode, ((b.chunks, options, tokenizer, b.roles, b.cut, b.styles) for b in plan.batches())): ...
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from corpus.documents import Chunk, DocumentError, ReadOptions, SourceFile
from corpus.duplicates import sketches
from corpus.finder import Corpus
from corpus.word_table import WordTable
from storage.shards import SPLITS
from tokenizer import BytePairTokenizer, Tokenizer, TokenizerError, gpt2_tokenizer, load_tokenizer

# The role of a document; TRAIN and VAL index SPLITS, the end of CUT validates, SKIP is not even read.
TRAIN, VAL, CUT, DROP, SKIP = range(5)
HELD_BY_SIZE = 1 << 16  # bytes of text from which on a share of its bytes, not of its documents, is held out
TENTH = 0.1  # of the text may be held out where less was asked for
ENOUGH = 1 / 3  # of the share asked for, in whole documents
OVER = 1.05  # sizes are estimates: by so much the share may be exceeded
BATCH_BYTES = 1 << 18  # bytes of chunks that a worker takes together
TABLE_CHARACTERS = 8192  # of a text for which looking words up is faster than merging them
VOCABULARY_BYTES = 1 << 28  # a vocabulary is learned from about this much text, taken evenly; more hardly changes it


@dataclass
class EncodedBatch:
    """The tokens of some chunks, by split, and what was counted on the way."""

    tokens: dict[str, np.ndarray]
    bytes: Counter[str] = field(default_factory=Counter)
    documents: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    size: int = 0
    dropped: list[int] = field(default_factory=list)
    """Documents that are in no split: duplicates, and those without text."""


class Cut(NamedTuple):
    """Where the training part of the CUT document ends."""

    at: int
    """In characters from the document's first one in the batch."""
    followed: bool
    """Other documents follow, so that it has to end with end-of-text."""
    style: int = -1
    """The control id of the document's style, -1 for none, to begin its other part."""

    def parts(self, text: str, read: int) -> tuple[list[tuple[str, str]], bool]:
        """(the split of each part of the next piece of text, after `read` characters; whether training ends in it)."""
        left = self.at - read
        before = min(max(left, 0), len(text))
        return [("train", text[:before]), ("val", text[before:])], 0 < left <= len(text)


def validation_split(
    corpus: Corpus, fraction: float, dropped: np.ndarray | None = None, alike: Sequence[Sequence[int]] = ()
) -> np.ndarray:
    """Choose the validation documents, bool [documents]: the source's own split, otherwise a fixed pseudo-random choice.

    Never all documents, and at most `fraction` of the text, or a tenth: none where those that fit are too little, so that one has to be
    split by position. `dropped` ones, bool [documents], are not chosen. Documents that are `alike` stay together, where others are
    left. Of a text of less than HELD_BY_SIZE bytes, at least one document is chosen, whatever its size.
    """
    chosen = np.zeros(corpus.documents, dtype=bool)
    if any(file.split == "val" for file in corpus.files):
        first = 0
        for file in corpus.files:
            chosen[first : first + file.documents] = file.split == "val"
            first += file.documents
        return chosen
    keys, group = corpus.keys(), np.arange(corpus.documents)
    for numbers in alike:
        keys[list(numbers)], group[list(numbers)] = keys[numbers[0]], numbers[0]
    order = np.argsort(keys, kind="stable")
    order = order if dropped is None else order[~dropped[order]]
    count = min(max(1, round(len(order) * fraction)), len(order) - 1)
    edges = np.flatnonzero(np.diff(group[order])) + 1  # where no two that are alike would be parted
    if len(edges):
        count = int(edges[np.argmin(np.abs(edges - count))])
    chosen[order[:count]] = True
    sizes = corpus.sizes()
    total = sizes[order].sum()
    enough = ENOUGH * fraction * total
    if total < HELD_BY_SIZE or enough <= sizes[chosen].sum() <= max(OVER * fraction, TENTH) * total:
        return chosen
    chosen[:] = False
    room = OVER * fraction * total
    for group_numbers in np.split(order, edges.tolist()):  # in the same order, what still fits
        if (size := sizes[group_numbers].sum()) <= room:
            chosen[group_numbers] = True
            room -= size
    return chosen if sizes[chosen].sum() >= enough else np.zeros_like(chosen)


def chunks_of_part(chunks: Iterable[Chunk], part: int, parts: int) -> Iterator[Chunk]:
    """The chunks of every `parts`-th document (of a table: group of rows), beginning with number `part`."""
    number, document = -1, -1
    for chunk in chunks:
        number += chunk.document != document
        document = chunk.document
        if number % parts == part:
            yield chunk


def batched_chunks(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Chunks in groups of about BATCH_BYTES, the same for any number of workers."""
    batch: list[Chunk] = []
    size = 0
    for chunk in chunks:
        batch.append(chunk)
        size += chunk.size + 64
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode(
    chunks: list[Chunk],
    options: ReadOptions,
    tokenizer: tuple[str, str],
    roles: np.ndarray,
    cut: Cut | None,
    styles: np.ndarray | None = None,
) -> EncodedBatch:
    """The tokens of `chunks`: each document after the control id of its style, before end-of-text. Runs in a worker.

    tokenizer: "gpt2" or the folder of a saved one, and its fingerprint.
    roles: TRAIN, VAL, DROP, SKIP or CUT for each document from the first chunk's on.
    cut: where training ends in the CUT document.
    styles: for each document, the control id if it has a style and begins here, otherwise -1.
    Raises DocumentError for a text that cannot be read or holds characters that the tokenizer lacks.
    """
    coder, encode_text = _load_tokenizer(*tokenizer)
    end_of_text = np.array([] if coder.eot is None else [coder.eot], dtype=coder.dtype)
    tokens: dict[str, list[np.ndarray]] = {name: [np.array([], dtype=coder.dtype)] for name in SPLITS}
    made = EncodedBatch({}, size=sum(chunk.size for chunk in chunks))
    first, begun, read = chunks[0].document, -1, 0  # read: characters of the CUT document
    for chunk in chunks:
        for piece in chunk.read(options):
            at, closing = piece.document - first, list[np.ndarray]()
            if roles[at] >= DROP:
                dropped = piece.last and bool(roles[at] == DROP)
                made.counts["duplicate_documents"] += dropped
                made.dropped += [piece.document] * dropped
                continue
            made.counts.update(piece.counts)
            parts: list[tuple[str, str]] = [(SPLITS[roles[at] % CUT], piece.text)]
            if cut is not None and roles[at] == CUT:
                parts, ends = cut.parts(piece.text, read)
                read += len(piece.text)
                tokens["val"] += [np.full(1, cut.style).astype(coder.dtype)] * (ends and cut.style >= 0)
                closing = [end_of_text] * (ends and cut.followed)
            for name, text in parts:
                if text:
                    if styles is not None and piece.document != begun and styles[at] >= 0:
                        tokens[name].append(styles[at : at + 1].astype(coder.dtype))
                    begun = piece.document
                    try:
                        tokens[name].append(encode_text(text))
                    except TokenizerError as error:
                        raise DocumentError(f"{chunk.path}: {error}") from None
                    made.bytes[name] += piece.bytes if len(parts) == 1 else len(text.encode())
            tokens["train"] += closing
            if piece.last and not piece.text:
                made.dropped.append(piece.document)
            elif piece.last:
                tokens[parts[-1][0]].append(end_of_text)
                made.documents.update(name for name, _ in parts)
    made.tokens = {name: np.concatenate(arrays) for name, arrays in tokens.items()}
    return made


def document_digests(file: SourceFile, options: ReadOptions) -> np.ndarray:
    """A digest of each document's clean text without surrounding white space, uint64 [documents]; 0 where there is no text."""
    found = np.zeros(file.documents, dtype=np.uint64)
    digest = hashlib.blake2b(digest_size=8)
    for chunk in file.chunks(0):
        for piece in chunk.read(options):
            text = piece.text.strip() if piece.last else piece.text
            digest.update(text.encode())
            if piece.last:
                found[piece.document] = int.from_bytes(digest.digest(), "little") if text else 0
                digest = hashlib.blake2b(digest_size=8)
    return found


def row_sketches(chunks: list[Chunk], options: ReadOptions, size: int) -> tuple[list[tuple[int, bytes]], int]:
    """Number and sketch of each document in `chunks` that is long enough to be compared, and the bytes of `chunks`."""
    pieces = [piece for chunk in chunks for piece in chunk.read(options)]
    found = sketches([piece.text.encode() for piece in pieces], size)
    made = [(piece.document, own) for piece, own in zip(pieces, found, strict=True) if own]
    return made, sum(chunk.size for chunk in chunks)


def find_duplicates(corpus: Corpus, digests: Sequence[np.ndarray]) -> np.ndarray:
    """Which documents to drop, bool [documents]: those with the text of a validation document or of an earlier one.

    digests: `document_digests` of each file.
    """
    flat = np.concatenate(digests)
    trains = np.concatenate([np.full(file.documents, file.split != "val") for file in corpus.files])
    order = np.argsort(trains, kind="stable")  # validation first, otherwise in the order of the documents
    dropped = np.ones(len(flat), dtype=bool)
    dropped[order[np.unique(flat[order], return_index=True)[1]]] = False
    return dropped & (flat != 0)


def count_characters(chunks: list[Chunk], options: ReadOptions, document: int) -> int:
    """Characters in the clean text of a document, as far as it lies in `chunks`."""
    return sum(len(piece.text) for chunk in chunks for piece in chunk.read(options) if piece.document == document)


def distinct_characters(chunks: list[Chunk], options: ReadOptions) -> str:
    """The distinct characters in the clean text of `chunks`, by code point."""
    seen = np.zeros(sys.maxunicode + 1, dtype=bool)
    for chunk in chunks:
        for piece in chunk.read(options):
            seen[np.frombuffer(piece.text.encode("utf-32-le"), dtype="<u4")] = True
    return "".join(map(chr, np.flatnonzero(seen).tolist()))


@lru_cache(maxsize=1)
def _load_tokenizer(where: str, fingerprint: str) -> tuple[Tokenizer, Callable[[str], np.ndarray]]:
    """A worker's tokenizer and the quickest way to encode with it; `fingerprint` is part of the cache key, so that a
    re-saved tokenizer is reloaded."""
    coder = gpt2_tokenizer() if where == "gpt2" else load_tokenizer(Path(where))
    if not isinstance(coder, BytePairTokenizer):
        return coder, coder.encode_array
    table = WordTable(coder)
    return coder, lambda text: (table.encode if len(text) >= TABLE_CHARACTERS else coder.encode_array)(text)


class Batch(NamedTuple):
    """What a worker encodes at a time: the arguments of `encode` that differ from batch to batch."""

    chunks: list[Chunk]
    roles: np.ndarray
    cut: Cut | None
    styles: np.ndarray | None


@dataclass(frozen=True)
class EncodingPlan:
    """What is to be encoded: the documents, how they are read, and the role and style of each."""

    corpus: Corpus
    options: ReadOptions
    roles: np.ndarray
    """TRAIN, VAL, DROP, SKIP or CUT, uint8 [documents]."""
    cuts: Mapping[int, Cut] = field(default_factory=dict)
    """Where training ends in the CUT document, by the number of each batch that holds some of it."""
    styles: np.ndarray | None = None
    """The control id of each document's style, -1 for none, int64 [documents]; None without styles."""

    def batches(self, part: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """All batches in order. part: (i, n) takes those of the i-th of n parts, from 0."""
        last_before = -1
        for number, chunks in enumerate(batched_chunks(chunks_of_part(self._read_chunks(), *part))):
            first = chunks[0].document
            stop = chunks[-1].document + chunks[-1].documents
            styles = None
            if self.styles is not None:
                styles = self.styles[first:stop].copy()
                if first == last_before:
                    styles[0] = -1  # this document began in the batch before
            cut, roles = self.cuts.get(number), self.roles[first:stop]
            if cut and self.styles is not None:
                cut = cut._replace(style=int(self.styles[first + int(np.argmax(roles == CUT))]))
            yield Batch(chunks, roles, cut, styles)
            last_before = stop - 1

    def _read_chunks(self) -> Iterator[Chunk]:
        """The chunks, without those of which every document is to be skipped."""
        for chunk in self.corpus.chunks():
            if not (self.roles[chunk.document : chunk.document + chunk.documents] == SKIP).all():
                yield chunk

    def training_texts(self, most: float = VOCABULARY_BYTES) -> Iterator[str]:
        """The text that trains, or about `most` bytes of it taken evenly, read in this process."""
        step = max(1, round(self.corpus.size * float(np.mean(self.roles != SKIP)) / most))
        for chunks, roles, cut, _ in islice(self.batches(), 0, None, step):
            read = 0
            for chunk in chunks:
                for piece in chunk.read(self.options):
                    role = roles[piece.document - chunks[0].document]
                    if role == CUT and cut is not None:
                        yield piece.text[: max(cut.at - read, 0)]
                        read += len(piece.text)
                    elif role == TRAIN:
                        yield piece.text
