"""Folders to S3 and back, against moto's server: real boto3, real sockets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from config import ConfigError
from storage import s3 as transfer
from storage.s3 import S3Error, download_folder, is_s3, s3_url, split, upload_folder


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    moto = pytest.importorskip("moto.server", reason="needs moto[server]: pip install -r requirements-aws.txt")
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(transfer, "PART_BYTES", 5 * 1024 * 1024)
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    name = "b" + hashlib.sha256(request.node.name.encode()).hexdigest()[:20]
    transfer.client().create_bucket(Bucket=name)
    return name


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A data folder: a small shard, one of several parts, and the manifest with their checksums."""
    folder = tmp_path / "data"
    folder.mkdir()
    listed = []
    for name, size in (("train_000000.bin", 12 * 1024 * 1024), ("val_000000.bin", 1000)):
        content = hashlib.sha256(name.encode()).digest() * (size // 32 + 1)
        (folder / name).write_bytes(content[:size])
        listed.append({"file": name, "sha256": hashlib.sha256(content[:size]).hexdigest()})
    (folder / "manifest.json").write_text(json.dumps({"splits": {"train": {"shards": listed}}}))
    (folder / "deeper").mkdir()
    (folder / "deeper" / "note.txt").write_text("more")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_comes_back_as_it_went(bucket: str, shards: Path, tmp_path: Path) -> None:
    sent = upload_folder(shards, f"s3://{bucket}/some/data/")
    assert sent[-1] == "manifest.json" and len(sent) == 4
    assert len(download_folder(f"s3://{bucket}/some/data", tmp_path / "back")) == 4
    assert contents(tmp_path / "back") == contents(shards)


def test_a_second_transfer_sends_only_what_changed(bucket: str, shards: Path, tmp_path: Path) -> None:
    url, back = f"s3://{bucket}/data", tmp_path / "back"
    upload_folder(shards, url)
    (shards / "deeper" / "note.txt").write_text("less")
    assert upload_folder(shards, url) == ["deeper/note.txt"]
    download_folder(url, back)
    (back / "train_000000.bin").unlink()
    assert set(download_folder(url, back)) == {"manifest.json", "train_000000.bin"}


def test_a_damaged_local_file_is_fetched_again(bucket: str, shards: Path, tmp_path: Path) -> None:
    url, back = f"s3://{bucket}/data", tmp_path / "back"
    upload_folder(shards, url)
    download_folder(url, back)
    (back / "val_000000.bin").write_bytes(b"x" * 1000)
    assert "val_000000.bin" in download_folder(url, back)
    assert contents(back) == contents(shards)


def test_a_checkpoints_own_sums_are_used(bucket: str, tmp_path: Path) -> None:
    folder = tmp_path / "last"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    digest = hashlib.sha256(b"other").hexdigest()
    (folder / "checksums.json").write_text(json.dumps({"files": {"model.safetensors": {"bytes": 7, "sha256": digest}}}))
    upload_folder(folder, f"s3://{bucket}/last")
    with pytest.raises(S3Error, match="model.safetensors.*damaged"):
        download_folder(f"s3://{bucket}/last", tmp_path / "back")


def test_a_file_that_differs_from_the_manifest_is_refused(bucket: str, shards: Path, tmp_path: Path) -> None:
    url = f"s3://{bucket}/data"
    upload_folder(shards, url)
    transfer.client().put_object(Bucket=bucket, Key="data/val_000000.bin", Body=b"y" * 1000)
    with pytest.raises(S3Error, match="val_000000.bin.*damaged"):
        download_folder(url, tmp_path / "back")
    assert not (tmp_path / "back" / "val_000000.bin").exists()
    assert not list((tmp_path / "back").glob("*.part"))


def test_faults_name_cause_and_remedy(
    bucket: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(S3Error, match="no such bucket.*aws s3 mb"):
        upload_folder(shards, "s3://no-such-bucket-anywhere/data")
    with pytest.raises(S3Error, match="nothing there"):
        download_folder(f"s3://{bucket}/empty", tmp_path / "back")
    with pytest.raises(S3Error, match="no such folder"):
        upload_folder(tmp_path / "missing", f"s3://{bucket}/data")
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(S3Error, match="cannot be reached"):
        upload_folder(shards, f"s3://{bucket}/data")
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(S3Error, match="no AWS credentials.*aws configure"):
        upload_folder(shards, f"s3://{bucket}/data")


@pytest.mark.parametrize("operation", ["ListObjectsV2", "PutObject", "GetObject"])
def test_a_missing_permission_is_named(
    bucket: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    from botocore.awsrequest import AWSResponse

    url = f"s3://{bucket}/data"
    upload_folder(shards, url)
    made = transfer.client

    class Raw:
        def stream(self, *_: object, **__: object) -> Iterator[bytes]:
            yield b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"

        read = None

    def denied(region: str | None = None) -> object:
        client = made(region)
        client.meta.events.register(f"before-send.s3.{operation}", lambda **_: AWSResponse("", 403, {}, Raw()))
        return client

    monkeypatch.setattr(transfer, "client", denied)
    (shards / "deeper" / "note.txt").write_text(operation)
    action = {"ListObjectsV2": "ListBucket"}.get(operation, operation)
    with pytest.raises(S3Error, match=f"permission denied: Access Denied.*s3:{action}, which statement Bucket"):
        if operation == "GetObject":
            download_folder(url, tmp_path / "back")
        else:
            upload_folder(shards, url)


def test_a_key_that_leads_out_of_the_folder_is_refused(bucket: str, tmp_path: Path) -> None:
    transfer.client().put_object(Bucket=bucket, Key="data/../../outside", Body=b"x")
    with pytest.raises(S3Error, match="leads out"):
        download_folder(f"s3://{bucket}/data", tmp_path / "a" / "b")
    assert not (tmp_path / "outside").exists()


def test_places_in_s3() -> None:
    assert s3_url(Path("s3://bucket/a/b/")) == "s3://bucket/a/b" and s3_url("s3://bucket") == "s3://bucket"
    assert split("s3://bucket/a") == ("bucket", "a/") and split("s3://bucket") == ("bucket", "")
    assert is_s3(Path("s3://x/y")) and not is_s3("data/s3")
    for wrong in ("data/x", "s3://", "http://x/y"):
        with pytest.raises(ConfigError):
            s3_url(wrong)


def test_prepared_texts_go_up_and_training_starts_from_there(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import prepare_data
    import train
    from support.helpers import TINY_FLAGS, nonsense
    from training import run_folder

    monkeypatch.setattr(run_folder, "ROOT", tmp_path / "repository")
    (tmp_path / "text.txt").write_text(nonsense(6000))
    words = ["--input", str(tmp_path / "text.txt"), "--out", str(tmp_path / "data"), "--workers", "1"]
    words += ["--tokenizer", "char", "--s3-output"]
    assert prepare_data.main([*words, f"s3://{bucket}/novels"]) == 0
    there = transfer.client().list_objects_v2(Bucket=bucket, Prefix="novels/")["Contents"]
    assert {item["Key"].removeprefix("novels/"): item["Size"] for item in there} == {
        name: len(content) for name, content in contents(tmp_path / "data").items() if not name.startswith(".")
    }
    flags = [*TINY_FLAGS, "--data", f"s3://{bucket}/novels", "--train.max-steps", "3"]
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()
    capsys.readouterr()
    assert train.main([*flags, "--data", "s3://no-such-bucket-anywhere/x", "--out", str(tmp_path / "none")]) == 1
    assert prepare_data.main([*words, "s3://no-such-bucket-anywhere/x"]) == 1
    assert capsys.readouterr().err.count("no such bucket") == 2


def test_the_program_moves_both_ways(bucket: str, shards: Path, tmp_path: Path) -> None:
    assert transfer.main([str(shards), f"s3://{bucket}/p"]) == 0
    assert transfer.main([f"s3://{bucket}/p", str(tmp_path / "back")]) == 0
    assert contents(tmp_path / "back") == contents(shards)
    assert transfer.main([str(shards), str(tmp_path / "back")]) == 2
    assert transfer.main([str(shards), "s3://no-such-bucket-anywhere/p"]) == 1


def test_prepared_data_goes_to_s3_with_its_manifest_last(bucket: str, tmp_path: Path) -> None:
    import prepare_data
    from storage.shards import Manifest

    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"Text number {number}. " * 99, encoding="utf-8")
    out, url = tmp_path / "out", f"s3://{bucket}/corpora/mine"
    words = ["--input", str(tmp_path), "--tokenizer", "char", "--out", str(out)]
    assert prepare_data.main([*words, "--s3-output", url]) == 0
    assert set(download_folder(url, tmp_path / "back")) == {path.name for path in out.iterdir()}
    assert contents(tmp_path / "back") == contents(out)
    assert Manifest.load(tmp_path / "back") == Manifest.load(out)
    (out / ".DS_Store").write_text("", encoding="utf-8")
    keys = [item["Key"] for item in transfer.client().list_objects_v2(Bucket=bucket)["Contents"]]
    assert prepare_data.main([*words, "--s3-output", url]) == 0
    assert [item["Key"] for item in transfer.client().list_objects_v2(Bucket=bucket)["Contents"]] == keys
    assert prepare_data.main([*words, "--s3-output", "s3://no-such-bucket-here/x"]) == 1
