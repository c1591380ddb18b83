"""Token shards on disk and the manifest that describes them.

    python -c "import pathlib; from storage import shards; print(shards.Manifest.load(pathlib.Path('data/sample/tokens')))"

`train_000000.bin` …, `val_000000.bin` … hold little-endian uint16, or uint32 where there are more than 65,536 ids. The
files of a split, one after another, are its tokens.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from config import FrozenSettings, describe_faults
from storage.atomic import atomic_write_text

MANIFEST = "manifest.json"
SPLITS: tuple[Literal["train"], Literal["val"]] = ("train", "val")


class ManifestError(ValueError):
    """A folder without usable prepared data; the message names it and the fix."""


class Shard(FrozenSettings):
    """One file of tokens."""

    file: str = Field(pattern=r"^(train|val)_\d{6}\.bin$")
    tokens: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Split(FrozenSettings):
    """All tokens of training or validation."""

    tokens: int = Field(ge=1)
    bytes: int = Field(ge=1)
    """UTF-8 bytes of the text that the tokens encode; an end-of-text token encodes none."""
    documents: int = Field(ge=1)
    shards: tuple[Shard, ...] = Field(min_length=1)


class Splits(FrozenSettings):
    train: Split
    val: Split


class TokenizerIdentity(FrozenSettings):
    kind: Literal["gpt2", "bpe", "char"]
    vocab_size: int = Field(ge=1)
    fingerprint: str
    styles: dict[str, int] = Field(default_factory=dict)
    """Control id of each style, which comes before each document of that style."""


class Source(FrozenSettings):
    """The texts that were prepared, and the settings."""

    name: str
    documents: int
    settings: dict[str, Any]
    identity: str
    """sha256 of the settings and of each file's name, size and time of change."""

    def __str__(self) -> str:
        return self.name


class Manifest(FrozenSettings):
    """The contents of a prepared folder, as `manifest.json` has them."""

    format: Literal[1] = 1
    tokenizer: TokenizerIdentity
    dtype: Literal["uint16", "uint32"]
    splits: Splits
    source: Source
    cleaning: dict[str, int]
    """How often each cleaning step changed something."""
    max_id: int = Field(ge=0)
    """Largest id in the shards."""

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        for name in SPLITS:
            split: Split = getattr(self.splits, name)
            if sum(shard.tokens for shard in split.shards) != split.tokens:
                raise ValueError(f"splits.{name}: its shards do not add up to its {split.tokens} tokens")
        if self.dtype != ("uint16" if self.tokenizer.vocab_size <= 65536 else "uint32"):
            raise ValueError(f"dtype {self.dtype} does not go with {self.tokenizer.vocab_size} ids")
        if self.max_id >= self.tokenizer.vocab_size:
            raise ValueError(f"max_id {self.max_id} is not below the tokenizer's {self.tokenizer.vocab_size} ids")
        return self

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """The manifest in `folder`. Raises ManifestError if it is missing, damaged or of another format."""
        path = Path(folder) / MANIFEST
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise ManifestError(
                f"{path}: no such file; prepare the data first: `python prepare_data.py --input my_books/ --out {folder}`"
            ) from None
        except OSError as error:
            raise ManifestError(f"{path}: {error.strerror}") from None
        except ValidationError as error:
            faults = "; ".join(describe_faults(error)[:4])
            raise ManifestError(f"{path} is damaged or of another version ({faults}): prepare the data again") from None

    def save(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`, atomically."""
        atomic_write_text(Path(folder) / MANIFEST, self.model_dump_json(indent=1) + "\n")


class ShardWriter:
    """Writes one split's tokens to files of `shard_tokens` each; `state` and `restore` make it resumable."""

    def __init__(self, folder: Path, split: str, shard_tokens: int, dtype: type[np.generic]):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.shards: list[dict[str, Any]] = []
        self.bytes = self.documents = self.open_tokens = 0
        self.max_id = -1
        self._digest = hashlib.sha256()
        self._file: Any = None

    @property
    def tokens(self) -> int:
        return sum(shard["tokens"] for shard in self.shards) + self.open_tokens

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.split}_{len(self.shards):06d}.bin"

    def append(self, tokens: np.ndarray) -> None:
        if len(tokens):
            self.max_id = max(self.max_id, int(tokens.max()))
        while len(tokens):
            part, tokens = np.split(tokens, [self.shard_tokens - self.open_tokens])
            if self._file is None:
                self._file = self._path.open("ab")
            data = part.astype(self.dtype, copy=False).tobytes()
            self._file.write(data)
            self._digest.update(data)
            self.open_tokens += len(part)
            if self.open_tokens == self.shard_tokens:
                self.close()

    def sync(self) -> None:
        """Flush everything written to the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Finish the open shard, if there is one."""
        if self._file is None:
            return
        self.sync()
        self._file.close()
        self.shards.append({"file": self._path.name, "tokens": self.open_tokens, "sha256": self._digest.hexdigest()})
        self._file, self.open_tokens, self._digest = None, 0, hashlib.sha256()

    def state(self) -> dict[str, Any]:
        names = ("bytes", "documents", "open_tokens", "max_id")
        return {name: getattr(self, name) for name in names} | {"shards": list(self.shards)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to `state` and drop everything written after it. Raises OSError if the files are missing or altered."""
        for name, value in state.items():
            setattr(self, name, value)
        self.shards = list(self.shards)
        self._digest = hashlib.sha256()
        for shard in self.shards:
            if (self.folder / shard["file"]).stat().st_size != shard["tokens"] * self.dtype.itemsize:
                raise OSError(f"{shard['file']} was altered")
        for path in self.folder.glob(f"{self.split}_*.bin"):
            if int(path.stem.split("_")[1]) > len(self.shards) - (self.open_tokens == 0):
                path.unlink()
        if self.open_tokens:
            size = self.open_tokens * self.dtype.itemsize
            if self._path.stat().st_size < size:
                raise OSError(f"{self._path.name} was altered")
            os.truncate(self._path, size)
            with self._path.open("rb") as file:
                while data := file.read(1 << 20):
                    self._digest.update(data)
            self._file = self._path.open("ab")

    def result(self) -> Split:
        return Split.model_validate(
            {"tokens": self.tokens, "bytes": self.bytes, "documents": self.documents, "shards": self.shards}
        )


def join(folders: Sequence[Path], out: Path) -> Manifest:
    """Fill `out`, which must be empty, with the shards of several prepared folders, one after the other.

    Files are linked where the disk can, else copied. Raises ManifestError where the folders do not go together: another
    tokenizer, or parts (`prepare_data.py --part`) of other texts, twice or missing.
    """
    manifests = [Manifest.load(folder) for folder in folders]
    first = manifests[0]
    for folder, manifest in zip(folders, manifests, strict=True):
        if (manifest.tokenizer, manifest.dtype) != (first.tokenizer, first.dtype):
            raise ManifestError(
                f"{folder} has another tokenizer than {folders[0]}: prepare it again with --tokenizer-from {folders[0]}"
            )
    settings, are_parts = _joined_settings(manifests)
    splits = {name: _join_split(name, folders, manifests, out) for name in SPLITS}
    cleaning: Counter[str] = Counter()
    for manifest in manifests:
        cleaning.update(manifest.cleaning)
    source = {
        "name": ", ".join(dict.fromkeys(manifest.source.name for manifest in manifests)),
        "documents": first.source.documents if are_parts else sum(m.source.documents for m in manifests),
        "settings": settings,
        "identity": hashlib.sha256("".join(m.source.identity for m in manifests).encode()).hexdigest(),
    }
    values = {
        "splits": splits,
        "source": source,
        "cleaning": dict(cleaning),
        "max_id": max(manifest.max_id for manifest in manifests),
    }
    joined = Manifest.model_validate(first.model_dump() | values)
    joined.save(out)
    return joined


def _joined_settings(manifests: Sequence[Manifest]) -> tuple[dict[str, Any], bool]:
    """(the first folder's settings without `part`, whether the folders are parts of one preparation).

    Raises ManifestError where they are parts, but not all parts of the same texts, each once.
    """
    settings = [dict(manifest.source.settings) for manifest in manifests]
    parts = [str(setting.pop("part", "")) for setting in settings]
    if not any(parts):
        return settings[0], False
    whole = [f"{number}/{len(manifests)}" for number in range(1, len(manifests) + 1)]
    if sorted(parts) != sorted(whole):
        raise ManifestError(
            f"these are the parts {', '.join(part or 'none' for part in parts)}, not {', '.join(whole)}"
        )
    sources = [manifest.source for manifest in manifests]
    texts = [(source.name, source.documents, setting) for source, setting in zip(sources, settings, strict=True)]
    if any(other != texts[0] for other in texts):
        raise ManifestError("these are parts of different texts, or prepared with different settings")
    return settings[0], True


def _join_split(name: str, folders: Sequence[Path], manifests: Sequence[Manifest], out: Path) -> dict[str, Any]:
    """The sums of one split of `folders`, and its shards, which are linked or copied into `out` in order."""
    totals: dict[str, Any] = {"tokens": 0, "bytes": 0, "documents": 0, "shards": []}
    for folder, manifest in zip(folders, manifests, strict=True):
        split: Split = getattr(manifest.splits, name)
        for key in ("tokens", "bytes", "documents"):
            totals[key] += getattr(split, key)
        for shard in split.shards:
            path = out / f"{name}_{len(totals['shards']):06d}.bin"
            try:
                os.link(folder / shard.file, path)
            except OSError:
                shutil.copyfile(folder / shard.file, path)
            totals["shards"].append(shard.model_dump() | {"file": path.name})
    return totals
