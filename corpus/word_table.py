"""Byte-level BPE of much text: words that were met before are looked up, all words of a text at once.

    >>> encode = WordTable(gpt2_tokenizer()).encode          # the ids of gpt2_tokenizer().encode_array, at several times its speed

GPT-2's pre-tokenizer cuts a text into words that are merged one by one, and prose repeats its words. The words of ASCII text are
found with NumPy; what holds other characters, between two spaces, counts as one word. A word in the table is one or a few
ids there; every other goes to the tokenizer, and into the table if it is short.
"""

from __future__ import annotations

import numpy as np

from tokenizer import BytePairTokenizer

LETTER, DIGIT, OTHER, BLANK, SPACE, FOREIGN = range(6)
SLOTS = 1 << 18
LONGEST = 15  # bytes of a word in the table: two 64-bit numbers with its length
REMEMBERED = 1 << 15  # words that find no place in the table
MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))
LATIN_SIGNS = np.isin(
    np.arange(256), [0xA1 + n for n in range(31) if n not in (9, 17, 18, 20, 24, 25, 27, 28, 29)]
)  # that are OTHER
ONE_LETTER = np.isin(np.arange(256), list(b"sdmt"))  # of 's, 'd, 'm, 't
TWO_LETTERS = (b"ll", b"ve", b"re")


def _classes() -> np.ndarray:
    kinds = np.full(256, OTHER, dtype=np.uint8)
    kinds[128:] = FOREIGN
    for byte in range(128):
        if chr(byte).isalpha():
            kinds[byte] = LETTER
        elif chr(byte).isdigit():
            kinds[byte] = DIGIT
    kinds[list(b"\t\n\x0b\x0c\r")] = BLANK
    kinds[ord(" ")] = SPACE
    return kinds


CLASSES = _classes()
# the bytes of a word that lie in its first and in its second number, by its length
FIRST = np.array([(1 << 8 * min(size, 8)) - 1 for size in range(LONGEST + 1)], dtype=np.uint64)
SECOND = np.array([(1 << 8 * max(size - 8, 0)) - 1 for size in range(LONGEST + 1)], dtype=np.uint64)


def word_starts(data: np.ndarray) -> np.ndarray:
    """Where the words of a text begin, int64, from 0; `data`: its UTF-8 bytes, uint8, at least one.

    Words as in `tokenizer.PATTERN`; what holds bytes of other than ASCII characters, between two places where white
    space follows ASCII, is one word.
    """
    kinds = _kinds(data)
    white = (kinds == BLANK) | (kinds == SPACE)
    begins = np.empty(len(data), dtype=bool)
    begins[0] = True
    np.not_equal(kinds[1:], kinds[:-1], out=begins[1:])
    # a run of white space is a word, without its last character before other text, which is a word or begins one
    begins[1:] &= ~(white[1:] & white[:-1]) & (white[1:] | (kinds[:-1] != SPACE))
    begins[:-1] |= white[:-1] & ~white[1:]
    _cut_contractions(data, kinds, begins)
    foreign = np.flatnonzero(kinds == FOREIGN)
    if len(foreign):
        edges = np.flatnonzero(white[1:] & ~white[:-1] & (kinds[:-1] != FOREIGN)) + 1
        edges = np.concatenate([[0], edges, [len(data)]])
        parts = np.unique(np.searchsorted(edges, foreign, side="right"))
        inner = np.zeros(len(data) + 1, dtype=np.int8)
        inner[edges[parts - 1] + 1] += 1
        np.subtract.at(inner, edges[parts], 1)
        begins &= np.cumsum(inner[:-1], dtype=np.int8) <= 0
    return np.flatnonzero(begins)


def _kinds(data: np.ndarray) -> np.ndarray:
    """The kind of each byte, uint8; also of Latin-1's characters and of dashes, quotation marks and the like."""
    kinds = CLASSES[data]
    leads = np.flatnonzero(kinds == FOREIGN)
    if not len(leads):
        return kinds
    lead, second, third = data[leads], *(data[np.minimum(leads + n, len(data) - 1)] for n in (1, 2))
    for found, kind, size in (
        ((lead == 0xC3) & (second != 0x97) & (second != 0xB7), LETTER, 2),  # U+00C0 to U+00FF without × and ÷
        ((lead == 0xC2) & LATIN_SIGNS[second], OTHER, 2),
        ((lead == 0xE2) & (second == 0x80) & (third >= 0x90) & (third <= 0xA7), OTHER, 3),  # U+2010 to U+2027
    ):
        for number in range(size):
            kinds[leads[found] + number] = kind
    return kinds


def _cut_contractions(data: np.ndarray, kinds: np.ndarray, begins: np.ndarray) -> None:
    """Mark the words `'s`, `'ll` and the like, and those behind them, in `begins`."""
    marks = np.flatnonzero((data[:-1] == ord("'")) & begins[:-1])
    marks = marks[kinds[marks + 1] == LETTER]
    short = marks[ONE_LETTER[data[marks + 1]]]
    begins[short + 1] = False
    begins[short[short + 2 < len(data)] + 2] = True
    marks = marks[marks + 2 < len(data)]
    for first, second in TWO_LETTERS:
        long = marks[(data[marks + 1] == first) & (data[marks + 2] == second)]
        begins[long + 1] = False
        begins[long[long + 3 < len(data)] + 3] = True


class WordTable:
    """Encodes with a table of words, each in one of the two places that its bytes give, as long as there is room."""

    def __init__(self, tokenizer: BytePairTokenizer):
        self._tokenizer = tokenizer
        self._most = 8 // np.dtype(tokenizer.dtype).itemsize  # ids of a word in the table
        self._masks = np.array(
            [sum(1 << 8 * n for n in range(size)) for size in range(self._most + 1)], dtype=f"u{self._most}"
        )  # as many bytes are 1 as a word has ids
        self._rows = np.zeros((SLOTS, 4), dtype=np.uint64)  # two numbers of the word, its ids, how many they are
        self._others: dict[bytes, np.ndarray] = {}  # words for which there is no place
        self._add_vocabulary()

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, as `encode_array` of the tokenizer gives them."""
        try:
            raw = text.encode()
        except UnicodeEncodeError:  # half a surrogate pair
            return self._tokenizer.encode_array(text)
        if not raw:
            return np.array([], dtype=self._tokenizer.dtype)
        starts = word_starts(np.frombuffer(raw, dtype=np.uint8))
        lengths = np.diff(starts, append=len(raw))
        keys = _keys(raw, starts, lengths)
        rows, known = self._find(keys)
        known &= lengths <= LONGEST
        sizes = rows[:, 3] * known
        ids = np.ascontiguousarray(rows[:, 2]).view(self._tokenizer.dtype).reshape(-1, self._most)
        found = ids[self._masks.take(sizes).view(bool).reshape(-1, self._most)]
        missing = np.flatnonzero(~known)
        if not len(missing):
            return found
        begins = starts[missing]
        words = [
            raw[begin:end] for begin, end in zip(begins.tolist(), (begins + lengths[missing]).tolist(), strict=True)
        ]
        others = self._encode_words(words, keys[missing])
        parts, done = [], 0
        for stop, other in zip(np.cumsum(sizes)[missing].tolist(), others, strict=True):
            parts += [found[done:stop], other]
            done = stop
        return np.concatenate([*parts, found[done:]])

    def _find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(a row for each word, whether it is that of the word)."""
        places = _places(keys)
        rows = self._rows.take(places, axis=0, mode="wrap")
        known = (rows[:, 0] == keys[:, 0]) & (rows[:, 1] == keys[:, 1])
        others = np.flatnonzero(~known)
        rows[others] = self._rows.take(places[others] ^ 1, axis=0, mode="wrap")
        known[others] = (rows[others, :2] == keys[others]).all(axis=1)
        return rows, known

    def _encode_words(self, words: list[bytes], keys: np.ndarray) -> list[np.ndarray]:
        """The ids of words that the table lacks, into which those that are short are put."""
        if len(self._others) > REMEMBERED:
            self._others.clear()
        result, new = [], []
        for number, word in enumerate(words):
            ids = self._others.get(word)
            if ids is None:
                if len(word) > 4 * LONGEST:
                    result.append(self._tokenizer.encode_array(word.decode()))
                    continue

                ids = np.array(self._tokenizer.encode_short(word.decode()), dtype=self._tokenizer.dtype)
                self._others[word] = ids
                if len(word) <= LONGEST and len(ids) <= self._most:
                    new.append(number)
            result.append(ids)
        if new:
            padded = np.zeros((len(new), self._most), dtype=self._tokenizer.dtype)
            for row, number in zip(padded, new, strict=True):
                row[: len(result[number])] = result[number]
            sizes = np.array([len(result[number]) for number in new], dtype=np.uint64)
            self._add(keys[new], padded.view(np.uint64)[:, 0], sizes)
        return result

    def _add_vocabulary(self) -> None:
        """The words that are one id, of which the smaller ids, of frequent words, come first."""
        pieces = enumerate(map(self._tokenizer.piece, range(self._tokenizer.vocab_size)))
        words = {word: number for number, word in pieces if 0 < len(word) <= LONGEST and word.isascii()}
        lengths = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
        keys = _keys(b"".join(words), np.cumsum(lengths) - lengths, lengths)
        self._add(keys, np.fromiter(words.values(), dtype=np.uint64), np.ones(len(words), dtype=np.uint64))

    def _add(self, keys: np.ndarray, ids: np.ndarray, sizes: np.ndarray) -> None:
        """Put words into the table, as many as find room."""
        rows = np.column_stack([keys, ids, sizes])[::-1]  # of two words in one place the last is kept: the first given
        for other in (0, 1):
            places = _places(rows[:, :2]) ^ other
            free = self._rows[places, 3] == 0
            self._rows[places[free]] = rows[free]
            rows = rows[~self._find(rows[:, :2])[1]]


def _places(keys: np.ndarray) -> np.ndarray:
    mixed = keys[:, 0] * MIX[0] ^ keys[:, 1] * MIX[1]
    return (mixed >> np.uint64(65 - SLOTS.bit_length())).astype(np.int64)


def _keys(raw: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Two numbers for each word, uint64 [words, 2], which differ between words of at most LONGEST bytes."""
    numbers = np.frombuffer(raw + bytes(24 - len(raw) % 8), dtype="<u8")
    at, shift = starts >> 3, ((starts & 7) << 3).astype(np.uint64)
    back = np.uint64(63) - shift
    low, middle, high = numbers[at], numbers[at + 1], numbers[at + 2]
    short = np.minimum(lengths, LONGEST)
    keys = np.empty((len(starts), 2), dtype=np.uint64)
    keys[:, 0] = (low >> shift | middle << np.uint64(1) << back) & FIRST[short]
    keys[:, 1] = (middle >> shift | high << np.uint64(1) << back) & SECOND[short]
    keys[:, 1] |= short.astype(np.uint64) << np.uint64(56)
    return keys
