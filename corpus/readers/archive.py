"""Archives of texts (`.zip`, `.tar`), compressed files (`.txt.gz`) and lists of rows (`.json`): unpacked beside what is written.

What is in an archive is read as if it lay in a folder of the archive's name; archives in archives are unpacked as well.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from corpus.documents import DocumentError
from corpus.readers.content import ARCHIVES, suffix_of

DEEPEST = 3  # archives in archives
LARGEST = 1 << 38  # bytes that one archive may unpack to
BLOCK = 1 << 20
COMPRESSED: dict[str, Callable[[Path, str], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
UNSAFE = re.compile(r'[\x00-\x1f<>:"|?*\\]')


class Member(NamedTuple):
    """A file that was in an archive."""

    path: Path
    name: str
    """The name it is known by: `books.zip/emma.txt`."""


def is_packed(path: Path) -> bool:
    """Whether a file has to be unpacked before it is read. Raises OSError."""
    return suffix_of(path) in (*ARCHIVES, ".json")


def unpack(path: Path, name: str, folder: Path, depth: int = 1) -> Iterator[Member]:
    """The files in an archive, unpacked into `folder`. Raises DocumentError, OSError."""
    suffix = suffix_of(path)
    if suffix == ".json":
        target = _target(folder, f"{name}l" if name.endswith(".json") else f"{name}.jsonl")
        _rows_to_lines(path, target)
        yield _dated(target, name, path)
        return
    if depth > DEEPEST:
        raise DocumentError(f"{path}: archives in archives, more than {DEEPEST} deep: unpack it", kind="")
    try:
        for inner, file in _members(path, suffix):
            own = "/".join([name, *_parts(inner)]) if inner else re.sub(r"\.(gz|bz2|xz)$", "", name)
            target = _target(folder, own)
            _copy(file, target, path)
            member = _dated(target, own, path)
            if is_packed(target):
                yield from unpack(target, own, folder / f"in{depth}", depth + 1)
                target.unlink()
            else:
                yield member
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, gzip.BadGzipFile) as error:  # fmt: skip
        raise DocumentError(f"{path}: a damaged or incomplete archive ({error}): copy or download it again") from None
    except RuntimeError:  # zipfile's word for a password
        raise DocumentError(f"{path}: this archive is encrypted: unpack it with its password", "encrypted") from None


def _members(path: Path, suffix: str) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and content of each file in an archive, sorted by name in a zip; hidden ones left out."""
    if suffix == ".zip":
        with zipfile.ZipFile(path) as package:
            for info in sorted(package.infolist(), key=lambda info: info.filename):
                if not info.is_dir() and not _hidden(info.filename):
                    with package.open(info) as file:
                        yield info.filename, file
        return
    if suffix == ".tar" or _is_tar(path):
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                if member.isfile() and not _hidden(member.name) and (content := archive.extractfile(member)):
                    yield member.name, content
        return
    with COMPRESSED[suffix](path, "rb") as file:
        yield "", file


def _is_tar(path: Path) -> bool:
    """Whether a compressed file holds an archive."""
    try:
        with tarfile.open(path, "r:*") as archive:
            return archive.next() is not None
    except (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError):
        return False


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in _parts(name))


def _parts(name: str) -> list[str]:
    """The folders and the file of a path in an archive, without those that lead out of it."""
    return [part for part in PurePosixPath(name).parts if part not in ("/", "..", ".")]


def _target(folder: Path, name: str) -> Path:
    """A path inside `folder` for a file of this name, whatever the name tries."""
    path = folder.joinpath(*(UNSAFE.sub("_", part)[-120:] for part in _parts(name)))
    number = 2
    while path.exists():
        path = path.with_name(f"{path.stem.split('~')[0]}~{number}{path.suffix}")
        number += 1
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _copy(file: IO[bytes], target: Path, archive: Path) -> None:
    size = 0
    with target.open("wb") as out:
        while data := file.read(BLOCK):
            size += len(data)
            if size > LARGEST:
                raise DocumentError(
                    f"{archive}: it unpacks to more than {LARGEST >> 30} GiB: unpack it yourself", kind=""
                )
            out.write(data)


def _dated(target: Path, name: str, archive: Path) -> Member:
    """The member with its archive's time of change: the same archive gives the same files."""
    time = archive.stat().st_mtime_ns
    os.utime(target, ns=(time, time))
    return Member(target, name)


def _rows_to_lines(path: Path, target: Path) -> None:
    """A JSON list as JSON lines, read a block at a time. Raises DocumentError."""
    with target.open("w", encoding="utf-8") as out:
        for row in _list_items(path):
            row = {"text": row} if isinstance(row, str) else row
            out.write(json.dumps(row, ensure_ascii=True) + "\n")


def _list_items(path: Path) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig") as file:
        try:
            text, at, more = file.read(BLOCK).lstrip()[1:], 0, True
            while True:
                while at < len(text) and text[at] in " \t\r\n,":
                    at += 1
                if text[at : at + 1] == "]":
                    return
                try:
                    item, stop = decoder.raw_decode(text, at)
                    if stop == len(text) and more:  # a number may go on in the next block
                        raise json.JSONDecodeError("", text, at)
                except json.JSONDecodeError as error:
                    data = file.read(
                        max(BLOCK, len(text) - at)
                    )  # at least doubled: a long row is not parsed anew each time
                    if not data:
                        raise DocumentError(f"{path}: not a JSON list ({error.msg or 'it ends too early'})") from None
                    text, at = text[at:] + data, 0
                    continue
                yield item
                at = stop
        except UnicodeDecodeError as error:
            raise DocumentError(f"{path}: not UTF-8 ({error.reason}); convert it to UTF-8", "not UTF-8") from None
