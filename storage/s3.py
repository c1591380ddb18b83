"""Folders to S3 and back: shards, models, checkpoints. Multipart, with progress, resumable, checked against checksums.

    python -m storage.s3 data/victorian s3://my-bucket/data/victorian        # up
    python -m storage.s3 s3://my-bucket/models/victorian models/victorian    # down

A file that is already there whole is not sent again. Data folders have sha256 checksums in `manifest.json`, checkpoints
in `checksums.json`; a downloaded file that differs from them is fetched once more and then refused by name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from cli import parse_flags, run_main
from config import ConfigError, FrozenSettings
from storage.atomic import sha256

PART_BYTES = 16 * 1024 * 1024
CHECKSUM = "sha256"  # metadata of each object
S3_ACTIONS = {"HeadObject": "GetObject", "ListObjectsV2": "ListBucket", "HeadBucket": "ListBucket"}
# Which statement of the policy in docs/aws.md has a service's actions.
STATEMENTS = {
    "s3": "Bucket",
    "ecr": "Images",
    "sagemaker": "Endpoints",
    "application-autoscaling": "Endpoints",
    "logs": "Endpoints",
    "kms": "Key",
}
CHECKSUM_FILES = ("manifest.json", "checksums.json")


class S3Error(RuntimeError):
    """A transfer that failed; the message names the address and the fix."""


class Transfer(FrozenSettings):
    """Copy a folder to S3 or back."""

    source: str
    """Folder, or s3://BUCKET/PREFIX."""
    target: str
    """s3://BUCKET/PREFIX, or folder."""


def is_s3(place: object) -> bool:
    """Whether this is an S3 address; also after `Path`, which turns `s3://` into `s3:/`."""
    return str(place).startswith("s3:/")


def s3_url(place: object) -> str:
    """`s3://BUCKET/PREFIX` without a slash at the end; ConfigError for anything else."""
    bucket, _, prefix = str(place).removeprefix("s3:").lstrip("/").partition("/")
    if not is_s3(place) or not bucket:
        raise ConfigError([f"{place}: not a place in S3: write s3://BUCKET/FOLDER"])
    return f"s3://{bucket}/{prefix.strip('/')}".rstrip("/")


def split(url: str) -> tuple[str, str]:
    """Bucket and key prefix of an S3 address; the prefix ends in a slash unless it is empty."""
    bucket, _, prefix = s3_url(url).removeprefix("s3://").partition("/")
    return bucket, f"{prefix}/" if prefix else ""


def explain(error: Exception, place: str) -> str:
    """An AWS error in words: cause and fix."""
    kind = type(error).__name__
    response = getattr(error, "response", {})
    code = str(response.get("Error", {}).get("Code", ""))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if kind in ("NoCredentialsError", "PartialCredentialsError"):
        return f"{place}: no AWS credentials: run `aws configure`, or set AWS_PROFILE or AWS_ACCESS_KEY_ID"
    if kind == "NoRegionError":
        return f"{place}: no AWS region: give --region, or set AWS_DEFAULT_REGION"
    if code in ("ExpiredToken", "ExpiredTokenException", "RequestExpired"):
        return f"{place}: the AWS session has expired: sign in again (`aws sso login`)"
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "UnrecognizedClientException", "InvalidClientTokenId"):
        return f"{place}: AWS does not accept these credentials ({code}): check AWS_PROFILE or the access key"
    if code == "NoSuchBucket":
        return f"{place}: no such bucket: create it with `aws s3 mb`, or correct its name"
    if code in ("PermanentRedirect", "301", "IllegalLocationConstraintException"):
        return f"{place}: the bucket is in another region: set AWS_DEFAULT_REGION to it"
    if code in ("AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "403") or status == 403:
        return f"{place}: permission denied: {denial(error)}"
    if kind in ("EndpointConnectionError", "ConnectTimeoutError", "ConnectionClosedError"):
        return f"{place}: AWS cannot be reached: check the network and AWS_ENDPOINT_URL"
    text = response.get("Error", {}).get("Message") or str(error) or kind
    return f"{place}: {code + ': ' if code else ''}{text}"


def denial(error: Exception) -> str:
    """AWS's sentence about an action that was not allowed, that action, and the statement of docs/aws.md that allows it."""
    said = str(getattr(error, "response", {}).get("Error", {}).get("Message") or "")
    named = re.search(r"perform: ([a-z0-9-]+):(\w+)", said)
    operation = str(getattr(error, "operation_name", ""))
    service, action = (named[1], named[2]) if named else ("s3", S3_ACTIONS.get(operation, operation or "ListBucket"))
    statement = "PassRole" if action == "PassRole" else STATEMENTS.get(service, "Gateway")
    who = "see who you are with `aws sts get-caller-identity`"
    return (
        f"{said or 'Forbidden'}. The identity needs {service}:{action}, which statement {statement} of the policy in "
        f"docs/aws.md grants ({who})"
    )


@contextlib.contextmanager
def readable_errors(place: str) -> Iterator[None]:
    """Turn boto3's errors into S3Error with cause and fix."""
    from boto3.exceptions import Boto3Error, S3UploadFailedError
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except S3UploadFailedError as error:
        cause = error.__context__
        raise S3Error(explain(cause if isinstance(cause, ClientError) else error, place)) from None
    except (BotoCoreError, ClientError, Boto3Error) as error:
        raise S3Error(explain(error, place)) from None


def client(region: str | None = None) -> Any:
    """An S3 client that tries each call five times."""
    import boto3
    from botocore.config import Config

    config = Config(retries={"mode": "standard", "total_max_attempts": 5})
    return boto3.client("s3", region_name=region, config=config)


def known_checksums(folder: Path) -> dict[str, str]:
    """sha256 of the files of a data folder or checkpoint, by name, from the lists it carries.

    Both forms are read: `{"file": NAME, "sha256": CHECKSUM}` (manifest) and `NAME: {"sha256": CHECKSUM}` (checksums).
    """
    sums: dict[str, str] = {}
    for name in CHECKSUM_FILES:
        with contextlib.suppress(OSError, ValueError):
            _collect_checksums(json.loads((folder / name).read_text(encoding="utf-8")), sums)
    return sums


def _collect_checksums(node: Any, sums: dict[str, str]) -> None:
    if isinstance(node, list):
        for part in node:
            _collect_checksums(part, sums)
    elif isinstance(node, dict):
        if isinstance(node.get("file"), str) and isinstance(node.get(CHECKSUM), str):
            sums[node["file"]] = node[CHECKSUM]
        for name, part in node.items():
            if isinstance(part, dict) and isinstance(part.get(CHECKSUM), str):
                sums[name] = part[CHECKSUM]
            _collect_checksums(part, sums)


class TransferProgress:
    """Bytes transferred, on standard error: on a terminal one changing line, elsewhere a line every ten seconds."""

    def __init__(self, verb: str, total: int):
        self.verb, self.total, self.done = verb, total, 0
        self.began = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()
        self.lock = threading.Lock()

    def __call__(self, count: int) -> None:
        with self.lock:
            self.done += count
            now = time.monotonic()
            if now - self.shown >= (0.2 if self.live else 10):
                self.shown = now
                self._show("\r" if self.live else "\n")

    def _show(self, end: str) -> None:
        speed = self.done / max(time.monotonic() - self.began, 1e-6) / 1e6
        print(
            f"{self.verb} {self.done / 1e6:,.1f} of {self.total / 1e6:,.1f} MB ({speed:.1f} MB/s)",
            end=end,
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        self._show("\n")


def _transfer_config() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=8)


def upload_folder(folder: Path | str, url: str, *, keep: Callable[[str], bool] = lambda name: True) -> list[str]:
    """Upload every file of `folder` for which `keep(name)` is true to `url`; returns the names of those that were sent.

    CHECKSUM_FILES go last, so that whoever finds them also finds the files that they list. Files that are already there with
    the same content are not sent. Raises S3Error.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise S3Error(f"{folder}: no such folder")
    bucket, prefix = split(url)
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    names = sorted(filter(keep, names), key=lambda name: (PurePosixPath(name).name in CHECKSUM_FILES, name))
    if not names:
        raise S3Error(f"{folder}: nothing to upload")
    sums = known_checksums(folder)
    with readable_errors(url):
        s3 = client()
        there = list_objects(s3, bucket, prefix)
        progress = TransferProgress(f"uploading to {url}:", sum((folder / name).stat().st_size for name in names))
        sent = []
        for name in names:
            path, key = folder / name, prefix + name
            digest = sums.get(name) or sha256(path)
            if there.get(key) == path.stat().st_size and _object_checksum(s3, bucket, key) == digest:
                progress(path.stat().st_size)
                continue
            extra = {"Metadata": {CHECKSUM: digest}}
            s3.upload_file(str(path), bucket, key, ExtraArgs=extra, Callback=progress, Config=_transfer_config())
            sent.append(name)
        progress.close()
    return sent


def download_folder(url: str, folder: Path | str) -> list[str]:
    """Download everything under `url` into `folder`; returns the names of the files that were fetched.

    Local files with the right checksum are kept, and a new file appears only when it is whole, so an interrupted download
    continues with the first missing file. Raises S3Error, naming a file that does not match its checksum.
    """
    folder = Path(folder)
    bucket, prefix = split(url)
    with readable_errors(url):
        s3 = client()
        there = list_objects(s3, bucket, prefix)
        if not there:
            raise S3Error(f"{url}: nothing there: check the prefix with `aws s3 ls {url}/`")
        folder.mkdir(parents=True, exist_ok=True)
        order = sorted(there, key=lambda key: (PurePosixPath(key).name not in CHECKSUM_FILES, key))
        progress = TransferProgress(f"downloading {url}:", sum(there.values()))
        fetched = []
        for key in order:
            name = key[len(prefix) :]
            if not name or name.endswith("/"):
                continue
            if _download_file(s3, bucket, key, folder, name, there[key], progress):
                fetched.append(name)
        progress.close()
    return fetched


def _download_file(
    s3: Any, bucket: str, key: str, folder: Path, name: str, size: int, progress: TransferProgress
) -> bool:
    target = folder / name
    if not target.resolve().is_relative_to(folder.resolve()):
        raise S3Error(f"s3://{bucket}/{key}: the name leads out of {folder}; it is not fetched")
    wanted = known_checksums(folder).get(name) or _object_checksum(s3, bucket, key)
    lists = PurePosixPath(name).name in CHECKSUM_FILES
    if not lists and target.is_file() and target.stat().st_size == size and wanted and sha256(target) == wanted:
        progress(size)
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    for attempt in (1, 2):
        s3.download_file(bucket, key, str(part), Callback=progress, Config=_transfer_config())
        found = sha256(part)
        if not wanted or found == wanted:
            os.replace(part, target)
            return True
        part.unlink()
        if attempt == 2:
            raise S3Error(
                f"s3://{bucket}/{key}: sha256 {found[:12]}… where {wanted[:12]}… is expected: the file there is "
                f"damaged; upload it again"
            )
    return True


def list_objects(s3: Any, bucket: str, prefix: str) -> dict[str, int]:
    """Size in bytes of each object under a prefix, by key."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", [])}


def _object_checksum(s3: Any, bucket: str, key: str) -> str:
    return s3.head_object(Bucket=bucket, Key=key)["Metadata"].get(CHECKSUM, "")


def main(argv: Sequence[str] | None = None) -> int:
    def body() -> int:
        words = list(sys.argv[1:] if argv is None else argv)
        if len(words) >= 2 and not any(word.startswith("-") for word in words[:2]):
            words = ["--source", words[0], "--target", words[1], *words[2:]]
        flags = parse_flags(Transfer, words, defaults={"source": "", "target": ""}, examples=__doc__)
        up, down = is_s3(flags.target), is_s3(flags.source)
        if up == down:
            raise ConfigError(
                ["give a folder and a place in S3: `python -m storage.s3 FOLDER s3://BUCKET/FOLDER` or back"]
            )
        moved = upload_folder(flags.source, flags.target) if up else download_folder(flags.source, flags.target)
        print(f"{len(moved)} files {'sent' if up else 'fetched'}", file=sys.stderr)
        return 0

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
