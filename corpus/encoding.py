"""Which documents train and which validate, and their tokens: the work that prepare_data.py spreads over processes.

python -c "from corpus import encoding; print(encoding.__doc__)"
python prepare_data.py --preset story-small --drop-duplicates --workers 8
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from corpus.documents import Corpus, DocumentError, File, Options, Task
from storage.shards import SPLITS
from tokenizer import Tokenizer, TokenizerError, gpt2_tokenizer, load_tokenizer

TRAIN, VAL, DROP = 0, 1, 2  # what becomes of a document; the first two are the places of their names in SPLITS
GROUP = 1 << 18  # bytes of small tasks that a worker takes together
BPE_BYTES = 1 << 28  # a vocabulary is trained on about this much, spread evenly; more does not change it noticeably


@dataclass
class Encoded:
    """What a worker made of some tasks, by split."""

    tokens: dict[str, np.ndarray]
    bytes: Counter[str] = field(default_factory=Counter)
    documents: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    size: int = 0
    dropped: list[int] = field(default_factory=list)
    """Documents without text of their own."""


def choose_validation(corpus: Corpus, fraction: float, dropped: np.ndarray | None = None) -> np.ndarray:
    """Which documents validate, bool [documents]: the source's own split, else a fixed pseudo-random choice by name.

    At least one document, and never all; none where there is only one document, which is split by position instead.
    `dropped` ones, bool [documents], are not chosen.
    """
    chosen = np.zeros(corpus.documents, dtype=bool)
    if any(file.split == "val" for file in corpus.files):
        first = 0
        for file in corpus.files:
            chosen[first : first + file.documents] = file.split == "val"
            first += file.documents
        return chosen
    order = np.argsort(corpus.keys(), kind="stable")
    order = order if dropped is None else order[~dropped[order]]
    chosen[order[: min(max(1, round(len(order) * fraction)), len(order) - 1)]] = True
    return chosen


def share(tasks: Iterable[Task], part: int, parts: int) -> Iterator[Task]:
    """The tasks of every `parts`-th document (of a table: group of rows), beginning with number `part`."""
    number, document = -1, -1
    for task in tasks:
        number += task.document != document
        document = task.document
        if number % parts == part:
            yield task


def batches(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    """Tasks in groups of about GROUP bytes, the same whatever the workers."""
    group: list[Task] = []
    size = 0
    for task in tasks:
        group.append(task)
        size += task.size + 64
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def encode(
    tasks: list[Task],
    options: Options,
    tokenizer: tuple[str, str],
    roles: np.ndarray,
    cut: int | None,
    styles: np.ndarray | None = None,
) -> Encoded:
    """The tokens of `tasks`, end-of-text after each document and before it the control id of its style. Runs in a worker.

    tokenizer: "gpt2" or the folder of a saved one, and its fingerprint. roles: of their documents, from the first on,
    TRAIN, VAL or DROP. styles: a control id for each that begins here and has a style, else -1. cut: where training ends, in characters from the first task's begin, when one document is split
    by position. Raises DocumentError for a text that cannot be read or holds characters the tokenizer lacks.
    """
    coder = _tokenizer(*tokenizer)
    end = np.array([] if coder.eot is None else [coder.eot], dtype=coder.dtype)
    parts: dict[str, list[np.ndarray]] = {name: [np.array([], dtype=coder.dtype)] for name in SPLITS}
    made = Encoded({}, size=sum(task.size for task in tasks))
    first, begun = tasks[0].document, -1
    for task in tasks:
        for piece in task.read(options):
            role = roles[piece.document - first]
            if role == DROP:
                made.counts["duplicate_documents"] += piece.last
                made.dropped += [piece.document] if piece.last else []
                continue
            made.counts.update(piece.counts)
            if cut is None:
                pairs = [(SPLITS[role], piece.text)]
            else:
                at = min(max(cut, 0), len(piece.text))
                cut -= len(piece.text)
                pairs = [("train", piece.text[:at]), ("val", piece.text[at:])]
            for name, text in pairs:
                if text:
                    if styles is not None and piece.document != begun and styles[piece.document - first] >= 0:
                        parts[name].append(
                            styles[piece.document - first : piece.document - first + 1].astype(coder.dtype)
                        )
                    begun = piece.document
                    try:
                        parts[name].append(coder.encode_array(text))
                    except TokenizerError as error:
                        raise DocumentError(f"{task.place}: {error}") from None
                    made.bytes[name] += piece.bytes if len(pairs) == 1 else len(text.encode())
            if piece.last and not piece.text:
                made.dropped.append(piece.document)
            if piece.text and piece.last:
                parts[pairs[-1][0]].append(end)
                made.documents.update(name for name, _ in pairs)
    made.tokens = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    return made


def digests(file: File, options: Options) -> np.ndarray:
    """A number for each document's clean text without blanks around it, uint64 [documents]; 0 where there is no text."""
    found = np.zeros(file.documents, dtype=np.uint64)
    digest = hashlib.blake2b(digest_size=8)
    for task in file.tasks(0):
        for piece in task.read(options):
            text = piece.text.strip() if piece.last else piece.text
            digest.update(text.encode())
            if piece.last:
                found[piece.document] = int.from_bytes(digest.digest(), "little") if text else 0
                digest = hashlib.blake2b(digest_size=8)
    return found


def find_duplicates(corpus: Corpus, numbers: Sequence[np.ndarray]) -> np.ndarray:
    """Which documents to drop, bool [documents]: those whose number, of `digests`, a validation text or an earlier one has."""
    flat = np.concatenate(numbers)
    trains = np.concatenate([np.full(file.documents, file.split != "val") for file in corpus.files])
    order = np.argsort(trains, kind="stable")  # validation first, else in the order of the documents
    dropped = np.ones(len(flat), dtype=bool)
    dropped[order[np.unique(flat[order], return_index=True)[1]]] = False
    return dropped & (flat != 0)


def measure(tasks: list[Task], options: Options) -> int:
    """Characters of the clean text of `tasks`."""
    return sum(len(piece.text) for task in tasks for piece in task.read(options))


def alphabet(tasks: list[Task], options: Options) -> str:
    """The distinct characters of the clean text of `tasks`, in order."""
    seen = np.zeros(sys.maxunicode + 1, dtype=bool)
    for task in tasks:
        for piece in task.read(options):
            seen[np.frombuffer(piece.text.encode("utf-32-le"), dtype="<u4")] = True
    return "".join(map(chr, np.flatnonzero(seen).tolist()))


@lru_cache(maxsize=1)
def _tokenizer(where: str, fingerprint: str) -> Tokenizer:
    return gpt2_tokenizer() if where == "gpt2" else load_tokenizer(Path(where))


class Batch(NamedTuple):
    """What a worker encodes at a time."""

    tasks: list[Task]
    roles: np.ndarray
    cut: int | None
    styles: np.ndarray | None


@dataclass(frozen=True)
class Work:
    """What is to be written: the documents, how they are read, and which of them validate."""

    corpus: Corpus
    options: Options
    roles: np.ndarray
    """TRAIN, VAL or DROP, uint8 [documents]."""
    cuts: Sequence[int]
    """Where training ends when the only document is split by position, in characters from each batch on; else empty."""
    styles: np.ndarray | None = None
    """The control id of each document's style, -1 for none, int64 [documents]; None: no styles."""

    def batches(self, part: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Each batch with its part of `roles`, its cut and its styles. part: (i, n) takes the i-th of n parts, from 0."""
        before = -1
        for number, tasks in enumerate(batches(share(self.corpus.tasks(), *part))):
            first, last = tasks[0].document, tasks[-1]
            stop = last.document + last.documents
            styles = None
            if self.styles is not None:
                styles = self.styles[first:stop].copy()
                if first == before:
                    styles[0] = -1  # it has begun in the batch before
            yield Batch(tasks, self.roles[first:stop], self.cuts[number] if self.cuts else None, styles)
            before = last.document + last.documents - 1

    def training_texts(self) -> Iterator[str]:
        """The text that trains, or BPE_BYTES of it taken evenly, read in this process."""
        step = max(1, round(self.corpus.size / BPE_BYTES))
        for tasks, roles, cut, _ in islice(self.batches(), 0, None, step):
            for task in tasks:
                for piece in task.read(self.options):
                    if cut is not None:
                        yield piece.text[: max(cut, 0)]
                        cut -= len(piece.text)
                    elif roles[piece.document - tasks[0].document] == TRAIN:
                        yield piece.text
