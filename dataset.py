"""Token shards on disk -> batches for the model, in an order that depends only on a seed.

    data = TokenData.open(Path("data/novels"))
    sampler = WindowSampler(len(data.train), block_size=256, seed=1337)
    x, y = data.train.batch(sampler.starts(first=0, count=16), 256)     # each [16, 256] int64

The position in the data is one integer, the number of windows used so far: window number `i` of a run is always the
same, on any number of devices, so saving the position is saving that integer.

Where `prepare_data.py --control` has put control ids before the documents, each window begins with its document's.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from storage.shards import Manifest, Split

REMAP_BYTES = 32 << 20  # mappings are renewed after this much reading, so that pages read do not fill the memory


class DataError(ValueError):
    """Prepared data that cannot be used; the message names the file and the fix."""


def plain_windows(starts: np.ndarray) -> np.ndarray:
    """Which training windows, bool [len(starts)], are read without styles: an eighth of them, by a hash of their start.

    From those the model learns to write in no particular style (Ho & Salimans 2021, section 3.2).
    """
    # Multiplicative hash (Knuth): the top 3 bits are zero for one start in eight, the same in every run.
    plain: np.ndarray = (starts.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(61) == 0
    return plain


class Documents:
    """Where the documents of a stream begin, and the control id of each one's style; found in one pass, a second per GB."""

    def __init__(self, stream: TokenStream, lowest: int, eot: int | None):
        """lowest: the first control id; all ids from there on are styles."""
        found = [np.zeros(1, dtype=np.int64)]
        for first in range(0, len(stream), 1 << 22):  # 4 M tokens at a time, so that memory stays small
            part = stream.read(first, min(first + (1 << 22), len(stream)))
            found.append(np.flatnonzero(part >= lowest) + first)
            # A document begins at its control id, or after an end-of-text; both may mark the same place.
            if eot is not None:
                found.append(np.flatnonzero(part == eot) + first + 1)
        begins = np.unique(np.concatenate(found))
        self.begins = begins[begins < len(stream)]  # nothing begins after the last end-of-text
        ids = stream.take(self.begins).astype(np.int64)
        self.styles = np.where(ids >= lowest, ids, -1)
        self.lowest = lowest

    def style_at(self, places: np.ndarray) -> np.ndarray:
        """The control id of the document that each of `places` lies in, -1 for none; int64, in their shape."""
        # the last beginning at or before each place
        return self.styles[np.searchsorted(self.begins, places, side="right") - 1]


class TokenStream:
    """The tokens of one split: its shard files read as one sequence through memory maps."""

    documents: Documents | None = None
    """Documents and their styles; None if the data has no styles."""

    def __init__(self, files: list[Path], lengths: list[int], dtype: str):
        self.files, self.dtype = files, np.dtype(dtype).newbyteorder("<")  # little-endian on every machine
        self.ends = np.cumsum([0, *lengths])  # shard k holds tokens ends[k] .. ends[k+1]-1
        self._maps: dict[int, np.ndarray] = {}
        self._read = 0

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _shard(self, number: int) -> np.ndarray:
        if (
            number not in self._maps
        ):  # a plain array over the mapping: slicing a memmap costs as much as copying a window
            self._maps[number] = np.asarray(np.memmap(self.files[number], dtype=self.dtype, mode="r"))
        return self._maps[number]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1 as a new array; a range may cross shards."""
        out = np.empty(max(0, stop - start), dtype=self.dtype)
        self._fill(out, start)
        return out

    def _fill(self, out: np.ndarray, start: int) -> None:
        """Copy the tokens from `start` on into all of `out`, of any integer type."""
        done, stop = start, start + len(out)
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start}..{stop} lie outside 0..{len(self)}")
        # side="right": a start at a shard's end belongs to the next shard
        number = int(self.ends.searchsorted(start, side="right")) - 1
        while done < stop:
            first, last = int(self.ends[number]), int(self.ends[number + 1])
            upto = min(stop, last)
            out[done - start : upto - start] = self._shard(number)[done - first : upto - first]
            done, number = upto, number + 1
        self._read += len(out) * self.dtype.itemsize
        # Pages read through a mapping count as this process's memory until it is unmapped.
        if self._read > REMAP_BYTES:
            self._maps.clear()
            self._read = 0

    def take(self, indices: np.ndarray) -> np.ndarray:
        """The tokens at `indices`, of any shape and order, as a new array of that shape."""
        out = np.empty(indices.shape, dtype=self.dtype)
        numbers = np.searchsorted(self.ends, indices, side="right") - 1
        for number in np.unique(numbers).tolist():  # one gather per shard
            here = numbers == number
            out[here] = self._shard(number)[indices[here] - int(self.ends[number])]
        return out

    def plain(self, start: int, length: int, lowest: int) -> np.ndarray:
        """`length` tokens below `lowest` from `start` on, or, where the stream ends too soon, the last ones before its end."""
        stop = start + length
        while True:
            row = self.read(start, stop)
            row = row[row < lowest]
            missing = length - len(row)  # as many as the control ids that were removed
            if missing <= 0 or (start, stop) == (0, len(self)):
                return row[:length]
            # Extend to the right by what is missing; past the end of the stream, to the left instead.
            start, stop = max(0, start - max(0, stop + missing - len(self))), min(len(self), stop + missing)

    def batch(self, starts: np.ndarray, block_size: int, plain: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Windows at `starts`: x and y, each [len(starts), block_size] int64, y one token ahead of x.

        Where there are styles, the first token of a window is replaced by the control id of its document's style, as the
        one at the document's beginning is usually far away. plain: windows to be read without any control id, bool
        [len(starts)]; None: no window.
        """
        # One token more than the context: x and y are this row without its last and without its first token.
        rows = np.empty((len(starts), block_size + 1), dtype=np.int64)
        for row, start in zip(rows, np.asarray(starts).tolist(), strict=True):
            self._fill(row, start)
        if self.documents is not None:
            styles = self.documents.style_at(starts)
            for at in np.flatnonzero(plain) if plain is not None else ():
                free = self.plain(int(starts[at]), block_size + 1, self.documents.lowest)
                if len(free) == block_size + 1:  # otherwise the text is too short: keep the window with its style
                    rows[at], styles[at] = free, -1
            rows[styles >= 0, 0] = styles[styles >= 0]
        tokens = torch.from_numpy(rows)  # shares memory with `rows`, and the slices below share it too
        return tokens[:, :-1], tokens[:, 1:]


@dataclass(frozen=True)
class TokenData:
    """A prepared folder: its manifest and both splits."""

    folder: Path
    manifest: Manifest
    train: TokenStream
    val: TokenStream

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> TokenData:
        """Open what `prepare_data.py` wrote. Sizes are checked here, the largest id by the manifest; `verify` also
        checks every sha256.

        Raises DataError naming the shard that is missing, truncated or altered.
        """
        manifest = Manifest.load(folder)
        streams = [
            cls._stream(folder, manifest, split, verify) for split in (manifest.splits.train, manifest.splits.val)
        ]
        if styles := manifest.tokenizer.styles:
            from tokenizer import load_tokenizer

            eot = load_tokenizer(folder).eot
            for stream in streams:
                stream.documents = Documents(stream, min(styles.values()), eot)
        return cls(folder, manifest, streams[0], streams[1])

    @staticmethod
    def _stream(folder: Path, manifest: Manifest, split: Split, verify: bool) -> TokenStream:
        width = np.dtype(manifest.dtype).itemsize
        remedy = "prepare the data again with prepare_data.py"
        files = [folder / shard.file for shard in split.shards]
        for path, shard in zip(files, split.shards, strict=True):
            if not path.is_file():
                raise DataError(f"{path}: this shard is missing; {remedy}")
            if path.stat().st_size != shard.tokens * width:
                raise DataError(
                    f"{path}: {path.stat().st_size:,} bytes, but {shard.tokens:,} tokens take {shard.tokens * width:,}: "
                    f"the shard is truncated or altered; {remedy}"
                )
            if verify:
                with path.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != shard.sha256:
                    raise DataError(f"{path}: its sha256 is not the manifest's: the shard was altered; {remedy}")
        return TokenStream(files, [shard.tokens for shard in split.shards], manifest.dtype)


class WindowSampler:
    """Shuffled windows of block_size + 1 tokens without replacement: each epoch covers the whole text.

    In an epoch the windows start block_size apart from a random offset, the first and last moved to the ends of the text,
    and come in random order; offset and order depend on (seed, epoch) alone. Window `i` of a run is the
    `i % per_epoch`-th of epoch `i // per_epoch`, so a rank finds its own without asking the others.
    """

    def __init__(self, tokens: int, block_size: int, seed: int):
        if tokens < block_size + 1:
            raise DataError(
                f"{tokens} tokens of text are fewer than one window of {block_size} + 1: "
                f"add text or train with --model.block-size {max(8, tokens // 4)}"
            )
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        # Windows that cover tokens - 1 predictions, and one more because the random offset cuts the first and the last.
        self.per_epoch = -(-(tokens - 1) // block_size) + (1 if tokens > block_size + 1 else 0)
        self._epoch = -1  # only one epoch's order is kept: 8 bytes a window
        self._starts = np.empty(0, dtype=np.int64)

    def _load(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            # Seeded by (seed, epoch): a resumed run computes the same order again without any saved state.
            generator = np.random.default_rng([self.seed, epoch])
            # A new offset each epoch, so that windows are cut at other places and contexts differ.
            phase = int(generator.integers(self.block_size))
            steps = np.arange(self.per_epoch, dtype=np.int64) * self.block_size + phase - self.block_size
            starts = np.clip(steps, 0, self.tokens - 1 - self.block_size)
            generator.shuffle(starts)
            self._epoch, self._starts = epoch, starts
        return self._starts

    def starts(self, first: int, count: int) -> np.ndarray:
        """First tokens of windows number first..first+count-1 of the run, int64 [count]; may cross epochs."""
        out = []
        while count:
            epoch, at = divmod(first, self.per_epoch)
            part = self._load(epoch)[at : at + count]  # shorter at the end of an epoch
            out.append(part)
            first, count = first + len(part), count - len(part)
        return np.concatenate(out)


def training_batches(
    stream: TokenStream,
    sampler: WindowSampler,
    *,
    batch_size: int,
    grad_accum_steps: int,
    first: int = 0,
    rank: int = 0,
    world: int = 1,
    device: torch.device | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless micro-batches (x, y), each [batch_size, T], of this rank, from window number `first` on.

    An optimizer step takes `world * grad_accum_steps * batch_size` windows; rank r takes the r-th run of
    `grad_accum_steps * batch_size` of them, so the ranks' windows are disjoint and together are those of one process.
    On CUDA a thread reads ahead into pinned memory and the transfer overlaps with computing.
    """
    per_rank = grad_accum_steps * batch_size  # windows of one rank in one step

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        step_first = first
        while True:
            for micro_batch in range(grad_accum_steps):
                # Windows of a step: rank 0's micro-batches, then rank 1's, ...: fewer ranks see the same windows.
                at = step_first + rank * per_rank + micro_batch * batch_size
                starts = sampler.starts(at, batch_size)
                yield stream.batch(starts, sampler.block_size, plain_windows(starts))
            step_first += world * per_rank

    if device is None or device.type != "cuda":
        for x, y in read():
            yield (x, y) if device is None else (x.to(device), y.to(device))
        return
    with prefetched(read, pinned) as ready:
        for x, y in ready:
            # From pinned memory the copy is asynchronous: it runs while the GPU computes the previous batch.
            yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def pinned(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The pair in page-locked memory, contiguous: strided slices would be copied through pageable memory first."""
    x, y = pair
    return x.contiguous().pin_memory(), y.contiguous().pin_memory()


class prefetched:
    """Run an endless iterator in a thread, a few items ahead; leaving the context ends the thread."""

    def __init__(
        self,
        source: Callable[[], Iterator[tuple[Tensor, Tensor]]],
        finish: Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]],
        depth: int = 4,
    ):
        self.source, self.finish = source, finish
        self.items: queue.Queue[tuple[Tensor, Tensor] | BaseException] = queue.Queue(depth)
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._work, name="prefetch", daemon=True)

    def _put(self, item: tuple[Tensor, Tensor] | BaseException) -> None:
        # With a timeout, so that a thread blocked on a full queue notices the end.
        while not self.over.is_set():
            try:
                return self.items.put(item, timeout=0.2)
            except queue.Full:
                continue

    def _work(self) -> None:
        try:
            for item in self.source():
                self._put(self.finish(item))
                if self.over.is_set():
                    return
        except BaseException as error:  # handed to the reader, which raises it
            self._put(error)

    def __enter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.thread.start()

        def ready() -> Iterator[tuple[Tensor, Tensor]]:
            while True:
                item = self.items.get()
                if isinstance(item, BaseException):
                    raise item
                yield item

        return ready()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join(timeout=5)


def validation_batches(
    stream: TokenStream, block_size: int, batch_size: int, limit: int = 0, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """The fixed validation pass: windows side by side, every token predicted once.

    x and y are [<= batch_size, T]; the last window is shorter and comes alone. `limit` keeps the pass to that many
    predicted tokens (0: all), in windows spread evenly over the text. Ranks take every world-th batch; their sums add up
    to the same pass.
    """
    last = len(stream) - 1
    if last < 1:
        raise DataError("the validation split has fewer than two tokens: raise --val-fraction or add text")
    taken = min(limit or last, last)  # predictions: the first token of the text has no predecessor
    whole, rest = divmod(taken, block_size)
    batches: list[np.ndarray] = []
    if whole:
        # Multiples of block_size, evenly spread: without a limit these are 0, T, 2T, ..., side by side.
        starts = np.arange(whole, dtype=np.int64) * (last // block_size) // whole * block_size
        batches = np.split(starts, range(batch_size, whole, batch_size))
    for number, part in enumerate(batches):
        if number % world == rank:
            yield stream.batch(part, block_size)
    # The remaining tokens, as a shorter window at the end of the text; its turn among the ranks comes last.
    if rest and len(batches) % world == rank:
        yield stream.batch(np.array([last - rest]), rest)
