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

from config import Strict, describe_faults
from storage.atomic import replace_text

MANIFEST = "manifest.json"
SPLITS: tuple[Literal["train"], Literal["val"]] = ("train", "val")


class ManifestError(ValueError):
    """A folder that holds no usable prepared data; the message names it and the remedy."""


class Shard(Strict):
    """One file of tokens."""

    file: str = Field(pattern=r"^(train|val)_\d{6}\.bin$")
    tokens: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Split(Strict):
    """All tokens of training or validation."""

    tokens: int = Field(ge=1)
    bytes: int = Field(ge=1)
    """UTF-8 bytes of the text whose tokens these are; end-of-text tokens stand for none."""
    documents: int = Field(ge=1)
    shards: tuple[Shard, ...] = Field(min_length=1)


class Splits(Strict):
    train: Split
    val: Split


class TokenizerIdentity(Strict):
    kind: Literal["gpt2", "bpe", "char"]
    vocab_size: int = Field(ge=1)
    fingerprint: str
    styles: dict[str, int] = Field(default_factory=dict)
    """Control id of each style, which stands before the documents that have it."""


class Source(Strict):
    """What was prepared and how."""

    name: str
    documents: int
    settings: dict[str, Any]
    identity: str
    """sha256 of the settings and of each file's name, size and time of change."""

    def __str__(self) -> str:
        return self.name


class Manifest(Strict):
    """What `manifest.json` says of a prepared folder."""

    format: Literal[1] = 1
    tokenizer: TokenizerIdentity
    dtype: Literal["uint16", "uint32"]
    splits: Splits
    source: Source
    cleaning: dict[str, int]
    """How often each cleaning step did something."""
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
        """The manifest in `folder`. Raises ManifestError when it is missing, damaged or of another format."""
        path = Path(folder) / MANIFEST
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise ManifestError(
                f"{path}: no such file; prepare the data first: python prepare_data.py --input PATH --out {folder}"
            ) from None
        except OSError as error:
            raise ManifestError(f"{path}: {error.strerror}") from None
        except ValidationError as error:
            faults = "; ".join(describe_faults(error)[:4])
            raise ManifestError(f"{path} is damaged or of another version ({faults}): prepare the data again") from None

    def save(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`, whole or not at all."""
        replace_text(Path(folder) / MANIFEST, self.model_dump_json(indent=1) + "\n")


class ShardWriter:
    """Appends one split's tokens to files of `shard_tokens` each; `state` and `restore` make it resumable."""

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
        """Bring what was written to the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """End the open shard, if any."""
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
        """Go back to `state`: what was written after it is dropped. Raises OSError where the files are not there."""
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
    """Make `out`, which must be empty, of the shards of several prepared folders, one after the other.

    Files are linked where the disk can, else copied. Raises ManifestError where the folders do not go together: another
    tokenizer, or parts (`prepare_data.py --part`) of something else, twice or missing.
    """
    manifests = [Manifest.load(folder) for folder in folders]
    first = manifests[0]
    for folder, manifest in zip(folders, manifests, strict=True):
        if (manifest.tokenizer, manifest.dtype) != (first.tokenizer, first.dtype):
            raise ManifestError(
                f"{folder} has another tokenizer than {folders[0]}: prepare it again with --tokenizer-from {folders[0]}"
            )
    settings = [dict(manifest.source.settings) for manifest in manifests]
    parts = [str(setting.pop("part", "")) for setting in settings]
    if any(parts):
        whole = [f"{number}/{len(folders)}" for number in range(1, len(folders) + 1)]
        if sorted(parts) != sorted(whole):
            raise ManifestError(
                f"these are the parts {', '.join(part or 'none' for part in parts)}, not {', '.join(whole)}"
            )
        of = [
            (manifest.source.name, manifest.source.documents, setting)
            for manifest, setting in zip(manifests, settings, strict=True)
        ]
        if any(other != of[0] for other in of):
            raise ManifestError("these are parts of different texts, or prepared with different settings")
    splits: dict[str, Any] = {}
    for name in SPLITS:
        splits[name] = {"tokens": 0, "bytes": 0, "documents": 0, "shards": []}
        for folder, manifest in zip(folders, manifests, strict=True):
            split: Split = getattr(manifest.splits, name)
            for key in ("tokens", "bytes", "documents"):
                splits[name][key] += getattr(split, key)
            for shard in split.shards:
                path = out / f"{name}_{len(splits[name]['shards']):06d}.bin"
                try:
                    os.link(folder / shard.file, path)
                except OSError:
                    shutil.copyfile(folder / shard.file, path)
                splits[name]["shards"].append(shard.model_dump() | {"file": path.name})
    cleaning: Counter[str] = Counter()
    for manifest in manifests:
        cleaning.update(manifest.cleaning)
    names = list(dict.fromkeys(manifest.source.name for manifest in manifests))
    identities = [manifest.source.identity for manifest in manifests]
    source = {
        "name": ", ".join(names),
        "documents": first.source.documents if any(parts) else sum(m.source.documents for m in manifests),
        "settings": settings[0],
        "identity": hashlib.sha256("".join(identities).encode()).hexdigest(),
    }
    values = {
        "splits": splits,
        "source": source,
        "cleaning": dict(cleaning),
        "max_id": max(m.max_id for m in manifests),
    }
    joined = Manifest.model_validate(first.model_dump() | values)
    joined.save(out)
    return joined
