"""prepare_data.py and what it is made of: documents.py, shards.py, workers.py."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import prepare_data
from corpus import cleaning, encoding, finder, out_folder, preparation
from corpus.documents import Piece, ReadOptions
from corpus.finder import find, inspect
from corpus.readers.text import TextChunk
from storage import shards
from storage.catalogue import Catalogue
from storage.shards import Manifest
from support.forked import PYTHON
from support.samples import NEW_FOOTER, NEW_HEADER, hashes, make_texts, run, tokens, told
from tokenizer import load_tokenizer

ROOT = Path(prepare_data.__file__).parent


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return make_texts(tmp_path / "texts")


def vocabulary(kind: str, size: int) -> tuple[object, ...]:
    return ("--tokenizer", kind, *(("--vocab-size", size) if kind == "bpe" else ()))


def test_asking_for_a_vocabulary_s_size_is_asking_for_a_new_one(texts: Path, tmp_path: Path) -> None:
    for preset in ((), ("--preset", "story-small")):
        out = tmp_path / f"out{len(preset)}"
        assert run("--input", texts, *preset, "--vocab_size=300", "--out", out) == 0
        assert (load_tokenizer(out).kind, load_tokenizer(out).vocab_size) == ("bpe", 300)


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "char"])
def test_the_shards_are_the_texts(kind: str, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert (
        run(
            "--input",
            texts,
            *vocabulary(kind, 500),
            "--val-fraction",
            0.25,
            "--no-unwrap",
            "--no-strip-licence",
            "--out",
            out,
        )
        == 0
    )
    expected = {path.read_text(encoding="utf-8") for path in texts.rglob("*.txt")}
    train, val = told(out, "train"), told(out, "val")
    assert set(train) | set(val) == expected
    assert (len(train), len(val)) == (9, 3)
    manifest, tokenizer = Manifest.load(out), load_tokenizer(out)
    assert manifest.tokenizer.model_dump() == {
        "kind": kind, "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint, "styles": {},
    }  # fmt: skip
    for name, stories in (("train", train), ("val", val)):
        split = getattr(manifest.splits, name)
        stream = tokens(out, name)
        assert split.tokens == len(stream) == sum(len(tokenizer.encode(story)) + 1 for story in stories)
        assert split.bytes == sum(len(story.encode()) for story in stories)
        assert split.documents == len(stories) == (stream == tokenizer.eot).sum()
    assert manifest.max_id == max(tokens(out, "train").max(), tokens(out, "val").max()) < tokenizer.vocab_size
    assert (manifest.dtype, manifest.cleaning) == ("uint16", {})


def test_more_than_65536_ids_are_stored_as_uint32(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("".join(chr(point) for point in range(0x10000, 0x20200)), encoding="utf-8")
    out = tmp_path / "out"
    assert run("--input", tmp_path / "all.txt", "--tokenizer", "char", "--out", out) == 0
    manifest = Manifest.load(out)
    assert (manifest.dtype, manifest.tokenizer.vocab_size) == ("uint32", 0x10200)
    assert manifest.max_id == 0x10200 - 1 == tokens(out, "val").max()


def test_shards_are_cut_at_the_size_asked_and_hashed(texts: Path, tmp_path: Path) -> None:
    run("--input", texts, "--tokenizer", "gpt2", "--out", tmp_path / "one")
    run("--input", texts, "--tokenizer", "gpt2", "--shard-tokens", 1024, "--out", tmp_path / "many")
    manifest = Manifest.load(tmp_path / "many")
    files = manifest.splits.train.shards
    assert len(files) > 3
    assert [shard.file for shard in files] == [f"train_{number:06d}.bin" for number in range(len(files))]
    assert {shard.tokens for shard in files[:-1]} == {1024}
    assert all(hashes(tmp_path / "many")[shard.file] == shard.sha256 for shard in files)
    assert (tokens(tmp_path / "many", "train") == tokens(tmp_path / "one", "train")).all()


@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
def test_the_shards_do_not_depend_on_the_workers_or_the_pieces(
    kind: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["--input", texts, *vocabulary(kind, 400)]
    run(*common, "--out", tmp_path / "whole", "--workers", 1)
    monkeypatch.setattr(cleaning, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(encoding, "BATCH_BYTES", 1)
    for count in (1, 2, 3):
        run(*common, "--out", tmp_path / f"w{count}", "--workers", count)
        assert hashes(tmp_path / f"w{count}") == hashes(tmp_path / "whole")
    pieces = [inspect(path, name, ReadOptions()).cuts for path, name in find([str(texts)])]
    assert max(map(len, pieces)) > 4


@pytest.mark.parametrize("group", [1, 2500])
def test_one_document_is_split_by_position(
    group: int, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleaning, "CHUNK_BYTES", 700)
    monkeypatch.setattr(encoding, "BATCH_BYTES", group)
    text = (texts / "more" / "s01.txt").read_text(encoding="utf-8")
    cut = int(len(text) * 0.75)
    for kind in ("char", "bpe"):
        out = tmp_path / kind
        run(
            "--input",
            texts / "more" / "s01.txt",
            *vocabulary(kind, 300),
            "--val-fraction",
            0.25,
            "--out",
            out,
        )
        assert (told(out, "train"), told(out, "val")) == ([text[:cut]], [text[cut:]])
        manifest, tokenizer = Manifest.load(out), load_tokenizer(out)
        assert manifest.splits.train.bytes == len(text[:cut].encode())
        assert manifest.splits.train.documents == manifest.splits.val.documents == 1
        assert tokenizer.eot is None if kind == "char" else tokens(out, "val")[-1] == tokenizer.eot
    assert load_tokenizer(tmp_path / "char").vocab_size == len(set(text))


def test_tiny_shakespeare(shared_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "ts"
    assert run("--preset", "shakespeare-char", "--input", shared_data / "tinyshakespeare.txt", "--out", out) == 0
    splits = Manifest.load(out).splits
    assert (splits.train.tokens, splits.val.tokens) == (1_003_854, 111_540)
    assert load_tokenizer(out).vocab_size == 65
    text = (shared_data / "tinyshakespeare.txt").read_text(encoding="utf-8")
    assert told(out, "train") + told(out, "val") == [text[:1_003_854], text[1_003_854:]]


def test_the_sample_preset(tmp_path: Path) -> None:
    out = tmp_path / "sample"
    assert run("--preset", "sample", "--out", out) == 0
    stories = {path.read_text(encoding="utf-8") for path in (ROOT / "data" / "sample").glob("*.txt")}
    assert set(told(out, "train")) | set(told(out, "val")) == stories
    assert preparation.default_out("sample") == ROOT / "data" / "sample" / "tokens"
    assert preparation.default_out("victorian") == ROOT / "data" / "victorian"


MEMORY = """
import pathlib, resource, sys, prepare_data
code = prepare_data.main(sys.argv[1:])
status = pathlib.Path("/proc/self/status")  # ru_maxrss begins with what the parent process had
peaks = [line.split()[1] for line in status.read_text().splitlines() if "VmHWM" in line] if status.exists() else []
print(int(peaks[0] if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) // 1024)
sys.exit(code)
"""


def write_copies(path: Path, story: str, copies: int) -> None:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"text": [f"{number} {story}" for number in range(copies)]})
        pyarrow.parquet.write_table(table, path, row_group_size=500, write_batch_size=20, compression="none")
        return
    with path.open("w", encoding="utf-8") as file:
        for _ in range(copies):
            file.write(json.dumps({"text": story}) + "\n" if path.suffix == ".jsonl" else story)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_memory_does_not_grow_with_the_text(suffix: str, texts: Path, tmp_path: Path) -> None:
    story = (texts / "s04.txt").read_text(encoding="utf-8")
    used = []
    for copies in (20, 9_000):
        path = tmp_path / f"{copies}.{suffix}"
        write_copies(path, story, copies)
        flags = ["--input", path, "--tokenizer", "char", "--workers", 1, "--out", tmp_path / str(copies)]
        command = [sys.executable, "-c", MEMORY, *map(str, flags)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        used.append(int(done.stdout))
    assert path.stat().st_size > 20 << 20
    assert used[1] - used[0] < 50


def test_the_choice_of_validation_documents(texts: Path, tmp_path: Path) -> None:
    def chosen(fraction: float, *inputs: Path) -> set[str]:
        files = [inspect(path, name, ReadOptions()) for path, name in find(map(str, inputs))]
        corpus = finder.Corpus("x", files)
        return {file.name for file, val in zip(files, encoding.validation_split(corpus, fraction), strict=True) if val}

    assert [len(chosen(fraction, texts)) for fraction in (0.001, 0.1, 0.5, 0.999)] == [1, 1, 6, 11]
    assert chosen(0.25, texts) == chosen(0.25, texts / "more", texts) or len(chosen(0.25, texts)) == 3
    before = chosen(0.25, texts)
    (texts / "another.txt").write_text("New.", encoding="utf-8")
    assert len(before - chosen(0.25, texts)) <= 1  # a further text moves hardly any other
    pair = [texts / "s00.txt", texts / "s04.txt"]
    assert len(chosen(0.01, *pair)) == len(chosen(0.99, *pair)) == 1


def test_a_sources_own_split_is_kept(texts: Path) -> None:
    import dataclasses

    files = [inspect(path, name, ReadOptions()) for path, name in find([str(texts)])][:4]
    files = [dataclasses.replace(file, split="val" if n in (1, 2) else "train") for n, file in enumerate(files)]
    chosen = encoding.validation_split(finder.Corpus("x", files), 0.9)
    assert chosen.tolist() == [False, True, True, False]
    files = [dataclasses.replace(file, split="train") for file in files]
    assert encoding.validation_split(finder.Corpus("x", files), 0.5).sum() == 2


def test_a_vocabulary_is_learned_from_the_training_text_alone(texts: Path, tmp_path: Path) -> None:
    common = ["--tokenizer", "bpe", "--vocab-size", 450, "--val-fraction", 0.25]
    run("--input", texts, *common, "--out", tmp_path / "before")
    held_out = told(tmp_path / "before", "val")
    story = next(text for text in held_out if text.startswith("Story")).split("\n")[0]
    path = next(p for p in texts.rglob("*.txt") if p.read_text(encoding="utf-8").startswith(story + "\n"))
    path.write_text(path.read_text(encoding="utf-8") + "zyxwvut zyxwvut " * 500, encoding="utf-8")
    run("--input", texts, *common, "--out", tmp_path / "after")
    assert any("zyxwvut" in text for text in told(tmp_path / "after", "val"))
    assert load_tokenizer(tmp_path / "after").fingerprint == load_tokenizer(tmp_path / "before").fingerprint
    one = texts / "more" / "s01.txt"
    run("--input", one, *common, "--out", tmp_path / "one")
    text = one.read_text(encoding="utf-8")
    one.write_text(text + "zyxwvut " * (len(text) // 40), encoding="utf-8")  # less than a quarter of the whole
    run("--input", one, *common, "--out", tmp_path / "longer")
    assert b" zyxwvut" not in load_tokenizer(tmp_path / "longer")._pieces


def test_standard_input(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (texts / "s04.txt").read_bytes()
    run("--input", texts / "s04.txt", "--tokenizer", "bpe", "--vocab-size", 300, "--out", tmp_path / "file")
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert run("--input", "-", "--tokenizer", "bpe", "--vocab-size", 300, "--out", tmp_path / "piped") == 0
    assert "already prepared" in capsys.readouterr().err
    assert (tokens(tmp_path / "piped", "train") == tokens(tmp_path / "file", "train")).all()
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "file", "piped"}


def test_too_little_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "": "no text in this file",
        " \n\n ": "no text",
        "\ufeff": "no text",
        "a": "too little",
        "ab": "too little",
    }
    cases[NEW_HEADER + NEW_FOOTER] = "no text"
    for content, message in cases.items():
        (tmp_path / "a.txt").write_text(content, encoding="utf-8")
        assert run("--input", tmp_path / "a.txt", "--tokenizer", "char", "--out", tmp_path / "out") == 1
        assert message in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    (tmp_path / "b.txt").write_text("Some more text than that.", encoding="utf-8")
    assert run("--input", tmp_path, "--tokenizer", "char", "--out", tmp_path / "out") == 0
    (tmp_path / "a.txt").write_text("", encoding="utf-8")
    assert run("--input", tmp_path, "--tokenizer", "char", "--out", tmp_path / "out") == 0
    assert Manifest.load(tmp_path / "out").cleaning == {"empty_files": 1}


def test_faults_of_the_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        ([], "give --input PATH"),
        (["--input", tmp_path / "no"], "no such file or folder"),
        (["--preset", "nonsense"], "--preset nonsense: unknown"),
        (["--source", "elsewhere"], "give pg19, tinystories, tinyshakespeare or OWNER/NAME, or --input PATH"),
        (["--source", "pg19", "--years", "1837"], "--years '1837'"),
        (["--source", "nowhere/*.txt"], "put your texts there"),
        (["--input", tmp_path, "--vocab-size", "300", "--tokenizer", "gpt2"], "but --tokenizer gpt2 has its own"),
        (["--input", tmp_path, "--vocab-size=300", "--tokenizer-from", tmp_path], "but --tokenizer-from"),
        (["--input", tmp_path, "--val-fraction", "1.5", "--vocab-size", "9"], "val-fraction"),
    ]
    for arguments, message in cases:
        assert run(*arguments, "--out", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_unchanged_texts_are_kept_and_changed_ones_never_reused(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    folders = ["--input", texts, "--out", out]
    common = [*folders, "--tokenizer", "bpe", "--vocab-size", 400]
    run(*common)
    first, begun = hashes(out), (out / "manifest.json").stat().st_mtime_ns
    capsys.readouterr()
    assert run(*common) == 0
    assert "already prepared" in capsys.readouterr().err
    assert (out / "manifest.json").stat().st_mtime_ns == begun
    others = [
        [*folders, "--tokenizer", "char"],
        [*common, "--vocab-size", 350],
        [*common, "--no-unwrap"],
        [*common, "--no-strip-licence"],
    ]
    for other in others:
        assert run(*other) == 0
        assert "already" not in capsys.readouterr().err
        assert hashes(out) != first
        run(*common)
        assert hashes(out) == first
    path = texts / "s04.txt"
    stat = path.stat()
    path.write_bytes(path.read_bytes().swapcase())
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))
    run(*common)
    assert (
        hashes(out)["train_000000.bin"] != first["train_000000.bin"]
        or hashes(out)["val_000000.bin"] != first["val_000000.bin"]
    )
    now = hashes(out)
    for damage in (lambda: os.truncate(out / "train_000000.bin", 10), (out / "tokenizer.json").unlink):
        damage()
        run(*common)
        assert hashes(out) == now


def test_a_tokenizer_can_be_taken_over(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--input", texts / "more", "--vocab-size", 400, "--out", tmp_path / "first")
    run("--input", texts, "--tokenizer-from", tmp_path / "first", "--out", tmp_path / "second")
    assert Manifest.load(tmp_path / "second").tokenizer == Manifest.load(tmp_path / "first").tokenizer
    run("--input", texts / "s02.txt", "--tokenizer", "char", "--out", tmp_path / "few")
    assert run("--input", texts, "--tokenizer-from", tmp_path / "few", "--out", tmp_path / "unknown") == 1
    shown = capsys.readouterr().err
    assert "no end-of-text" in shown and re.search(r"s\d\d\.txt: characters? outside this tokenizer's alphabet", shown)


def test_what_it_did_not_write_is_not_replaced(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = hashes(texts / "more")
    assert run("--input", texts, "--tokenizer", "char", "--out", texts / "more") == 2
    assert re.search(r"holds s\d\d\.txt", capsys.readouterr().err)
    assert hashes(texts / "more") == before
    out = tmp_path / "out"
    run("--input", texts, "--tokenizer", "char", "--out", out)
    (out / ".DS_Store").write_text("", encoding="utf-8")
    assert run("--input", texts, "--tokenizer", "char", "--val-fraction", 0.2, "--out", out) == 0
    (out / "my notes.txt").write_text("keep", encoding="utf-8")
    assert run("--input", texts, "--tokenizer", "gpt2", "--out", out) == 2
    assert (out / "my notes.txt").read_text(encoding="utf-8") == "keep"
    assert run("--input", texts, "--tokenizer", "gpt2", "--out", texts / "s00.txt") == 2


INTERRUPTED = """
import os, signal, sys
import prepare_data
from corpus import cleaning, encoding, preparation
from storage import shards
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is started without
cleaning.CHUNK_BYTES, encoding.BATCH_BYTES, preparation.SAVE_SECONDS = 1000, 1, 0.0
os.fsync = lambda number: None  # a killed process loses nothing that it wrote, and this saves seconds
append, calls = shards.ShardWriter.append, 0
def stop(self, tokens):
    global calls
    calls += 1
    append(self, tokens)
    if calls == int(sys.argv[1]):
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
shards.ShardWriter.append = stop
code = prepare_data.main(sys.argv[3:])
print(calls)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("how", "kind", "count"), [("SIGKILL", "bpe", 2), ("SIGINT", "bpe", 1), ("SIGKILL", "char", 1)]
)
def test_interrupted_it_goes_on_and_gives_the_same_shards(
    how: str, kind: str, count: int, texts: Path, tmp_path: Path
) -> None:
    def start(stop: int, out: Path) -> subprocess.CompletedProcess[str]:
        flags = [
            "--input",
            texts,
            *vocabulary(kind, 400),
            "--shard-tokens",
            1024,
            "--workers",
            count,
            "--out",
            out,
        ]
        command = [*PYTHON, "-c", INTERRUPTED, str(stop), how, *map(str, flags)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    whole = start(0, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    calls = int(whole.stdout)
    assert calls > 40
    out = tmp_path / "out"
    for _ in range(2):
        stopped = start(calls // 3 | 1, out)
        assert stopped.returncode == (-signal.SIGKILL if how == "SIGKILL" else 130), stopped.stderr
        assert not out.exists()
    if how == "SIGINT":
        assert "run the same command to resume" in stopped.stderr
    done = start(0, out)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= calls - 2 * (calls // 3) + 4
    assert {name: value for name, value in hashes(out).items()} == hashes(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts", "whole"]


def test_an_interrupted_preparation_of_other_texts_is_not_gone_on_with(texts: Path, tmp_path: Path) -> None:
    out, common = tmp_path / "out", ["--tokenizer", "char", "--workers", "1"]
    command = [*PYTHON, "-c", INTERRUPTED, "9", "SIGKILL", "--input", str(texts), *common, "--out", str(out)]
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
    assert (tmp_path / ".out.part" / "state.json").is_file()
    (texts / "s04.txt").write_text("Changed.", encoding="utf-8")
    run("--input", texts, *common, "--out", out)
    run("--input", texts, *common, "--out", tmp_path / "fresh")
    assert hashes(out) == hashes(tmp_path / "fresh")


def test_an_interrupted_preparation_whose_files_were_altered_starts_anew(texts: Path, tmp_path: Path) -> None:
    out, common = tmp_path / "out", ["--tokenizer", "char", "--workers", "1", "--shard-tokens", "1024"]
    command = [*PYTHON, "-c", INTERRUPTED, "25", "SIGKILL", "--input", str(texts), *common, "--out", str(out)]
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
    (tmp_path / ".out.part" / "train_000001.bin").write_bytes(b"?")
    run("--input", texts, *common, "--out", out)
    run("--input", texts, *common, "--out", tmp_path / "fresh")
    assert hashes(out) == hashes(tmp_path / "fresh")


def test_the_old_folder_stands_until_the_new_one_is_whole(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run("--input", texts, "--tokenizer", "char", "--out", out)
    before = hashes(out)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.ShardWriter, "close", fail)
    assert run("--input", texts, "--tokenizer", "gpt2", "--out", out) == 1
    assert "No space left" in capsys.readouterr().err
    assert hashes(out) == before
    monkeypatch.undo()
    out.rename(tmp_path / ".out.old")  # as a crash between two renames leaves it
    assert run("--input", texts, "--tokenizer", "char", "--out", out) == 0
    assert "already prepared" in capsys.readouterr().err
    assert hashes(out) == before and not (tmp_path / ".out.old").exists()


def test_a_second_preparation_of_the_same_folder_is_refused(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with out_folder.draft_folder(tmp_path / "out"):
        assert run("--input", texts, "--tokenizer", "char", "--out", tmp_path / "out") == 2
    assert "another prepare_data.py" in capsys.readouterr().err
    assert run("--input", texts, "--tokenizer", "char", "--out", tmp_path / "out") == 0


@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
def test_parts_joined_are_the_whole(kind: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "CHUNK_BYTES", 900)
    monkeypatch.setattr(encoding, "BATCH_BYTES", 500)
    common = ["--input", texts, *vocabulary(kind, 400), "--val-fraction", 0.5, "--shard-tokens", 1024]
    run(*common, "--out", tmp_path / "whole")
    parts = [tmp_path / f"part{number}" for number in (1, 2)]
    for number, part in enumerate(parts, 1):
        assert run(*common, "--part", f"{number}/2", "--workers", number, "--out", part) == 0
    assert run("--join", *parts, "--out", tmp_path / "joined") == 0
    whole, joined = Manifest.load(tmp_path / "whole"), Manifest.load(tmp_path / "joined")
    for name in ("train", "val"):
        assert sorted(told(tmp_path / "joined", name)) == sorted(told(tmp_path / "whole", name))
        assert [told(part, name) for part in parts].count([]) == 0
        ours, theirs = getattr(joined.splits, name), getattr(whole.splits, name)
        assert (ours.tokens, ours.bytes, ours.documents) == (theirs.tokens, theirs.bytes, theirs.documents)
        assert all(hashes(tmp_path / "joined")[shard.file] == shard.sha256 for shard in ours.shards)
    assert (joined.cleaning, joined.source.documents, joined.tokenizer) == (whole.cleaning, 12, whole.tokenizer)
    assert joined.source.settings == whole.source.settings
    for part in parts:
        assert Manifest.load(part)


def test_what_does_not_go_together_is_not_joined(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--input", texts, "--tokenizer", "gpt2", "--val-fraction", 0.5]
    one, two, other, char = (tmp_path / name for name in ("one", "two", "other", "char"))
    run(*common, "--part", "1/2", "--out", one)
    run(*common, "--part", "2/2", "--out", two)
    run(*common, "--part", "2/2", "--no-unwrap", "--out", other)
    run("--input", texts, "--tokenizer", "char", "--out", char)
    cases = [
        (["--join", one, one], 1, "these are the parts 1/2, 1/2, not 1/2, 2/2"),
        (["--join", one], 1, "these are the parts 1/2, not 1/1"),
        (["--join", one, other], 1, "different texts, or prepared with different settings"),
        (["--join", one, char], 1, "another tokenizer"),
        (["--join", one, tmp_path / "none"], 1, "no such file"),
        ([*common, "--part", "3/2"], 2, "--part 3/2: there are only 2 parts"),
        ([*common, "--part", "0/2"], 2, "--part '0/2'"),
        (["--input", texts / "s04.txt", "--tokenizer", "gpt2", "--part", "1/2"], 2, "only as a whole"),
    ]
    for arguments, code, message in cases:
        capsys.readouterr()
        assert run(*arguments, "--out", tmp_path / "out") == code
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert run("--join", one, two) == 2
    assert run("--join", two, one, "--out", tmp_path / "out") == 0
    assert run("--join", char, char, "--out", tmp_path / "twice") == 0
    assert Manifest.load(tmp_path / "twice").source.documents == 24


def test_copies_are_dropped_once_and_never_from_validation(texts: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in ("One two.", "Three.", " One two.\n", "Four.", "Three.")]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "four.txt").write_text("Four.", encoding="utf-8")
    common = ["--input", tmp_path / "rows.jsonl", tmp_path / "four.txt", "--tokenizer", "char", "--val-fraction", 0.4]
    for count in (1, 2):
        out = tmp_path / f"out{count}"
        assert run(*common, "--drop-duplicates", "--workers", count, "--out", out) == 0
        assert sorted(told(out, "train") + told(out, "val")) == ["Four.", "One two.", "Three."]
        assert Manifest.load(out).cleaning["duplicate_documents"] == 3
    assert run(*common, "--out", tmp_path / "all") == 0
    assert len(told(tmp_path / "all", "train") + told(tmp_path / "all", "val")) == 6

    class Given:
        def __init__(self, split: str, documents: int):
            self.split, self.documents = split, documents

    corpus = finder.Corpus("x", [Given("train", 3), Given("val", 2)])  # type: ignore[list-item]
    numbers = [np.array([5, 6, 5], np.uint64), np.array([6, 0], np.uint64)]
    assert encoding.find_duplicates(corpus, numbers).tolist() == [False, True, True, False, False]


def test_every_so_many_th_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, out, read = tmp_path / "texts", tmp_path / "out", set[int]()
    texts.mkdir()
    for number in range(12):
        (texts / f"{number:02d}.txt").write_text(f"the text of number {number}\n" * 9, encoding="utf-8")
    clean = TextChunk.read

    def noted(chunk: TextChunk, options: ReadOptions) -> Iterator[Piece]:
        read.add(chunk.document)
        return clean(chunk, options)

    monkeypatch.setattr(TextChunk, "read", noted)
    assert run("--input", texts, "--tokenizer", "char", "--every", "5", "--out", out) == 0
    assert read == {0, 5, 10}
    assert {text.split()[4] for split in ("train", "val") for text in told(out, split)} == {"0", "5", "10"}
    catalogue = Catalogue.load(out)
    assert catalogue and sorted(catalogue.dropped) == [number for number in range(12) if number % 5]
    assert run("--input", texts, "--tokenizer", "char", "--every", "50", "--out", out) == 0  # two at least
    assert len(told(out, "train") + told(out, "val")) == 2
