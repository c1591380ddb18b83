"""Named corpora and where they come from: PG-19, TinyStories, Tiny Shakespeare, any text data set on the Hugging Face hub.

    python prepare_data.py --preset victorian --years 1837-1901       # PG-19's Victorian books
    python prepare_data.py --hub OWNER/NAME --text-field story --out data/stories
    python -m corpus.sources --corpus tinystories                     # fetch only; prints the files

Files are fetched whole into the hub's cache (`HF_HOME`), with retries that continue a broken connection. With
`HF_HUB_OFFLINE=1`, or while the hub cannot be reached, the cached files are used. `HF_ENDPOINT` names another hub.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, TypeVar

from cli import parse_flags, run_main
from config import ROOT, ConfigError, FrozenSettings
from corpus.readers.jsonl import JsonlFile
from corpus.readers.parquet import ParquetFile
from corpus.readers.text import TextFile
from corpus.workers import Progress

T = TypeVar("T")
ATTEMPTS = 4
FIRST_WAIT = 1.0  # seconds before the second attempt; doubles with each further one
TIMEOUT = 30.0  # seconds without a byte
UNFINISHED_SECONDS = 600.0  # since the last byte of a download that nobody goes on with
HUB_FORMATS = (ParquetFile, JsonlFile, TextFile)  # what data sets on the hub consist of, best first
PARQUET_BRANCH = "refs/convert/parquet"  # where the hub keeps its own parquet copy of other formats
SPLIT_NAME = re.compile(
    r"(?:^|[/_.-])(train|training|validation|valid|val|dev|test|testing)(?=[/_.-]|$)", re.IGNORECASE
)
SHARD_NAME = re.compile(r"^(.*)-(\d{5})-of-(\d{5})(.*)$")
HUB_FILE_NAME = re.compile(r"^(train|validation|test)-\d{5}-of-\d{5}.*\.parquet$")
SPLIT_FOLDERS = {"", "data", "train", "validation", "valid", "test"}  # folders that are no configuration
SplitName = Literal["validation", "test"]


class SourceError(RuntimeError):
    """A corpus that cannot be fetched; the message names the flag, the address and the fix."""


class Unreachable(SourceError):
    """No network, or a server that does not answer."""


class InputFile(NamedTuple):
    """One local file of texts."""

    path: Path
    name: str
    """Its name in the corpus, independent of the folder it is in."""
    split: str = ""
    """`train` or `val` where the source defines the split."""
    version: str = ""
    """Tells it from another file of the same name; empty: its size and time of change do."""


@dataclass(frozen=True)
class HubDataset:
    """A data set on the hub, and the settings that suit its texts."""

    repository: str
    data: dict[str, Any] = field(default_factory=dict)
    """Fields of DataConfig."""
    books: bool = False
    """Its texts are Project Gutenberg's."""


@dataclass(frozen=True)
class WebFile:
    """One text on the web, with its size in bytes and checksum."""

    url: str
    name: str
    size: int
    sha256: str
    data: dict[str, Any] = field(default_factory=dict)
    books: bool = False


NAMED: dict[str, HubDataset | WebFile] = {
    "pg19": HubDataset("emozilla/pg19", books=True),
    "tinystories": HubDataset("roneneldan/TinyStories", {"fix_mojibake": True, "drop_duplicates": True}),
    "tinyshakespeare": WebFile(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "tinyshakespeare.txt",
        1_115_394,
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        {"tokenizer": "char", "unwrap": False},
    ),
}


class HubSelection(FrozenSettings):
    """Which files of a data set on the hub to fetch."""

    config: str = ""
    """Configuration of a data set that has several."""
    revision: str = "main"
    """Branch, tag or commit."""
    validate_on: SplitName = "validation"
    """The hub's split that becomes the validation split; the other of the two is left out."""


def is_corpus(source: str) -> bool:
    """Whether `source` is a named corpus or looks like a data set on the hub."""
    return source in NAMED or re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None


def defaults(source: str) -> dict[str, Any]:
    """The data settings that suit this corpus, as defaults."""
    return dict(NAMED[source].data) if source in NAMED else {}


@dataclass(frozen=True)
class DatasetFiles:
    """The text files of one revision of a data set, with their sizes in bytes."""

    repository: str
    revision: str
    commit: str
    files: dict[str, int]
    folder: Path | None = None
    """The folder of the cache that holds them; None if they must be fetched."""


def fetch(source: str, selection: HubSelection) -> list[InputFile]:
    """The files of a corpus, downloaded where needed, validation first. Raises ConfigError, SourceError."""
    known = NAMED.get(source) or HubDataset(source)
    if isinstance(known, WebFile):
        return [InputFile(_web_file(source, known), known.name, version=known.sha256)]
    flag = f"--source {source}" if source in NAMED else f"--hub {source}"
    _quiet_hub()
    listing = _list_files(flag, known.repository, selection.revision)
    parts: dict[str, list[str]] = {}
    for name in _in_configuration(flag, sorted(listing.files), selection.config):
        parts.setdefault(split_of(name), []).append(name)
    if not parts.get("train"):
        raise ConfigError([f"{flag}: no training files (it has {', '.join(list(listing.files)[:8])})"])
    if selection.validate_on not in ("validation", *parts):
        raise ConfigError([f"--validate-on {selection.validate_on}: this data set has {', '.join(sorted(parts))} only"])
    wanted = [(name, "val") for name in parts.get(selection.validate_on, [])] + [
        (name, "train") for name in parts["train"]
    ]
    inputs = []
    with Progress("fetching", sum(listing.files[name] for name, _ in wanted)) as progress:
        for name, split in wanted:
            path = listing.folder / name if listing.folder else _hub_file(flag, listing, name)
            inputs.append(InputFile(path, name, split, f"{known.repository}@{listing.commit}"))
            progress.add(listing.files[name])
    _remove_unfinished(known.repository)
    return inputs


def _remove_unfinished(repository: str) -> None:
    """Remove what killed downloads of a data set left in the cache: the hub's client begins them anew under other names."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="dataset") / "blobs"
    for path in blobs.glob("*.incomplete"):
        with contextlib.suppress(OSError):  # another process may be fetching it at this moment
            if time.time() - path.stat().st_mtime > UNFINISHED_SECONDS:
                path.unlink()


def split_of(name: str) -> str:
    """`train`, `validation` or `test`, by a data file's name, otherwise by its folder's; `train` by default."""
    path = PurePosixPath(name)
    for text in (path.name.removesuffix(path.suffix), *reversed(path.parts[:-1])):
        if found := SPLIT_NAME.search(text):
            return "validation" if found[1][0] in "vVdD" else found[1].lower().removesuffix("ing")
    return "train"


def label_splits(found: Iterable[tuple[Path, str]], validate_on: str) -> list[InputFile]:
    """The user's own files. Those named as the hub names its files (`test-00000-of-00001.parquet`) keep their split, and
    those of a split that is neither `train` nor `validate_on` are left out, with a message."""
    inputs = []
    for path, name in found:
        part = split_of(path.name) if HUB_FILE_NAME.match(path.name) else ""
        if part in ("", "train", validate_on):
            inputs.append(InputFile(path, name, {"": "", validate_on: "val"}.get(part, "train")))
        else:
            print(f"{path}: left out, being of the part `{part}`; see --validate-on", file=sys.stderr)
    return inputs


def is_books(source: str) -> bool:
    """Whether the texts are Project Gutenberg's."""
    return source in NAMED and NAMED[source].books


def _list_files(flag: str, repository: str, revision: str) -> DatasetFiles:
    """The hub's files; the cached ones when offline or when the hub cannot be reached. Raises ConfigError, SourceError."""
    from huggingface_hub import HfApi, constants

    def ask(branch: str) -> DatasetFiles | None:
        info = _with_retries(
            flag,
            lambda: HfApi(endpoint=_endpoint()).dataset_info(
                repository, revision=branch, files_metadata=True, timeout=TIMEOUT
            ),
        )
        files = _best_format({item.rfilename: int(item.size or 0) for item in info.siblings or []})
        return DatasetFiles(repository, branch, str(info.sha), files) if files else None

    if constants.HF_HUB_OFFLINE:
        if listing := _cached_files(repository, revision):
            return listing
        raise Unreachable(
            f"{flag}: HF_HUB_OFFLINE is set and {repository} is not, or not whole, in {constants.HF_HUB_CACHE}: run once "
            f"with the network, or take files of your own"
        )
    try:
        if listing := ask(revision):
            return listing
        with contextlib.suppress(ConfigError):
            if revision == "main" and (listing := ask(PARQUET_BRANCH)):
                return listing
    except SourceError as error:
        if listing := _cached_files(repository, revision):
            print(f"{error}\n{flag}: going on with what is in {listing.folder}", file=sys.stderr)
            return listing
        raise
    suffixes = [suffix for reader in reversed(HUB_FORMATS) for suffix in reader.suffixes]
    raise ConfigError([f"{flag}: no {', '.join(suffixes)} files at {_endpoint()}/datasets/{repository}"])


def _cached_files(repository: str, revision: str) -> DatasetFiles | None:
    """The files of a data set in the hub's cache; None where files are known to be missing."""
    from huggingface_hub import snapshot_download

    for branch in (revision, *([PARQUET_BRANCH] if revision == "main" else [])):
        with contextlib.suppress(OSError, ValueError):
            folder = Path(snapshot_download(repository, repo_type="dataset", revision=branch, local_files_only=True))
            names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            files = _best_format({name: (folder / name).stat().st_size for name in names})
            if files and not _incomplete(files):
                return DatasetFiles(repository, branch, folder.name, files, folder)
    return None


def _incomplete(names: Iterable[str]) -> bool:
    """Whether a series like `train-00000-of-00004` lacks files."""
    series: dict[tuple[str, str], int] = {}
    for name in names:
        if found := SHARD_NAME.match(name):
            series[found[1], found[3]] = series.get((found[1], found[3]), 0) + 1
    return any(count != int(total) for (_, total), count in series.items())


def _best_format(files: dict[str, int]) -> dict[str, int]:
    """Of a data set's files those of its best format: parquet, otherwise JSON lines, otherwise plain text."""
    for reader in HUB_FORMATS:
        if found := {name: size for name, size in files.items() if name.lower().endswith(reader.suffixes)}:
            return found
    return {}


def _in_configuration(flag: str, names: list[str], wanted: str) -> list[str]:
    """The files of one configuration: those in its folder. A folder named after a split is no configuration."""
    folders: dict[str, list[str]] = {}
    for name in names:
        first = name.split("/")[0] if "/" in name else ""
        folders.setdefault("" if first.lower() in SPLIT_FOLDERS else first, []).append(name)
    if wanted and wanted not in folders:
        raise ConfigError([f"--hub-config {wanted}: {flag} has {', '.join(filter(None, folders)) or 'only one'}"])
    if not wanted and len(folders) > 1 and "default" not in folders:
        raise ConfigError([f"{flag} has several configurations: choose one with --hub-config {' | '.join(folders)}"])
    return folders[wanted] if wanted else folders.get("default") or names


def _hub_file(flag: str, listing: DatasetFiles, name: str) -> Path:
    """Path of one file of the data set in the cache, downloaded if it is not there."""
    from huggingface_hub import hf_hub_download

    def download() -> str:
        return hf_hub_download(
            listing.repository,
            name,
            repo_type="dataset",
            revision=listing.revision,
            endpoint=_endpoint(),
            etag_timeout=TIMEOUT,
        )

    path = Path(_with_retries(flag, download))
    if listing.commit not in path.parts:
        raise SourceError(f"{flag}: the data set was changed while it was fetched: run the same command again")
    if path.stat().st_size != listing.files[name]:
        raise SourceError(
            f"{flag}: {path} has {path.stat().st_size:,} bytes instead of {listing.files[name]:,}: delete it"
        )
    return path


def _web_file(source: str, file: WebFile) -> Path:
    """Path of the file in data/.cache/, downloaded if it is missing or its checksum differs."""
    import httpx2

    path = ROOT / "data" / ".cache" / file.name
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256:
        return path
    remedy = f"or fetch it elsewhere, as {file.name}"

    def download() -> bytes:
        with httpx2.Client(follow_redirects=True, timeout=TIMEOUT) as client:
            data = client.get(file.url).raise_for_status().content
        if len(data) != file.size or hashlib.sha256(data).hexdigest() != file.sha256:
            raise httpx2.RemoteProtocolError(
                f"{len(data):,} bytes that are not the text expected ({file.size:,} bytes, sha256 {file.sha256[:12]}…)"
            )
        return data

    data = _with_retries(f"--source {source}", download, file.url, remedy)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft.write_bytes(data)
    os.replace(draft, path)
    return path


def _with_retries(flag: str, call: Callable[[], T], address: str = "", remedy: str = "") -> T:
    """The result of `call()`, repeated after a wait if the network or the server fails. Raises ConfigError, SourceError."""
    import httpx2
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    address = address or _endpoint()
    remedy = remedy or "set HF_ENDPOINT to a mirror, or fetch the files elsewhere"
    for number in range(ATTEMPTS):
        try:
            return call()
        except GatedRepoError:
            raise ConfigError(
                [f"{flag}: this data set is gated at {address}: ask there, then `hf auth login`"]
            ) from None
        except RepositoryNotFoundError:
            raise ConfigError(
                [f"{flag}: no such data set at {address}; if it is private, `hf auth login` or set HF_TOKEN"]
            ) from None
        except RevisionNotFoundError:
            raise ConfigError([f"{flag}: {address} has no such revision of it: correct --hub-revision"]) from None
        except HFValidationError as error:
            raise ConfigError([f"{flag}: {error}"]) from None
        except (httpx2.HTTPError, OSError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS):
                raise
            status = getattr(getattr(error, "response", None), "status_code", 500)
            if number == ATTEMPTS - 1 or (status < 500 and status not in (408, 429)):
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise Unreachable(f"{flag}: cannot fetch it from {address} ({reason}): connect, {remedy}") from None
            wait = FIRST_WAIT * 2**number
            print(f"{flag}: {type(error).__name__} from {address}, trying again in {wait:g} s", file=sys.stderr)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _endpoint() -> str:
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT


def _quiet_hub() -> None:
    """Switch off the hub's own progress bars: one bar shows the progress over all files."""
    from huggingface_hub.utils import disable_progress_bars, logging

    disable_progress_bars()
    logging.set_verbosity_error()


class FetchFlags(FrozenSettings):
    """Fetch a corpus, so that it can be prepared without a network."""

    corpus: str = "pg19"
    """pg19, tinystories, tinyshakespeare, or OWNER/NAME on the hub."""
    hub_config: str = ""
    """Configuration of a data set that has several."""
    hub_revision: str = "main"
    """Branch, tag or commit."""
    validate_on: SplitName = "validation"
    """Split fetched besides `train`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; see the module's first lines. Returns the exit code."""

    def body() -> int:
        flags = parse_flags(FetchFlags, argv, description=__doc__)
        if not is_corpus(flags.corpus):
            raise ConfigError([f"{flags.corpus}: give {', '.join(NAMED)} or OWNER/NAME"])
        selection = HubSelection(config=flags.hub_config, revision=flags.hub_revision, validate_on=flags.validate_on)
        for item in fetch(flags.corpus, selection):
            print(item.path, item.split, sep="\t")
        return 0

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
