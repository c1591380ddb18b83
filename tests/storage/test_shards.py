"""shards.py: the manifest and the writer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from storage.shards import Manifest, ManifestError, ShardWriter


@pytest.fixture
def values() -> dict:
    shard = {"file": "train_000000.bin", "tokens": 10, "sha256": "a" * 64}
    split = {"tokens": 10, "bytes": 30, "documents": 2, "shards": [shard]}
    return {
        "format": 1,
        "tokenizer": {"kind": "bpe", "vocab_size": 300, "fingerprint": "f", "styles": {}},
        "dtype": "uint16",
        "splits": {"train": split, "val": {**split, "shards": [{**shard, "file": "val_000000.bin"}]}},
        "source": {"name": "a folder", "documents": 4, "settings": {"unwrap": True}, "identity": "i"},
        "cleaning": {"joined_lines": 3},
        "max_id": 299,
    }


def test_a_manifest_comes_back_as_it_was(tmp_path: Path, values: dict) -> None:
    manifest = Manifest.model_validate(values)
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8")) == values
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert str(manifest.source) == "a folder"


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("format",), 2, "format"),
        (("dtype",), "uint32", "dtype uint32 does not go with 300 ids"),
        (("tokenizer", "vocab_size"), 65537, "dtype uint16 does not go with 65537 ids"),
        (("max_id",), 300, "max_id 300 is not below the tokenizer's 300 ids"),
        (("splits", "train", "tokens"), 11, "splits.train: its shards do not add up to its 11 tokens"),
        (("splits", "val", "shards"), [], "splits.val.shards"),
        (("splits", "train", "shards", 0, "file"), "../x.bin", "splits.train.shards.0.file"),
        (("splits", "train", "shards", 0, "sha256"), "short", "splits.train.shards.0.sha256"),
        (("extra",), 1, "extra: unknown setting"),
        (("source",), None, "source"),
    ],
)
def test_damage_is_named(keys: tuple, value: object, message: str, tmp_path: Path, values: dict) -> None:
    place = values
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (tmp_path / "manifest.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ManifestError) as caught:
        Manifest.load(tmp_path)
    assert message in str(caught.value) and "manifest.json" in str(caught.value)


def test_a_missing_or_cut_manifest_is_named(tmp_path: Path, values: dict) -> None:
    with pytest.raises(ManifestError, match=r"manifest\.json: no such file; .*prepare_data\.py --input"):
        Manifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(values)[:-20], encoding="utf-8")
    with pytest.raises(ManifestError, match=r"manifest\.json is damaged"):
        Manifest.load(tmp_path)


def test_the_writer_cuts_hashes_and_counts(tmp_path: Path) -> None:
    stream = np.arange(2500, dtype=np.uint16) % 700
    writer = ShardWriter(tmp_path, "val", 1000, np.uint16)
    for part in np.split(stream, [3, 3, 900, 1000, 2400]):
        writer.append(part)
    writer.bytes, writer.documents = 9000, 3
    writer.close()
    result = writer.result()
    assert [shard.tokens for shard in result.shards] == [1000, 1000, 500]
    assert (result.tokens, result.bytes, result.documents, writer.max_id) == (2500, 9000, 3, 699)
    files = [(tmp_path / shard.file).read_bytes() for shard in result.shards]
    assert b"".join(files) == stream.astype("<u2").tobytes()
    assert [hashlib.sha256(data).hexdigest() for data in files] == [shard.sha256 for shard in result.shards]


@pytest.mark.parametrize("at", [1, 999, 1000, 1001, 2000, 2300])
def test_a_restored_writer_drops_what_came_after(at: int, tmp_path: Path) -> None:
    stream = np.arange(4000, dtype=np.uint32)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    writer = ShardWriter(whole, "train", 1000, np.uint32)
    writer.append(stream)
    writer.close()
    first = ShardWriter(broken, "train", 1000, np.uint32)
    first.append(stream[:at])
    first.sync()
    state = json.loads(json.dumps(first.state()))
    first.append(stream[at : at + 1300] + 7)
    first.sync()
    second = ShardWriter(broken, "train", 1000, np.uint32)
    second.restore(state)
    second.append(stream[at:])
    second.close()
    assert second.shards == writer.shards
    assert {p.name: p.read_bytes() for p in broken.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_a_writer_does_not_go_on_from_altered_files(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", 1000, np.uint16)
    writer.append(np.zeros(1500, dtype=np.uint16))
    writer.sync()
    state = writer.state()
    for name, size in (("train_000001.bin", 10), ("train_000000.bin", 1998)):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(bytes(size))
        with pytest.raises(OSError, match=f"{name} was altered"):
            ShardWriter(tmp_path, "train", 1000, np.uint16).restore(state)
        (tmp_path / name).write_bytes(whole)
