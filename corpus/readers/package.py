"""Archives in zip form that are one document: EPUB, Word and OpenDocument files."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

from corpus.documents import DocumentError
from corpus.readers.markup import parse_xml, tag_of

LARGEST_TEXT = 1 << 30  # bytes of unpacked text: no book has as much, and a small archive can claim any size


def read_parts(data: bytes, kind: str, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The parts of an archive by name, those that are `wanted`. Raises DocumentError, which calls it by `kind`."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as package:
            infos = [info for info in package.infolist() if wanted(info.filename)]
            if sum(info.file_size for info in infos) > LARGEST_TEXT:
                raise DocumentError(f"{kind} of more than {LARGEST_TEXT >> 20} MiB of text: split it")
            return {info.filename: package.read(info) for info in infos}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DocumentError(f"{kind}, damaged or incomplete ({error}): copy or download it again") from None
    except RuntimeError:  # zipfile's word for a password
        raise DocumentError("this zip archive is encrypted: unpack it with its password", "encrypted") from None


def part_names(file: Path | IO[bytes]) -> list[str]:
    """Names of an archive's parts; none where it is damaged."""
    try:
        with zipfile.ZipFile(file) as package:
            return package.namelist()
    except (zipfile.BadZipFile, EOFError, NotImplementedError):
        return []


def resolve(base: str, href: str) -> str:
    """The name of the part that `href`, in the part `base`, points to."""
    names: list[str] = []
    for name in (base.rpartition("/")[0] + "/" + unquote(href.partition("#")[0])).split("/"):
        if name == ".." and names:
            names.pop()
        elif name not in ("", ".", ".."):
            names.append(name)
    return "/".join(names)


def find_all(root: Any, name: str) -> list[Any]:
    """The elements of this name, in small letters and without its namespace."""
    return [element for element in root.iter("*") if tag_of(element) == name]


def text_of(root: Any, *names: str) -> str:
    """The text of the first element with the first of these names that holds any."""
    for name in names:
        for element in find_all(root, name):
            if text := " ".join("".join(element.itertext()).split()):
                return text
    return ""


def attribute(element: Any, name: str) -> str:
    """An attribute by its name without the namespace; empty where it is missing."""
    return next((str(value) for key, value in element.attrib.items() if key.rpartition("}")[2] == name), "")


def parse_part(parts: dict[str, bytes], name: str) -> Any:
    """The root element of an XML part. Raises DocumentError."""
    try:
        return parse_xml(parts[name])
    except KeyError:
        raise DocumentError(f"it holds no {name}: copy or download it again") from None
