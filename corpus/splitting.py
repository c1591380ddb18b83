"""Which documents train and which validate: whole documents, or the end of one where each is more than may be held out.

>>> plan = split_plan(pool, corpus, ReadOptions(), 0.1, every=1, part="1/1", duplicates=False)
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator

import numpy as np

from config import ConfigError
from corpus.documents import Chunk, DocumentError, ReadOptions
from corpus.duplicates import FEWEST, SIZE, near_duplicates
from corpus.encoding import (
    CUT,
    DROP,
    SKIP,
    TRAIN,
    VAL,
    Cut,
    EncodingPlan,
    batched_chunks,
    count_characters,
    document_digests,
    find_duplicates,
    row_sketches,
    validation_split,
)
from corpus.finder import SHOWN, Corpus
from corpus.readers.text import TextFile
from corpus.workers import Pool, Progress

MOST_ROWS = 1 << 19  # that are compared with each other
MOST_BYTES = 1 << 32  # of rows that are read once more to be compared
HASHES = 1 << 22  # of all rows together, of which FEWEST a row are kept at least


def split_plan(
    pool: Pool, corpus: Corpus, options: ReadOptions, fraction: float, *, every: int, part: str, duplicates: bool
) -> EncodingPlan:
    """The role of each document. The other settings are those of `prepare_data.py`; for `duplicates` all texts are read.

    Raises ConfigError, DocumentError.
    """
    dropped = np.zeros(corpus.documents, dtype=bool)
    if duplicates:
        digests = []
        arguments = ((file, options) for file in corpus.files)
        with Progress("looking for duplicates", corpus.size) as progress:
            for file, found in zip(corpus.files, pool.map(document_digests, arguments), strict=True):
                digests.append(found)
                progress.add(file.size)
        dropped = find_duplicates(corpus, digests)
    every = max(1, min(every, corpus.documents // 2))  # two documents at least
    skipped = (np.arange(corpus.documents) % every > 0) & corpus.splits("train", "")
    alike = _alike(pool, corpus, options)
    validate = validation_split(corpus, fraction, dropped | skipped, alike) & ~skipped
    roles = np.where(skipped, SKIP, np.where(dropped, DROP, np.where(validate, VAL, TRAIN))).astype(np.uint8)
    if validate.any():
        return EncodingPlan(corpus, options, roles)
    # every document is more than may be held out: the largest is split by position, and its end validates
    if part != "1/1":
        raise ConfigError([f"--part {part}: one document is split by position, and only as a whole"])
    alone = np.ones(corpus.documents, dtype=bool)
    alone[[number for group in alike for number in group]] = False
    return _with_a_cut(pool, EncodingPlan(corpus, options, roles), fraction, alone)


def fitted(corpus: Corpus, most: int) -> tuple[Corpus, int]:
    """(`corpus` cut to about `most` bytes of text, of how many documents one is to be read).

    Where that comes out about right, every so many-th document is read. Otherwise all are, and of the longest plain texts
    their beginning; of formats that are extracted as a whole nothing is cut.
    """
    sizes = corpus.sizes()
    total = sizes.sum()
    if not most or total <= most:
        return corpus, 1
    told = f"{total / 1e6:,.1f} MB of text are more than the {most / 1e6:,.1f} MB to be prepared"
    remedy = "(all of it: prepare_data.py without --max-bytes)"
    every = math.ceil(total / most)
    if every <= corpus.documents // 2 and most / 2 <= sizes[::every].sum() <= 1.1 * most:
        print(f"{told}: one document in {every} is read {remedy}", file=sys.stderr)
        return corpus, every
    low, high = 0.0, float(sizes.max())
    for _ in range(50):  # the length at which all documents together have `most` bytes
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(sizes, middle).sum() < most else (low, middle)
    files = [file.beginning(high) if isinstance(file, TextFile) else file for file in corpus.files]
    cut = dataclasses.replace(corpus, files=files)
    print(f"{told}: of the longest the beginning is read, {cut.size / 1e6:,.1f} MB in all {remedy}", file=sys.stderr)
    return cut, 1


def _with_a_cut(pool: Pool, plan: EncodingPlan, fraction: float, alone: np.ndarray) -> EncodingPlan:
    """`plan` with the end of its largest training document held out, of about `fraction` of the whole text.

    alone: documents of which there are no near-duplicates, bool [documents], one of which is taken if there is any.
    """
    corpus, sizes = plan.corpus, plan.corpus.sizes() * (plan.roles == TRAIN)
    document = int(np.argmax(sizes * alone if (sizes * alone).any() else sizes))
    plan.roles[document] = CUT
    holding = [number for number, batch in enumerate(plan.batches()) if CUT in batch.roles]
    some = (batch.chunks for number, batch in enumerate(plan.batches()) if CUT in batch.roles)
    lengths = list(pool.map(count_characters, ((chunks, plan.options, document) for chunks in some)))
    share = min(0.9, fraction * sizes.sum() / max(1.0, sizes[document])) if corpus.documents > 1 else fraction
    cut = int(sum(lengths) * (1 - share))
    if not 0 < cut < sum(lengths):
        raise DocumentError(
            f"{corpus.name}: {sum(lengths)} characters are too little text to train on and to validate with"
        )
    if corpus.documents > 1:
        print(f"held out: the last {share:.0%} of {_document_names(corpus)[document]}", file=sys.stderr)
    before = np.cumsum([0, *lengths[:-1]]).tolist()
    return dataclasses.replace(
        plan,
        cuts={number: Cut(cut - start, corpus.documents > 1) for number, start in zip(holding, before, strict=True)},
    )


def _document_names(corpus: Corpus) -> list[str]:
    """What each document is called in messages."""
    return [
        file.name if file.documents == 1 else f"{file.name}, {'row' if file.has_rows else 'book'} {number + 1}"
        for file in corpus.files
        for number in range(file.documents)
    ]


def _alike(pool: Pool, corpus: Corpus, options: ReadOptions) -> list[list[int]]:
    """Groups of documents that are nearly the same, of which the names are printed."""
    numbers: list[int] = []
    sketches: list[bytes] = []
    first = 0
    for file in corpus.files:
        found = file.sketches[: file.documents]
        numbers += range(first, first + len(found))
        sketches += found
        first += file.documents
    for document, own in _row_sketches(pool, corpus, options):
        numbers.append(document)
        sketches.append(own)
    groups = [[numbers[at] for at in group] for group in near_duplicates(sketches)]
    names = _document_names(corpus) if groups else []
    for group in groups[:SHOWN]:
        shown = ", ".join(names[at] for at in group[:SHOWN])
        more = f" and {len(group) - SHOWN} more" if len(group) > SHOWN else ""
        apart = len(group) > max(SHOWN, corpus.documents // 2)  # rows of one pattern
        what = "too many to be kept on one side of the split" if apart else "kept on one side of the split"
        print(f"nearly the same text, {what}: {shown}{more}", file=sys.stderr)
    if len(groups) > SHOWN:
        print(f"… and {len(groups) - SHOWN} more such groups", file=sys.stderr)
    return [group for group in groups if len(group) <= max(SHOWN, corpus.documents // 2)]


def _row_sketches(pool: Pool, corpus: Corpus, options: ReadOptions) -> Iterator[tuple[int, bytes]]:
    """Number and sketch of each row that is long enough to be compared; none where the source itself tells the splits.

    So that memory and time are bounded, rows share HASHES, and are not read where they are more than MOST_ROWS or MOST_BYTES.
    """
    rows = sum(file.documents for file in corpus.files if file.has_rows)
    size = sum(file.size for file in corpus.files if file.has_rows)
    if rows < 2 or any(file.split == "val" for file in corpus.files):
        return
    if rows > MOST_ROWS or size > MOST_BYTES:
        print(
            f"{rows:,} rows, {size / 1e6:,.0f} MB: too many to look for rows that are nearly the same", file=sys.stderr
        )
        return
    options = dataclasses.replace(options, unwrap=False, strip_notes=False, strip_illustrations=False, strip_italics=False, fix_mojibake=False)  # fmt: skip
    share = min(SIZE // 2, max(FEWEST, HASHES // rows))
    with Progress("comparing rows", size) as progress:
        for found, read in pool.map(
            row_sketches, ((chunks, options, share) for chunks in batched_chunks(_row_chunks(corpus)))
        ):
            yield from found
            progress.add(read)


def _row_chunks(corpus: Corpus) -> Iterator[Chunk]:
    """The chunks of files with rows."""
    first = 0
    for file in corpus.files:
        if file.has_rows:
            yield from file.chunks(first)
        first += file.documents
