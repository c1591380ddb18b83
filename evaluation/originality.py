"""Is a text its own? An index of the training text finds every passage copied from it, with its source.

    python -m evaluation.originality --data data/novels                        # build the index, in data/novels/originality
    python -m evaluation.originality --data data/novels --input story.txt      # what in this text was copied
    >>> report = Index.open(Path("data/novels")).check(text)
    >>> report.longest, report.share, [run.sources[0].name for run in report.runs]

A gram is a sequence of a few tokens. The index holds every stride-th gram of the training tokens by its hash; of the text
in question every gram is looked up. That finds whatever is at least gram + stride - 1 tokens long, with a seventh of the
entries of a full index (Kent 2002, "BLAT"). Each match of a hash is compared with the training text itself before it
counts. Copied means word for word: the same characters, line ends and quotation marks included.

Building (`build_index`): the grams go to partitions by the first bits of their buckets, each partition is sorted, and the
sorted lists are joined. Checking (`Index.check`): candidates by hash, comparison, neighbouring matches joined to runs, runs
extended to whole words, sources named.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from cli import parse_flags, run_main
from config import ROOT, ConfigError, FrozenSettings, read_toml
from dataset import TokenData, TokenStream
from storage.atomic import atomic_write_text
from storage.catalogue import Catalogue
from storage.shards import Manifest
from tokenizer import Tokenizer, load_tokenizer

FOLDER, HEADER = "originality", "index.json"
GRAMS = {"gpt2": (5, 6), "bpe": (5, 6), "char": (24, 27)}  # tokens of a gram, tokens between two that are indexed
MIN_TOKENS = {"gpt2": 12, "bpe": 12, "char": 50}  # length from which a passage counts as copied
ENTRIES_A_BUCKET = 8  # about
BLOCK = 1 << 17  # grams handled at a time: bounds the memory of building and of looking up
PARTITION = 1 << 21  # entries sorted at a time
EDGE_TOKENS = 8  # tokens beyond a run that are searched for the same words in other tokens
SHOWN_SOURCES = 3  # sources reported of each run
SHOWN_TOKENS = 40  # tokens shown before and after a run in its source


class OriginalityError(ValueError):
    """An index that is missing, damaged or of another text; the message names it and the fix."""


@dataclass(frozen=True)
class CopySource:
    """One place of a copied run in the training text."""

    name: str
    document: int
    """Number of the document in the training split."""
    token: int
    """Position in that document, in tokens."""
    before: str
    after: str


@dataclass(frozen=True)
class CopiedRun:
    """One copied passage: characters start..stop of the text."""

    start: int
    stop: int
    tokens: int
    text: str
    occurrences: int
    """How often the training text contains it."""
    sources: list[CopySource]


@dataclass(frozen=True)
class OriginalityReport:
    """What of a text occurs word for word in the training text."""

    tokens: int
    longest: int
    """Tokens of the longest copied run; runs below `shortest` may be missed and count as none."""
    shortest: int
    min_tokens: int
    copied_tokens: int
    """Tokens in runs of at least `min_tokens`."""
    share: float
    runs: list[CopiedRun]
    """Those runs, in the order of the text; they may overlap, none lies inside another."""


def bucket_numbers(columns: Sequence[np.ndarray], bits: int) -> np.ndarray:
    """The bucket, below 2**bits, of each gram; `columns[j]` holds the j-th tokens of all grams. int64."""
    total, factor = np.zeros(columns[0].shape, dtype=np.uint64), 1
    for column in columns:
        factor = factor * 0x9E3779B97F4A7C15 % 2**64
        total += (column.astype(np.uint64) + np.uint64(1)) * np.uint64(factor)
    total ^= total >> np.uint64(29)
    total *= np.uint64(0xBF58476D1CE4E5B9)
    total ^= total >> np.uint64(32)
    return (total >> np.uint64(64 - bits)).astype(np.int64)


def corpus_identity(manifest: Manifest) -> str:
    """sha256 of what an index is made from: tokenizer and training shards."""
    parts = [manifest.tokenizer.fingerprint, *(shard.sha256 for shard in manifest.splits.train.shards)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def build_index(folder: Path) -> Path:
    """Index the training split of prepared data into `folder`/originality; an index that is up to date is kept.

    Memory does not grow with the text; the disk must hold the index twice while it is made. Raises OriginalityError
    for a text beyond 2**32 entries (25 billion tokens).
    """
    data, tokenizer = TokenData.open(folder), load_tokenizer(folder)
    place, begun = folder / FOLDER, time.monotonic()
    identity = corpus_identity(data.manifest)
    try:
        Index.open(folder)
        print(f"{place}: up to date", file=sys.stderr)
        return place
    except OriginalityError:
        pass
    draft = folder / f".{FOLDER}.part"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    gram, stride = GRAMS[tokenizer.kind]
    most = max(0, len(data.train) - gram) // stride + 1
    if most >= 2**32:
        raise OriginalityError(f"{folder}: {len(data.train):,} tokens are more than an index can hold: split the text")
    bits = max(8, (most // ENTRIES_A_BUCKET).bit_length())
    partition_bits = min(bits, max(0, (most // PARTITION).bit_length()), 9)
    documents = _write_partitions(data.train, tokenizer.eot, gram, stride, bits, partition_bits, draft)
    entries = _sort_partitions(draft, bits, partition_bits)
    files: dict[str, Any] = {}
    for name in ("offsets.bin", "positions.bin", "documents.bin"):
        with (draft / name).open("rb") as file:
            files[name] = {
                "bytes": (draft / name).stat().st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
    header = {"format": 1, "corpus": identity, "gram": gram, "stride": stride, "bits": bits}
    header |= {"entries": entries, "documents": documents, "files": files}
    atomic_write_text(draft / HEADER, json.dumps(header | {"sha256": _digest(header)}, indent=1) + "\n")
    if place.exists():
        shutil.rmtree(place)
    draft.rename(place)
    size, text = sum(entry["bytes"] for entry in files.values()), data.manifest.splits.train.bytes
    print(
        f"{place}: {size / 1e6:.1f} MB for {text / 1e6:.1f} MB of text ({size / max(text, 1):.0%}), "
        f"{time.monotonic() - begun:.1f} s",
        file=sys.stderr,
    )
    return place


def _digest(header: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _write_partitions(
    stream: TokenStream, eot: int | None, gram: int, stride: int, bits: int, partition_bits: int, draft: Path
) -> int:
    """Partition the n-gram hashes (bucket and number) into 2**partition_bits files and write the document offsets.

    Returns the number of documents' beginnings written."""
    files = [(draft / f"{number}.tmp").open("wb") for number in range(2**partition_bits)]
    begins = 0
    try:
        with (draft / "documents.bin").open("wb") as documents:
            documents.write(np.zeros(1, dtype="<u8").tobytes())
            for first in range(0, len(stream), BLOCK * stride):
                last = min(first + BLOCK * stride, len(stream))
                tokens = stream.read(first, min(last + gram - 1, len(stream)))
                if eot is not None:
                    ends = np.flatnonzero(tokens[: last - first] == eot) + first + 1
                    ends = ends[ends < len(stream)]
                    begins += len(ends)
                    documents.write(ends.astype("<u8").tobytes())
                count = (len(tokens) - gram) // stride + 1
                if count < 1:
                    continue
                columns = [tokens[at : at + (count - 1) * stride + 1 : stride] for at in range(gram)]
                pairs = np.empty((count, 2), dtype="<u4")
                pairs[:, 0] = bucket_numbers(columns, bits)
                pairs[:, 1] = np.arange(count, dtype=np.int64) + first // stride
                if eot is not None:
                    pairs = pairs[~np.logical_or.reduce([column == eot for column in columns])]
                owner = pairs[:, 0] >> np.uint32(bits - partition_bits)
                pairs = pairs[np.argsort(owner, kind="stable")]
                cuts = np.cumsum(np.bincount(owner, minlength=2**partition_bits))
                for file, rows in zip(files, np.split(pairs, cuts[:-1]), strict=True):
                    file.write(rows.tobytes())
    finally:
        for file in files:
            file.close()
    return begins + 1


def _sort_partitions(draft: Path, bits: int, partition_bits: int) -> int:
    """Sort the 2**partition_bits files, one at a time, into one list of numbers and where each bucket begins in it."""
    total, width = 0, 2 ** (bits - partition_bits)
    with (draft / "offsets.bin").open("wb") as offsets, (draft / "positions.bin").open("wb") as positions:
        offsets.write(np.zeros(1, dtype="<u4").tobytes())
        for number in range(2**partition_bits):
            path = draft / f"{number}.tmp"
            pairs = np.fromfile(path, dtype="<u4").reshape(-1, 2)
            path.unlink()
            positions.write(pairs[np.argsort(pairs[:, 0], kind="stable"), 1].tobytes())
            counts = np.bincount(pairs[:, 0].astype(np.int64) - number * width, minlength=width)
            offsets.write((np.cumsum(counts) + total).astype("<u4").tobytes())
            total += len(pairs)
    return total


class Index:
    """An opened index, memory-mapped. Several threads may share it; they take turns."""

    def __init__(self, folder: Path, header: dict[str, Any], stream: TokenStream, tokenizer: Tokenizer):
        self.folder, self.stream, self.tokenizer = folder, stream, tokenizer
        self.gram, self.stride, self.bits = (int(header[key]) for key in ("gram", "stride", "bits"))
        self.entries, self.documents = int(header["entries"]), int(header["documents"])
        self.offsets, self.positions = self._map("offsets.bin", "<u4"), self._map("positions.bin", "<u4")
        self.begins = self._map("documents.bin", "<u8")
        self._lock = threading.Lock()  # the stream's memory maps are not safe for two threads at once

    @property
    def shortest(self) -> int:
        """Length in tokens from which every run is found."""
        return self.gram + self.stride - 1

    @property
    def min_tokens(self) -> int:
        """Length in tokens from which a run counts as copied by default."""
        return MIN_TOKENS[self.tokenizer.kind]

    def _map(self, name: str, kind: str) -> np.ndarray:
        path = self.folder / FOLDER / name
        return np.memmap(path, dtype=kind, mode="r") if path.stat().st_size else np.empty(0, dtype=kind)

    @classmethod
    def open(cls, folder: Path) -> Index:
        """The index of prepared data, with every file's sha256 checked.

        Raises OriginalityError when it is missing, damaged, or made from another text than the folder holds now.
        """
        place, remedy = folder / FOLDER, f"build it again: `python -m evaluation.originality --data {folder}`"
        try:
            header = json.loads((place / HEADER).read_text(encoding="utf-8"))
            files = {str(name): (int(entry["bytes"]), entry["sha256"]) for name, entry in header["files"].items()}
            if header.pop("sha256") != _digest(header):
                raise ValueError("its checksum differs")
        except FileNotFoundError:
            raise OriginalityError(
                f"{place}: there is no index of this text; make one: `python -m evaluation.originality --data {folder}`"
            ) from None
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise OriginalityError(f"{place / HEADER} is damaged ({error}): {remedy}") from None
        data = TokenData.open(folder)
        if header["corpus"] != corpus_identity(data.manifest):
            raise OriginalityError(f"{place} was made from another text than {folder} holds now: {remedy}")
        for name, (size, digest) in files.items():
            try:
                with (place / name).open("rb") as file:
                    if (place / name).stat().st_size != size or hashlib.file_digest(
                        file, "sha256"
                    ).hexdigest() != digest:
                        raise OriginalityError(f"{place / name} is damaged: {remedy}")
            except OSError as error:
                raise OriginalityError(f"{place / name}: {error.strerror}: {remedy}") from None
        return cls(folder, header, data.train, load_tokenizer(folder))

    @cached_property
    def catalogue(self) -> Catalogue | None:
        found = Catalogue.load(self.folder)
        return found if found is not None and found.count("train") == self.documents else None

    def check(self, text: str, min_tokens: int = 0) -> OriginalityReport:
        """What of `text` occurs in the training text, in runs of at least `min_tokens` tokens (0: the default).

        Raises OriginalityError for a `min_tokens` below `shortest`, TokenizerError for characters a char tokenizer lacks.
        """
        least = min_tokens or self.min_tokens
        if least < self.shortest:
            raise OriginalityError(f"min_tokens {least}: this index finds runs of {self.shortest} tokens or more")
        with self._lock:
            return self._check(text, least)

    def _check(self, text: str, least: int) -> OriginalityReport:
        ids = self.tokenizer.encode_array(text).astype(np.int64)
        pieces = [self.tokenizer.piece(token) for token in ids.tolist()]
        ends = np.cumsum([0, *map(len, pieces)])
        data = b"".join(pieces)
        runs: dict[tuple[int, int], list[int]] = {}
        for (start, stop), places in self._longest_matches(ids):
            left, right = self._widen(data, ends, start, stop, places)
            runs.setdefault((left, right), []).extend((places + left - start).tolist())
        outer = outermost(runs)
        long = [span for span in outer if span[1] - span[0] >= least]
        copied = np.zeros(len(ids), dtype=bool)
        for start, stop in long:
            copied[start:stop] = True
        offsets = _CharacterOffsets(data)
        found = [self._copied_run(offsets, ends, start, stop, sorted(set(runs[start, stop]))) for start, stop in long]
        return OriginalityReport(
            tokens=len(ids),
            longest=max((stop - start for start, stop in outer), default=0),
            shortest=self.shortest,
            min_tokens=least,
            copied_tokens=int(copied.sum()),
            share=float(copied.mean()) if len(ids) else 0.0,
            runs=found,
        )

    def _candidates(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Blocks of pairs (place in the text, place in the training text) whose grams have the same hash."""
        count = len(ids) - self.gram + 1
        if count < 1 or not self.entries:
            return
        buckets = bucket_numbers([ids[at : at + count] for at in range(self.gram)], self.bits)
        low, high = (self.offsets[buckets + at].astype(np.int64) for at in (0, 1))
        before = np.cumsum(high - low)
        for first in range(0, int(before[-1]), BLOCK):
            number = np.arange(first, min(first + BLOCK, int(before[-1])))
            at = np.searchsorted(before, number, side="right")
            entry = high[at] - (before[at] - number)
            yield at, self.positions[entry].astype(np.int64) * self.stride

    def _equal(self, ids: np.ndarray, at: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Whether token `at` of the text is token `place` of the training text; False beyond either's ends."""
        inside = (at >= 0) & (at < len(ids)) & (place >= 0) & (place < len(self.stream))
        equal: np.ndarray = inside & (
            self.stream.take(np.clip(place, 0, len(self.stream) - 1)) == ids[np.clip(at, 0, len(ids) - 1)]
        )
        return equal

    def _match_length(self, ids: np.ndarray, at: np.ndarray, place: np.ndarray, step: int) -> np.ndarray:
        """How many tokens are equal from `at` and `place` on in direction `step` (1 or -1), up to gram + stride."""
        further = step * np.arange(self.gram + self.stride)
        equal = self._equal(ids, at[:, None] + further, place[:, None] + further)
        length: np.ndarray = np.cumprod(equal, axis=1).sum(axis=1)
        return length

    def _matches(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All maximal equal runs of at least `shortest` tokens: begins and ends in the text, begins in the training text.

        Grams of one run lie `stride` apart on one diagonal (place - at); what lies between two of them is compared too.
        """
        blocks: list[np.ndarray] = []
        for at, place in self._candidates(ids):
            first = self._equal(ids, at, place)
            at, place = at[first], place[first]
            right = self._match_length(ids, at, place, 1)
            whole = right >= self.gram
            at, place, right = at[whole], place[whole], right[whole]
            left = self._match_length(ids, at - 1, place - 1, -1)
            long = left + right >= self.shortest
            blocks.append(np.stack((place - at, at, left, right))[:, long])
        rows = np.concatenate(blocks, axis=1) if blocks else np.empty((4, 0), dtype=np.int64)
        diagonal, at, left, right = rows[:, np.lexsort((rows[1], rows[0]))]
        if not len(at):
            return at, at, at
        linked = (np.diff(diagonal) == 0) & (np.diff(at) == self.stride) & (right[:-1] >= self.stride)
        begin = np.flatnonzero(np.r_[True, ~linked])
        end = np.r_[begin[1:], len(at)] - 1
        starts = at[begin] - left[begin]
        return starts, at[end] + right[end], starts + diagonal[begin]

    def _longest_matches(self, ids: np.ndarray) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
        """Runs that lie in no longer run, each with its places in the training text."""
        starts, stops, places = self._matches(ids)
        order = np.lexsort((places, -stops, starts))
        starts, stops, places = starts[order], stops[order], places[order]
        if not len(starts):
            return
        edge = np.flatnonzero(np.r_[True, (np.diff(starts) != 0) | (np.diff(stops) != 0)])
        furthest = 0
        for first, last in zip(edge.tolist(), [*edge[1:].tolist(), len(starts)], strict=True):
            if stops[first] > furthest:
                furthest = int(stops[first])
                yield (int(starts[first]), furthest), places[first:last]

    def _widen(self, data: bytes, ends: np.ndarray, start: int, stop: int, places: np.ndarray) -> tuple[int, int]:
        """The run's ends moved outwards over words that the source has too, but split into other tokens.

        Only whole tokens of the text are added, and only up to a word's end in the source, unless the text itself begins
        or ends there.
        """
        best = (start, stop)
        for place in places[:EDGE_TOKENS].tolist():
            left, right = start, stop
            before, after = self._bytes_at(place, -EDGE_TOKENS), self._bytes_at(place + stop - start, EDGE_TOKENS)
            for at in range(start - 1, max(start - EDGE_TOKENS, 0) - 1, -1):
                added = data[ends[at] : ends[start]]
                if not before.endswith(added):
                    break
                if at == 0 or not _inside_word(before[: len(before) - len(added)][-1:], added[:1]):
                    left = at
            for at in range(stop + 1, min(stop + EDGE_TOKENS, len(ends) - 1) + 1):
                added = data[ends[stop] : ends[at]]
                if not after.startswith(added):
                    break
                if at == len(ends) - 1 or not _inside_word(added[-1:], after[len(added) : len(added) + 1]):
                    right = at
            if right - left > best[1] - best[0]:
                best = left, right
        return best

    def _document_at(self, place: int) -> int:
        return int(np.searchsorted(self.begins, place, side="right")) - 1

    def _bounds(self, place: int) -> tuple[int, int]:
        """Begin and end, in tokens, of the document at a place."""
        number = self._document_at(place)
        last = int(self.begins[number + 1]) if number + 1 < len(self.begins) else len(self.stream)
        return int(self.begins[number]), last

    def _bytes_at(self, place: int, count: int) -> bytes:
        """Bytes of the `count` tokens after a place, or of the -`count` before it, within the document."""
        low, high = self._bounds(min(max(place - (count > 0), 0), len(self.stream) - 1))
        start, stop = (max(place + count, low), place) if count < 0 else (place, min(place + count, high))
        tokens = self.stream.read(start, max(start, stop)).tolist()
        return b"".join(map(self.tokenizer.piece, tokens))

    def _copied_run(
        self, text: _CharacterOffsets, ends: np.ndarray, start: int, stop: int, places: list[int]
    ) -> CopiedRun:
        first, last = text.character(int(ends[start])), text.character(int(ends[stop]))
        copied = text.text[first:last]
        sources: dict[int, CopySource] = {}
        for place in places:
            number = self._document_at(place)
            if number not in sources:
                begin = int(self.begins[number])
                after = self._bytes_at(place, stop - start + SHOWN_TOKENS)
                around = self._bytes_at(place, -SHOWN_TOKENS) + after
                before, _, after = around.partition(copied.encode("utf-8", "replace"))
                sources[number] = CopySource(
                    name=self.catalogue.name("train", number) if self.catalogue else f"document {number + 1}",
                    document=number,
                    token=max(0, place - begin),
                    before=before.decode("utf-8", "ignore"),
                    after=after.decode("utf-8", "ignore"),
                )
            if len(sources) == SHOWN_SOURCES:
                break
        return CopiedRun(first, last, stop - start, copied, len(places), list(sources.values()))


class _CharacterOffsets:
    """Byte offsets to character offsets; a byte inside a character counts as the character's end."""

    def __init__(self, data: bytes):
        self.text = data.decode("utf-8", "replace")
        lengths = [len(character.encode("utf-8", "replace")) for character in self.text]
        self.ends = np.cumsum([0, *lengths])

    def character(self, at: int) -> int:
        return int(np.searchsorted(self.ends, at, side="left"))


def _inside_word(left: bytes, right: bytes) -> bool:
    """Whether a cut between these bytes would lie inside a word."""
    return all(part and (part.isalnum() or part >= b"\x80") for part in (left, right))


def outermost(spans: Sequence[tuple[int, int]] | dict[tuple[int, int], Any]) -> list[tuple[int, int]]:
    """The spans that lie in no other span, in order."""
    kept: list[tuple[int, int]] = []
    for span in sorted(set(spans), key=lambda span: (span[0], -span[1])):
        if not kept or span[1] > kept[-1][1]:
            kept.append(span)
    return kept


def markdown(report: OriginalityReport, most: int = 20) -> str:
    """The report as Markdown: the figures, then the `most` longest runs with their sources."""
    lines = [
        f"{report.copied_tokens:,} of {report.tokens:,} tokens ({report.share:.1%}) stand in copied runs of at least "
        f"{report.min_tokens}; the longest run has {report.longest}."
    ]
    for run in sorted(report.runs, key=lambda run: -run.tokens)[:most]:
        source = run.sources[0]
        others = f", {run.occurrences} times" if run.occurrences > 1 else ""
        lines += [
            "",
            f"- {run.tokens} tokens, from {source.name} (token {source.token:,}{others}):",
            f"  “{' '.join(run.text.split())}”",
        ]
    return "\n".join(lines)


with warnings.catch_warnings():
    warnings.filterwarnings("ignore", 'Field name "json"')  # pydantic's own method of that name is long deprecated

    class OriginalityFlags(FrozenSettings):
        """Index the training text of prepared data, or find what a text has copied from it."""

        data: Path | None = None
        """Folder of prepared data."""
        input: tuple[str, ...] = ()
        """Texts to check: files, or - for standard input; default: build the index."""
        min_tokens: int = Field(0, ge=0, le=100_000)
        """Length from which a run counts as copied; default 0: 12 tokens, 50 for one id a character."""
        json: bool = False  # type: ignore[assignment]
        """Print JSON instead of text."""


def data_of(model: Path) -> Path | None:
    """The prepared data that the run of a model folder names in its config.toml; None where it names none."""
    for place in (model / "config.toml", model.parent / "config.toml"):
        if place.is_file() and (data := read_toml(place).get("data_folder")):
            found = Path(str(data))
            return found if found.is_absolute() or found.is_dir() else ROOT / found
    return None


def read_text(name: str) -> str:
    """A text file, or standard input for `-`; ConfigError where it cannot be read."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).expanduser().read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"--input {name}: not UTF-8 at byte {error.start}: convert it first"
    except OSError as error:
        message = f"--input {name}: {error.strerror}"
    raise ConfigError([message])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; see the module's first lines. Returns the exit code."""

    def body() -> int:
        flags = parse_flags(OriginalityFlags, argv, description=__doc__)
        if flags.data is None:
            raise ConfigError(["--data is missing: give a folder made by prepare_data.py"])
        if not flags.input:
            build_index(flags.data)
            return 0
        index = Index.open(flags.data)
        reports = {name: index.check(read_text(name), flags.min_tokens) for name in flags.input}
        if flags.json:
            print(json.dumps({name: asdict(report) for name, report in reports.items()}, ensure_ascii=False))
        else:
            print("\n\n".join(f"{name}: {markdown(report)}" for name, report in reports.items()))
        return 0

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
