"""The same book under several names: near-duplicates by the shingles that two texts share.

    >>> near_duplicates([sketch(text) for text in texts])          # [[0, 3], …]: numbers of texts that are nearly the same

A shingle is the run of letters behind an anchor, which is four letters whose hash is small: wherever a text is moved, wrapped or cut,
its anchors stay. Of a text the SIZE smallest hashes are kept, by which the share of common shingles is estimated (Broder 1997).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SIZE = 128
FEWEST = 12  # shingles of a text that can be compared
SHINGLE = 32  # letters
LIKE = 0.5  # share of common shingles from which two texts are one book
LARGEST = 1 << 19  # bytes of a text that are looked at
NEAREST = 4  # texts before a text, of those that share a shingle with it, which are compared with it
BLOCKS = 16  # parts in which the hashes are compared: less memory is needed at a time
RARE = 32  # one run of four letters in so many is an anchor
SMALL = bytes(range(256)).lower()
NO_LETTERS = bytes(byte for byte in range(128) if not chr(byte).isalpha())


def sketch(data: bytes) -> bytes:
    """The SIZE smallest hashes (uint32) of a text's shingles; empty where it is too short to be compared."""
    return sketches([data])[0]


def sketches(texts: Sequence[bytes], size: int = SIZE) -> list[bytes]:
    """`sketch` of each of some texts, which is much quicker for short ones; of `size` hashes."""
    parts = [data[:LARGEST].translate(SMALL, NO_LETTERS) for data in texts]
    letters = b"".join(parts)
    if len(letters) < SHINGLE:
        return [b""] * len(texts)
    ends = np.cumsum([len(part) for part in parts])
    starts = np.concatenate([_anchors(letters, offset) for offset in range(4)])
    owners = np.searchsorted(ends, starts, side="right")
    whole = starts + SHINGLE <= ends[owners]
    found = np.unique(owners[whole].astype(np.uint64) << np.uint64(32) | _shingle_hashes(letters, starts[whole]))
    hashes = np.split(found.astype(np.uint32), np.searchsorted(found >> np.uint64(32), np.arange(1, len(texts))))
    return [own[:size].tobytes() if len(own) >= FEWEST else b"" for own in hashes]


def _anchors(letters: bytes, offset: int) -> np.ndarray:
    """The anchors at `offset`, `offset` + 4, …"""
    words = np.frombuffer(letters, dtype="<u4", offset=offset, count=(len(letters) - offset) // 4)
    return 4 * np.flatnonzero(words * np.uint32(2654435761) < np.uint32((1 << 32) // RARE)) + offset


def _shingle_hashes(letters: bytes, starts: np.ndarray) -> np.ndarray:
    """A hash below 2**32 of the SHINGLE letters from each start on, uint64."""
    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(letters, dtype=np.uint8), SHINGLE)
    mixed = np.zeros(len(starts), dtype=np.uint64)
    for part in windows[starts].view("<u8").T:  # with the finaliser of splitmix64 (Steele et al. 2014)
        mixed = (mixed ^ part) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed >> np.uint64(32)


def near_duplicates(sketches: Sequence[bytes]) -> list[list[int]]:
    """Groups of at least two texts that are nearly the same, by their sketches; texts with an empty one are in none.

    A text is compared with those before it that share hashes with it, of each hash the NEAREST.
    """
    arrays = [np.frombuffer(found, dtype=np.uint32) for found in sketches]
    pairs, counts = _pairs(arrays)
    group = list(range(len(arrays)))

    def root(number: int) -> int:
        while group[number] != number:
            group[number] = number = group[group[number]]
        return number

    for pair in pairs[counts >= FEWEST // 2].tolist():
        one, two = pair >> 32, pair & 0xFFFFFFFF
        first, second = sorted((root(one), root(two)))
        if first != second and _likeness(arrays[one], arrays[two]) >= LIKE:
            group[second] = first
    members: dict[int, list[int]] = {}
    for number in range(len(arrays)):
        members.setdefault(root(number), []).append(number)
    return [numbers for numbers in members.values() if len(numbers) > 1]


def _pairs(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of sketches that share hashes, as one << 32 | two, int64, and how many hashes each pair was found by."""
    values = np.concatenate([np.array([], dtype=np.uint32), *arrays])
    holders = np.repeat(np.arange(len(arrays), dtype=np.int32), [len(array) for array in arrays])
    pairs = counts = np.array([], dtype=np.int64)
    for block in range(BLOCKS):
        here = np.flatnonzero(values % BLOCKS == block)
        here = here[np.argsort(values[here], kind="stable")]
        for distance in range(1, NEAREST + 1):
            one, two = here[:-distance], here[distance:]
            same = np.flatnonzero(values[one] == values[two])
            found, times = np.unique(holders[one[same]].astype(np.int64) << 32 | holders[two[same]], return_counts=True)
            pairs, at = np.unique(np.concatenate([pairs, found]), return_inverse=True)
            counts = np.bincount(at, np.concatenate([counts, times]), len(pairs)).astype(np.int64)
    return pairs, counts


def _likeness(one: np.ndarray, two: np.ndarray) -> float:
    """The share of common shingles, estimated from the smallest hashes of both together."""
    size = min(len(one), len(two))
    both = np.sort(np.concatenate([one, two]))
    twice = both[1:] == both[:-1]
    largest = np.delete(both, np.flatnonzero(twice))[size - 1]
    return int((both[1:][twice] <= largest).sum()) / size
