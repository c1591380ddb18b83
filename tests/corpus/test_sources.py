"""sources.py: named corpora from a hub on this machine, over HTTP, with its failures."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from config import ConfigError
from corpus import sources
from corpus.sources import HubSelection, SourceError, WebFile, fetch, split_of
from storage.shards import Manifest
from support.forked import PYTHON
from support.helpers import ROOT
from support.hub_server import Hub
from support.samples import hashes, paragraphs, run, told, wrapped

YEARS = [1719, 1836, 1837, 1851, 1901, 1902, 1911]
SAD = "Once there was a cat. “It’s sad,” she said. It cost £5 at the café."


def book(number: int) -> str:
    made = paragraphs(30, seed=number)
    return (
        f"THE BOOK OF {number}\n\n[Illustration: the cat]\n\n" + wrapped(made, "\n\n") + f"\nThe _end_ of {number}.\n"
    )


def table(**columns: object) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=3)
    return file.getvalue()


def pg19(numbers: range) -> bytes:
    """Rows in PG-19's own schema; book n is of YEARS[n % 7]."""
    import pyarrow

    return table(
        short_book_title=[f"Book {number}" for number in numbers],
        publication_date=pyarrow.array([YEARS[number % 7] for number in numbers], pyarrow.int32()),
        url=[f"http://example.org/{number}" for number in numbers],
        text=[book(number) for number in numbers],
    )


def stories(*texts: str) -> bytes:
    return table(text=list(texts))


@pytest.fixture(scope="module")
def sets() -> dict[str, dict[str, dict[str, bytes]]]:
    tales = [f"Story {number}. {' '.join(paragraphs(2, seed=number))}" for number in range(40)]
    broken = SAD.encode().decode("windows-1252", "replace").replace("\ufffd", "")
    return {
        "emozilla/pg19": {
            "main": {
                "README.md": b"PG-19",
                "data/test-00000-of-00001.parquet": pg19(range(90, 93)),
                "data/train-00000-of-00002.parquet": pg19(range(14)),
                "data/train-00001-of-00002.parquet": pg19(range(14, 21)),
                "data/validation-00000-of-00001.parquet": pg19(range(70, 77)),
            }
        },
        "roneneldan/TinyStories": {
            "main": {
                "TinyStories-train.txt": b"another form of the same",
                "data/train-00000-of-00002-2d5a1467fff1081b.parquet": stories(*tales[:20], tales[3] + " ", broken),
                "data/train-00001-of-00002-5852b56a2bd28fd9.parquet": stories(*tales[10:35], tales[38], ""),
                "data/validation-00000-of-00001-869c898b519ad725.parquet": stories(*tales[35:], SAD),
            }
        },
        "someone/poems": {"main": {"train.parquet": table(verse=tales[:9], poet=["x"] * 9)}},
        "someone/rows": {"main": {"all.jsonl": "".join(f'{{"text": "{tale}"}}\n' for tale in tales).encode()}},
        "someone/loose": {
            "main": {"script.py": b"print()"},
            "refs/convert/parquet": {"default/train/0000.parquet": stories(*tales[:9])},
        },
        "someone/many": {"main": {f"{name}/train-0.parquet": stories(*tales[:9]) for name in ("small", "large")}},
        "someone/folders": {
            "main": {"train/0.parquet": stories(*tales[:9]), "validation/0.parquet": stories(*tales[9:12])}
        },
        "someone/nothing": {"main": {"image.png": b"x"}},
    }


@pytest.fixture
def hub(sets: dict[str, dict[str, dict[str, bytes]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants, file_download

    with Hub(sets) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(sources, "FIRST_WAIT", 0.001)
        monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
        yield running


CHAR = ["--tokenizer", "char", "--workers", 1]  # quicker than the presets' own


def documents_of(*arguments: object, out: Path) -> tuple[list[str], list[str]]:
    assert run(*arguments, *CHAR, "--out", out) == 0
    return told(out, "train"), told(out, "val")


def numbers(texts: list[str]) -> list[int]:
    return [int(text.split("\n")[0].removeprefix("THE BOOK OF ")) for text in texts]


def test_pg19_keeps_the_hubs_own_split(hub: Hub, tmp_path: Path) -> None:
    train, val = documents_of("--preset", "victorian", out=tmp_path / "out")
    assert (numbers(train), numbers(val)) == (list(range(21)), list(range(70, 77)))
    paragraph = paragraphs(30, seed=3)[0]
    assert train[3].startswith(f"THE BOOK OF 3\n\n{paragraph}\n\n") and train[3].endswith("\n\nThe end of 3.\n")
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.source.name == "pg19"
    assert {name: manifest.cleaning[name] for name in ("illustrations", "italics", "unwrapped_documents")} == {
        "illustrations": 28,
        "italics": 28,
        "unwrapped_documents": 28,
    }
    assert not any("test-" in path for path in hub.asked)
    train, val = documents_of("--preset", "victorian", "--validate-on", "test", out=tmp_path / "tested")
    assert (numbers(train), numbers(val)) == (list(range(21)), [90, 91, 92])


def test_the_hubs_files_fetched_by_hand_keep_their_parts(hub: Hub, tmp_path: Path) -> None:
    for name, data in hub.sets["emozilla/pg19"]["main"].items():
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    train, val = documents_of("--preset", "victorian", "--input", tmp_path / "data", out=tmp_path / "out")
    assert (numbers(train), numbers(val)) == (list(range(21)), list(range(70, 77)))
    assert not hub.asked
    (tmp_path / "my test.txt").write_text("A text of one's own. " * 9, encoding="utf-8")
    train, val = documents_of("--input", tmp_path / "my test.txt", out=tmp_path / "own")
    assert len(train) == 1


def test_years_are_filtered_in_every_part(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = documents_of("--preset", "victorian", "--years", "1837-1901", out=tmp_path / "out")
    assert numbers(train) == [number for number in range(21) if 1837 <= YEARS[number % 7] <= 1901]
    assert numbers(val) == [72, 73, 74]
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.cleaning["documents_of_other_years"] == 16 and manifest.source.documents == 12
    assert run("--preset", "story-nano", "--years", "1837-1901", "--out", tmp_path / "none") == 1
    assert "--years needs a field 'publication_date' (it has text)" in capsys.readouterr().err
    assert run("--preset", "victorian", "--years", "long ago", "--out", tmp_path / "none") == 2


def test_tinystories_are_mended_and_told_once(hub: Hub, sets: dict, tmp_path: Path) -> None:
    train, val = documents_of("--preset", "story-nano", out=tmp_path / "out")
    assert len(val) == 6 and SAD in val
    # train: 20 + 15 new ones; the copy of tales[3], ten of tales[10:20], tales[38] and the mended SAD are told elsewhere
    assert len(train) == 35 == len(set(train)) and not set(train) & set(val)
    cleaning = Manifest.load(tmp_path / "out").cleaning
    assert cleaning == {"duplicate_documents": 13, "empty_documents": 1}
    train, val = documents_of("--preset", "story-nano", "--no-drop-duplicates", out=tmp_path / "all")
    assert train.count(SAD) == 1 and len(train) == 48
    assert Manifest.load(tmp_path / "all").cleaning == {"mojibake_documents": 1, "empty_documents": 1}
    train, _ = documents_of("--source", "tinystories", out=tmp_path / "named")
    assert len(train) == 35
    train, _ = documents_of("--preset", "story-nano", "--no-drop-duplicates", "--no-fix-mojibake", out=tmp_path / "raw")
    assert SAD not in train and any("â€œIt" in text for text in train)


def test_any_data_set_of_the_hub(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = documents_of("--hub", "someone/poems", "--text-field", "verse", out=tmp_path / "poems")
    assert len(train) + len(val) == 9 and len(val) == 1
    train, val = documents_of("--hub", "someone/rows", out=tmp_path / "rows")
    assert len(train) + len(val) == 40 and len(val) == 4
    train, val = documents_of("--source", "someone/loose", out=tmp_path / "loose")
    assert len(train) + len(val) == 9
    documents_of("--hub", "someone/many", "--hub-config", "large", out=tmp_path / "many")
    train, val = documents_of("--hub", "someone/folders", out=tmp_path / "folders")
    assert (len(train), len(val)) == (9, 3)
    faults = [
        (["someone/poems"], 1, "no field 'text' (it has verse, poet): name one with --text-field"),
        (["someone/gone"], 2, f"--hub someone/gone: no such data set at {hub.url}"),
        (["someone/many"], 2, "choose one with --hub-config large | small"),
        (["someone/many", "--hub-config", "tiny"], 2, "--hub-config tiny: --hub someone/many has large, small"),
        (["someone/nothing"], 2, "no .txt, .jsonl, .parquet files at"),
        (["someone/rows", "--hub-revision", "v9"], 2, "correct --hub-revision"),
        (["someone/rows", "--validate-on", "test"], 2, "--validate-on test: this data set has train only"),
        (["not a name"], 2, "give pg19, tinystories, tinyshakespeare or OWNER/NAME"),
    ]
    for arguments, code, message in faults:
        capsys.readouterr()
        assert run("--hub", *arguments, *CHAR, "--out", tmp_path / "none") == code
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_busy_hub_and_a_broken_download(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    calm = tmp_path / "calm"
    assert run("--preset", "victorian", *CHAR, "--out", calm) == 0
    whole = len(hub.sets["emozilla/pg19"]["main"]["data/train-00000-of-00002.parquet"])
    assert whole > 20_000
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # what arrived in whole chunks is kept
    hub.busy, hub.cuts = 3, 2
    assert run("--preset", "victorian", *CHAR, "--out", tmp_path / "rough") == 0
    assert "trying again" in capsys.readouterr().err
    assert (hub.busy, hub.cuts) == (0, 0)
    assert hub.ranges, "a broken download begins anew instead of going on"
    assert hashes(tmp_path / "rough") == hashes(calm)


def test_what_killed_downloads_left_is_removed(hub: Hub, tmp_path: Path) -> None:
    fetch("someone/rows", HubSelection())
    blobs = next((tmp_path / "cache").rglob("blobs"))
    for name in ("old.1.incomplete", "new.2.incomplete"):
        (blobs / name).write_bytes(b"part")
    os.utime(blobs / "old.1.incomplete", (0, 0))
    fetch("someone/rows", HubSelection())
    assert [path.name for path in blobs.glob("*.incomplete")] == ["new.2.incomplete"]


def test_without_a_network(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    from huggingface_hub import constants

    first = fetch("pg19", HubSelection())
    asked = sum(hub.asked.values())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("pg19", HubSelection()) == first
    with pytest.raises(SourceError, match=r"--source tinystories: HF_HUB_OFFLINE is set .* take files of your own"):
        fetch("tinystories", HubSelection())
    assert sum(hub.asked.values()) == asked
    first[2].path.unlink()  # one of two training files
    with pytest.raises(SourceError, match="not whole"):
        fetch("pg19", HubSelection())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert fetch("pg19", HubSelection()) == first
    nowhere = "http://127.0.0.1:1"
    monkeypatch.setenv("HF_ENDPOINT", nowhere)
    capsys.readouterr()
    assert fetch("pg19", HubSelection()) == first
    assert "going on with what is in" in capsys.readouterr().err
    assert run("--preset", "story-nano", "--out", tmp_path / "none") == 1
    shown = capsys.readouterr().err
    assert f"--source tinystories: cannot fetch it from {nowhere}" in shown
    assert (
        "set HF_ENDPOINT to a mirror, or fetch the files elsewhere; with files of your own: `python prepare_data.py"
        in shown
    )


def test_a_data_set_that_changes_is_not_mixed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    old = fetch("someone/rows", HubSelection())
    files = {"all.jsonl": b'{"text": "changed since"}\n' * 9}
    monkeypatch.setitem(hub.sets["someone/rows"], "main", files)
    new = fetch("someone/rows", HubSelection())
    assert new[0].version != old[0].version and new[0].path.read_bytes() == files["all.jsonl"]
    listing = sources.DatasetFiles("someone/rows", "main", "0" * 40, {"all.jsonl": 1})
    with pytest.raises(SourceError, match="changed while it was fetched"):
        sources._hub_file("--hub someone/rows", listing, "all.jsonl")


def test_tiny_shakespeare_is_checked(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    play = ("FIRST CITIZEN:\nBefore we proceed any further, hear me speak.\n\nALL:\nSpeak, speak.\n\n" * 40).encode()
    hub.sets = {**hub.sets, "a/b": {"main": {"input.txt": play}}}
    url = f"{hub.url}/datasets/a/b/resolve/main/input.txt"
    good = WebFile(url, "play.txt", len(play), hashlib.sha256(play).hexdigest())
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    for wrong in (good.__class__(url, "play.txt", len(play), "0" * 64), good.__class__(url + "x", "play.txt", 1, "")):
        monkeypatch.setitem(sources.NAMED, "tinyshakespeare", wrong)
        assert run("--preset", "shakespeare-char", "--out", tmp_path / "out") == 1
        assert "or fetch it elsewhere, as play.txt" in capsys.readouterr().err
        assert not list(tmp_path.rglob("play*"))
    monkeypatch.setitem(sources.NAMED, "tinyshakespeare", good)
    hub.busy = hub.cuts = 1
    train, val = documents_of("--preset", "shakespeare-char", out=tmp_path / "out")
    assert "".join(train + val).encode() == play and len(val[0]) == len(play) - int(len(play) * 0.9)
    asked = sum(hub.asked.values())
    fetch("tinyshakespeare", HubSelection())
    assert sum(hub.asked.values()) == asked
    monkeypatch.undo()
    assert isinstance(sources.NAMED["tinyshakespeare"], WebFile)


def test_the_real_tiny_shakespeare_is_the_one_expected(shared_data: Path) -> None:
    file = sources.NAMED["tinyshakespeare"]
    data = (shared_data / "tinyshakespeare.txt").read_bytes()
    assert isinstance(file, WebFile)
    assert (len(data), hashlib.sha256(data).hexdigest()) == (file.size, file.sha256)


STOPPED = """
import os, signal, sys
import prepare_data
from corpus import encoding, preparation
from corpus.readers import parquet
from storage import shards
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is started without
parquet.ROW_BYTES, encoding.BATCH_BYTES, preparation.SAVE_SECONDS = 1000, 1, 0.0
append, calls = shards.ShardWriter.append, 0
def stop(self, tokens):
    global calls
    calls += 1
    append(self, tokens)
    if calls == int(sys.argv[1]):
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
shards.ShardWriter.append = stop
sys.exit(prepare_data.main(sys.argv[3:]))
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_interrupted_it_goes_on_and_gives_the_same_shards(how: str, hub: Hub, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_CACHE": str(tmp_path / "home"),
    }
    flags = ["--preset", "victorian", "--years", "1700-1905", "--workers", "2", "--shard-tokens", "32768"]
    flags += ["--tokenizer", "char"]

    def start(stop: int, out: Path) -> subprocess.CompletedProcess[str]:
        command = [*PYTHON, "-c", STOPPED, str(stop), how, *flags, "--out", str(out)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)

    whole, out = tmp_path / "whole", tmp_path / "out"
    done = start(0, whole)
    assert done.returncode == 0, done.stderr
    assert len(Manifest.load(whole).splits.train.shards) > 2
    stopped = start(31, out)
    assert stopped.returncode == (-signal.SIGKILL if how == "SIGKILL" else 130), stopped.stderr
    assert not out.exists()
    done = start(0, out)
    assert done.returncode == 0, done.stderr
    assert hashes(out) == hashes(whole)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("data/train-00000-of-00023.parquet", "train"),
        ("data/validation-00000-of-00001-869c898b519ad725.parquet", "validation"),
        ("default/test/0000.parquet", "test"),
        ("dev.jsonl", "validation"),
        ("en/valid_1.txt", "validation"),
        ("testing.parquet", "test"),
        ("trains-of-thought.txt", "train"),
        ("contest/latest.parquet", "train"),
        ("test/train.parquet", "train"),
        ("TEST.parquet", "test"),
    ],
)
def test_a_files_name_says_its_part(name: str, part: str) -> None:
    assert split_of(name) == part


def test_what_counts_as_a_corpus() -> None:
    assert all(map(sources.is_corpus, ["pg19", "tinystories", "tinyshakespeare", "someone/poems"]))
    assert not any(map(sources.is_corpus, ["sample", "data/*.txt", "a/b/c", ""]))


def test_every_preset_names_a_source_that_exists() -> None:
    from config import load_config, preset_names

    for name in preset_names():
        data = load_config(name).data
        if name == "finetune":  # on one's own texts
            assert data.source == ""
            continue
        assert data.source.endswith(".txt") or data.source in sources.NAMED, name
        assert all(
            getattr(data, key) == value for key, value in sources.defaults(data.source).items() if key != "tokenizer"
        )


def test_fetching_alone(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert sources.main(["--corpus", "roneneldan/TinyStories"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[1] for line in lines] == ["val", "train", "train"]
    assert all(Path(line.split("\t")[0]).is_file() for line in lines)
    assert sources.main(["--corpus", "pg19"]) == 0
    assert sources.main(["--corpus", "nonsense"]) == 2
    with pytest.raises(ConfigError):
        fetch("someone/gone", HubSelection())


def test_the_documented_commands_prepare_named_corpora(hub: Hub, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    lines = re.findall(r"^python prepare_data\.py (--(?:preset|hub) .*)$", text, re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:
        words = line.split("  #")[0].replace("OWNER/NAME", "someone/rows").split()
        if "shakespeare-char" not in words:  # its address is not the hub's
            assert run(*words, *CHAR, "--out", tmp_path / "out") == 0
