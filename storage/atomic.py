"""Atomic writes of folders and files, exclusive locks, tensors and nested state without pickle, checksums.

    >>> with atomic_folder("models/mine") as draft:                # the old folder stays until this block has succeeded
    ...     write_tensors(draft / "model.safetensors", model.state_dict())
    ...     write_sums(draft, step=100)
    >>> faults("models/mine")                                  # [] or what is damaged

A folder is written as NAME.tmp-PID, flushed to the disk, and then exchanged: NAME is renamed to NAME.old-PID, the new
folder to NAME, and the old one is removed. A process that dies anywhere in between leaves NAME or NAME.old-PID intact;
`present` finds either, and the next `atomic_folder` cleans up. Nothing here reads or writes a pickle.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
SUMS = "checksums.json"
LEFTOVER = re.compile(r"(?P<name>.+)\.(?P<kind>tmp|old)-(?P<pid>\d+)")
_busy: set[Path] = set()  # folders that threads of this process are writing or exchanging


class CheckpointError(ValueError):
    """A model folder or checkpoint that cannot be used or written; names the file and the fix."""


@contextlib.contextmanager
def exclusive_lock(path: Path, refusal: str) -> Iterator[None]:
    """Hold the lock file `path` for the block, on Windows too; raises ConfigError(`refusal`) while another holds it.

    The lock is released when the process exits, even after a crash; the file is removed when the block ends.
    Its folder is made where it is missing.
    """
    import filelock

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ConfigError([refusal]) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file; there the release does it
            path.unlink()
        lock.release()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], hashed: bool = True) -> str:
    """Write a safetensors file; returns its sha256, computed while writing, or "" if not `hashed`.

    Tensors may be views and on any device: they are copied to CPU memory one at a time, where safetensors' own writer needs
    all of them at once. Wide dtypes are written first, which keeps every tensor aligned.
    """
    import torch

    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    names |= {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"}
    names |= {torch.uint8: "U8", torch.bool: "BOOL"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    order, end = sorted(tensors, key=lambda name: -tensors[name].element_size()), 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in names:
            raise CheckpointError(f"{name}: dtype {tensor.dtype} cannot be saved, convert it to one of {[*names]}")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    raw = (tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for name in order)
    parts: Iterator[Any] = itertools.chain((struct.pack("<Q", len(head)), head), raw)
    with open(path, "wb") as file:
        for part in parts:
            if hashed:
                digest.update(part)
            file.write(part)
    return digest.hexdigest() if hashed else ""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped: copy those that outlive the file.

    Raises CheckpointError when the file is missing, cut short or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; copy the folder again or use another checkpoint") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): copy it again or use another checkpoint") from None


def write_text(path: Path, content: Any) -> None:
    """Write `content`: text as it is, anything else as JSON."""
    text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file atomically: a full disk or a killed process leaves the old file."""
    draft = path.with_name(f"{path.name}.tmp")
    try:
        write_text(draft, text)
        _sync(draft)
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise OSError(error.errno, f"{path} could not be written: {error.strerror or error}") from error


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """A new file to write; it replaces `path` when the block ends, and is removed if the block fails.

    A disk error is raised as OSError that names `path` and whether the old file is kept.
    """
    place = Path(path).resolve()
    if place.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{path} is a folder: name the file to write")
    draft = place.with_name(f"{place.name}.tmp-{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        _sync(draft)
        os.replace(draft, place)
        _sync(place.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        if isinstance(error, OSError):
            kept = f"the old {place.name} is still there" if place.is_file() else "nothing was written"
            raise OSError(error.errno, f"{path} could not be written: {error.strerror or error}; {kept}") from error
        raise


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError names a file that is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged (not a JSON object)")
    return found


def pack(state: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """Nested state as (JSON text in which a path stands for each tensor, the tensors by path).

    `unpack` restores it, with tuples, keys that are not text, NaN and infinity. A value of any other type raises
    CheckpointError with its path.
    """
    import torch

    tensors: dict[str, Tensor] = {}

    def plain(item: Any, path: str) -> Any:
        if isinstance(item, torch.Tensor):
            while path in tensors:
                path += "'"
            tensors[path] = item.detach()
            return {"__tensor__": path}
        if item is None or type(item) in (bool, int, float, str):
            return item
        if isinstance(item, (list, tuple)):
            parts = [plain(part, f"{path}/{at}") for at, part in enumerate(item)]
            return parts if isinstance(item, list) else {"__tuple__": parts}
        if isinstance(item, Mapping):
            if all(type(key) is str and not key.startswith("__") for key in item):
                return {key: plain(part, f"{path}/{key}") for key, part in item.items()}
            return {"__items__": [[plain(key, path), plain(part, f"{path}/{key}")] for key, part in item.items()]}
        kind = type(item).__name__
        raise CheckpointError(f"{path}: {kind} cannot be saved; make it tensors, numbers, text, lists or dicts of them")

    return json.dumps(plain(state, "state")), tensors


def unpack(item: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state that was given to `pack`, from its parsed JSON and its tensors."""
    if isinstance(item, list):
        return [unpack(part, tensors) for part in item]
    if not isinstance(item, dict):
        return item
    if "__tensor__" in item:
        return tensors[item["__tensor__"]]
    if "__tuple__" in item:
        return tuple(unpack(part, tensors) for part in item["__tuple__"])
    if "__items__" in item:
        return {unpack(key, tensors): unpack(part, tensors) for key, part in item["__items__"]}
    return {key: unpack(part, tensors) for key, part in item.items()}


def sha256(path: Path) -> str:
    """sha256 (hex) of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path, step: int | None, known: Mapping[str, str] | None = None) -> None:
    """Write `checksums.json`: size and sha256 of each file, the time and the step. `known`: sums computed before, by name."""
    known = known or {}
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": known.get(path.name) or sha256(path)}
        for path in sorted(folder.iterdir())
    }
    write_text(folder / SUMS, {"format": FORMAT, "saved": time.time(), "step": step, "files": files})


def faults(folder: Path | str) -> list[str]:
    """A message for each file that differs from `checksums.json`; an empty list if none does."""
    folder = Path(folder)
    try:
        files = read_json(folder / SUMS)["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except CheckpointError as error:
        return [str(error)]
    except (KeyError, TypeError, ValueError, AttributeError):
        return [f"{folder / SUMS} is damaged"]
    found = []
    for name, (size, digest) in expected.items():
        path = folder / name
        try:
            if path.stat().st_size != size:
                found.append(f"{path} is damaged: {path.stat().st_size:,} bytes instead of {size:,}")
            elif sha256(path) != digest:
                found.append(f"{path} is damaged: its sha256 differs from {SUMS}")
        except FileNotFoundError:
            found.append(f"{path} is missing")
        except OSError as error:
            found.append(f"{path} cannot be read: {error.strerror}")
    return found


def present(folder: Path | str) -> Path:
    """`folder`, or its renamed old version (NAME.old-PID) if a process died during the exchange."""
    folder = Path(folder)
    if folder.exists() or not folder.parent.is_dir():
        return folder
    for path in folder.parent.iterdir():
        match = LEFTOVER.fullmatch(path.name)
        if match and match["kind"] == "old" and match["name"] == folder.name:
            return path
    return folder


def unfinished(folder: Path) -> bool:
    """Whether `folder` is a draft that was never finished, or is being removed."""
    match = LEFTOVER.fullmatch(folder.name)
    return match is not None and match["kind"] == "tmp"


def discard(folder: Path) -> None:
    """Remove a folder that `atomic_folder` made. It is renamed first, so that a half-removed folder is never taken for a complete one."""
    if not unfinished(folder):
        match = LEFTOVER.fullmatch(folder.name)
        name = match["name"] if match else folder.name
        folder = folder.rename(folder.with_name(f"{name}.tmp-{os.getpid()}"))
    shutil.rmtree(folder)


def recover(parent: Path, concerns: Callable[[str], bool]) -> None:
    """Clean up after dead processes in `parent`, for the folders whose name `concerns` accepts.

    An old folder is put back where the new one is missing; drafts and replaced folders are removed.
    """
    left = [(path, match) for path in parent.iterdir() if (match := LEFTOVER.fullmatch(path.name)) and path.is_dir()]
    for path, match in sorted(left, key=lambda pair: pair[1]["kind"], reverse=True):  # drafts before old ones
        if not concerns(match["name"]) or path in _busy or _running(int(match["pid"])):
            continue
        place = parent / match["name"]
        if match["kind"] == "old" and not place.exists():
            path.rename(place)
        else:
            discard(path)


def _running(pid: int) -> bool:
    """Whether another process with this id is alive; on Windows, where os.kill would end it, it counts as dead."""
    if os.name == "nt" or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _is_model(place: Path) -> bool:
    return (place / "config.json").is_file()


@contextlib.contextmanager
def atomic_folder(
    folder: Path | str,
    group: str | None = None,
    kind: str = "a model",
    replaces: Callable[[Path], bool] = _is_model,
) -> Iterator[Path]:
    """A new folder to fill; it replaces `folder` when the block ends, and is removed if the block fails.

    Only an empty folder, or one that `replaces` accepts (`kind` in the error), is replaced. Leftovers of dead processes
    are cleaned up first: those of `folder`, and of all folders whose names begin with `group`.
    The disk must hold the old and the new folder at once; a disk error is raised as OSError that names what is kept.
    """
    place = Path(folder).resolve()
    if place.exists() and not replaces(place) and (not place.is_dir() or any(place.iterdir())):
        raise CheckpointError(f"{folder} holds something that is not {kind}: choose another name, or move it away")

    def concerns(name: str) -> bool:
        return name == place.name or (group is not None and name.startswith(group))

    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"{folder} could not be saved: {place.parent}: {error.strerror or error}; nothing was written"
        raise OSError(error.errno, why) from error
    recover(place.parent, concerns)
    draft, old = (place.with_name(f"{place.name}.{kind}-{os.getpid()}") for kind in ("tmp", "old"))
    if draft in _busy:
        raise CheckpointError(f"{folder} is being saved by another thread: wait for it")
    _busy.update((draft, old))
    try:
        draft.mkdir()
        yield draft
        for path in sorted(draft.iterdir()):
            _sync(path)
        _sync(draft)
        if place.exists():
            os.rename(place, old)
        os.rename(draft, place)
        _sync(place.parent)
    except BaseException as error:
        _busy.difference_update((draft, old))
        with contextlib.suppress(OSError):
            recover(place.parent, concerns)
        if isinstance(error, OSError):
            kept = f"a complete {place.name} is still there" if place.exists() else "nothing was written"
            raise OSError(error.errno, f"{folder} could not be saved: {error.strerror or error}; {kept}") from error
        raise
    with contextlib.suppress(OSError):  # the new folder is complete; the next save cleans up
        if old.exists():
            discard(old)
    _busy.difference_update((draft, old))
