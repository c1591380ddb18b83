"""Names of the documents of prepared data, and the authors that the names tell.

    >>> catalogue = Catalogue.load(Path("data/novels"))
    >>> catalogue.name("val", 0)                        # 'Dickens_Bleak_1853.txt'
    >>> author_of("Dickens_Bleak_1853.txt")             # 'Dickens'

`prepare_data.py` writes `documents.json` beside the manifest: the source files with the number of documents in each, which
documents validate, and which were dropped. The i-th document of a split is the i-th that is in it and was not dropped.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from config import ConfigError
from storage.atomic import atomic_write_text

FILE = "documents.json"
AUTHOR_LINE = re.compile(r"^\s*Author:[ \t]*(\S.*?)\s*$", re.MULTILINE)
AUTHOR_TITLE = re.compile(r"(?P<author>[^_\d][^_]*)_[^_]+(_\d{3,4})?")
HEAD = 4000  # characters at the start of a text that are searched for an `Author:` line


@dataclass(frozen=True)
class Catalogue:
    """All documents of one preparation: their names, in order, and the split of each."""

    files: Sequence[tuple[str, int]]
    """Name of each source file and how many documents it holds."""
    validating: np.ndarray
    """Mask of the validation documents, bool [documents]."""
    dropped: Sequence[int]
    """Numbers of the documents that are in no split: duplicates, and those without text."""
    shared: Sequence[int] = ()
    """Numbers of the documents that are split by position: both splits have a part of them."""
    facts: Mapping[str, dict[str, str]] = field(default_factory=dict)
    """By the name of a file of one document, what this tells about itself: `author`, `title`, `language`, `year`."""

    @classmethod
    def load(cls, folder: Path) -> Catalogue | None:
        """The catalogue of prepared data; None where there is none. Raises ConfigError for a damaged one."""
        path = Path(folder) / FILE
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            files = [(str(name), int(count)) for name, count in held["files"]]
            bits = np.frombuffer(zlib.decompress(base64.b64decode(held["validating"])), dtype=np.uint8)
            chosen = np.unpackbits(bits, count=sum(count for _, count in files)).astype(bool)
            shared = [0] if held["shared"] is True else list(map(int, held["shared"] or ()))
            return cls(files, chosen, [int(number) for number in held["dropped"]], shared, held.get("facts", {}))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, zlib.error) as error:
            raise ConfigError([f"{path} is damaged ({error}): prepare the data again, or remove this file"]) from None

    def save(self, folder: Path) -> None:
        bits = base64.b64encode(zlib.compress(np.packbits(self.validating).tobytes())).decode("ascii")
        held: dict[str, object] = {
            "files": list(self.files),
            "validating": bits,
            "dropped": list(self.dropped),
            "shared": list(self.shared),
        }
        if self.facts:
            held["facts"] = dict(self.facts)
        atomic_write_text(Path(folder) / FILE, json.dumps(held, ensure_ascii=False) + "\n")

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *(count for _, count in self.files)])

    @cached_property
    def _numbers(self) -> dict[str, np.ndarray]:
        kept = np.ones(len(self.validating), dtype=bool)
        kept[list(self.dropped)] = False
        both = np.zeros_like(kept)
        both[list(self.shared)] = True
        return {
            "train": np.flatnonzero(kept & (both | ~self.validating)),
            "val": np.flatnonzero(kept & (both | self.validating)),
        }

    def count(self, split: str) -> int:
        """Documents of a split."""
        return len(self._numbers[split])

    def name(self, split: str, at: int) -> str:
        """The name of a split's document number `at`: the name of its file, with the row if the file has several."""
        number = int(self._numbers[split][at])
        file = int(np.searchsorted(self._starts, number, side="right")) - 1
        name, count = self.files[file]
        return name if count == 1 else f"{name}, row {number - int(self._starts[file]) + 1}"

    def author(self, name: str, head: str = "") -> str:
        """The author of the document of this name: as its file tells it, otherwise as `author_of` finds it."""
        return self.facts.get(name, {}).get("author") or author_of(name, head)


def names_of(folder: Path, split: str, documents: int) -> Iterable[str] | None:
    """Names of a split's documents in order; None where the catalogue is missing or does not have `documents` of them."""
    catalogue = Catalogue.load(folder)
    if catalogue is None or catalogue.count(split) != documents:
        return None
    return (catalogue.name(split, at) for at in range(documents))


def author_of(name: str, head: str = "") -> str:
    """The author of a document, from an `Author:` line in its `head`, else from its name; empty where neither tells.

    Names: `Author - Title.txt`, `Author_Title_1853.txt`, `Author/Title.txt`.
    """
    if found := AUTHOR_LINE.search(head[:HEAD]):
        return found[1]
    path = Path(name.split(", row ")[0])
    stem = path.stem
    if " - " in stem:
        return stem.split(" - ")[0].strip()
    if (match := AUTHOR_TITLE.fullmatch(stem)) and (match[2] or match["author"][:1].isupper()):
        return match["author"].strip()
    return path.parent.name
