"""export.py: every form from one command, defaults, errors that name the flag, nothing half-written."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import export
from checkpoint import load_model
from storage import gguf, web_page
from storage.atomic import atomic_file
from support.tiny_models import random_model, same_state, save, shape, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = tiny_tokenizer()
    return save(
        tmp_path / "runs" / "mine" / "best", random_model(shape(tokenizer)), tokenizer, description="Of novels."
    )


def run(folder: Path, *flags: str) -> int:
    return export.main(["--model", str(folder), *flags])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_each_form_is_named_after_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gguf import GGUFReader

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for to in ("gguf", "html"):
        assert run(folder, "--to", to) == 0
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.startswith(f"mine.{to}: 0.")
    assert names(tmp_path / "here") == ["mine.gguf", "mine.html"]
    fields = GGUFReader("mine.gguf").fields
    told = [fields[f"general.{key}"].contents() for key in ("name", "license", "description")]
    assert told == ["mine", "mit", "Of novels."]
    assert fields["general.sampling.temp"].contents() == pytest.approx(1.3)
    assert all(export.as_bytes(folder, to) == Path(f"mine.{to}").read_bytes() for to in ("gguf", "html"))
    page = Path("mine.html").read_text(encoding="utf-8")
    assert "<title>mine</title>" in page and '"licence": "mit"' in page and "Of novels." in page


def test_a_folder_for_transformers(folder: Path, tmp_path: Path) -> None:
    for dtype, kept in (("f32", True), ("auto", False)):
        out = tmp_path / dtype
        assert run(folder, "--to", "hf", "--out", str(out), "--type", dtype) == 0
        assert names(out) == names(folder)
        assert same_state(load_model(out)[0], load_model(folder)[0]) == kept


@pytest.mark.parametrize("dtype", ["auto", "f16", "f32"])
def test_a_page_holds_float16_only_where_that_is_exact_or_asked_for(folder: Path, tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "m.html"
    assert run(folder, "--to", "html", "--out", str(out), "--type", dtype) == 0
    assert ('"type": "f16"' in out.read_text(encoding="utf-8")) == (dtype == "f16")
    assert run(folder, "--to", "hf", "--out", str(tmp_path / "half")) == 0
    assert run(tmp_path / "half", "--to", "html", "--out", str(out)) == 0
    assert '"type": "f16"' in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--to is missing: gguf"),
        (("--to", "html", "--type", "q8_0"), "--type q8_0 is not for --to html: take one of f16, f32"),
        (("--to", "hf", "--type", "q8_0"), "--out is missing"),
        (("--to", "hf", "--out", "{model}"), "is the model itself"),
        (("--to", "gguf", "--folder"), "--folder is for --to html"),
    ],
)
def test_bad_flags_end_with_2(
    folder: Path, flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert run(folder, *(flag.format(model=folder) for flag in flags)) == 2
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


FORMS = {"gguf": ("gguf",), "html": ("html",), "page": ("html", "--folder"), "hf": ("hf",)}


def old(out: Path, form: str) -> dict[str, bytes]:
    """Put what an earlier export might have left at `out`; its files."""
    if form in ("gguf", "html"):
        out.write_bytes(b"old")
        return {"": b"old"}
    files = {"index.html": b"old", "model.safetensors": b"old"} if form == "page" else {"config.json": b"{}"}
    out.mkdir()
    for name, content in files.items():
        (out / name).write_bytes(content)
    return files


def held(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()} if out.is_dir() else {"": out.read_bytes()}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_no_model_ends_with_1_and_leaves_what_was_there(
    folder: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    before = old(out, form)
    assert run(tmp_path / "nothing", "--to", *FORMS[form], "--out", str(out)) == 1
    assert "no model there" in capsys.readouterr().err
    weights = folder / "model.safetensors"
    for cut in (100, weights.stat().st_size - 20):  # in the numbers, and in the header
        weights.write_bytes(weights.read_bytes()[:-cut])
        assert run(folder, "--to", *FORMS[form], "--out", str(out)) == 1
        assert "model.safetensors is damaged" in capsys.readouterr().err
    assert names(tmp_path) == ["out", "runs"] and held(out) == before


@pytest.mark.parametrize("form", FORMS)
def test_a_path_that_cannot_be_written_is_named(
    folder: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    for out in (tmp_path / "file" / "m", tmp_path / "runs", *([tmp_path / "file"] if form in ("page", "hf") else [])):
        assert run(folder, "--to", *FORMS[form], "--out", str(out)) == 1
        assert str(out) in capsys.readouterr().err
    assert names(tmp_path) == ["file", "runs"] and names(tmp_path / "runs") == ["mine"]


@pytest.mark.parametrize("form", FORMS)
def test_a_disk_that_fills_leaves_what_was_there(
    folder: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The size that a file may have stands in for the room on the disk: writing fails in the middle."""
    resource = pytest.importorskip("resource")
    out = tmp_path / "m"
    before = old(out, form)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        code = run(folder, "--to", *FORMS[form], "--out", str(out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    shown = capsys.readouterr().err
    assert code == 1 and re.search(re.escape(str(out)) + " could not be (written|saved): .* m is still there", shown)
    assert names(tmp_path) == ["m", "runs"] and held(out) == before
    assert run(folder, "--to", *FORMS[form], "--out", str(out)) == 0  # with room again it is replaced
    assert names(tmp_path) == ["m", "runs"] and held(out) != before


def test_a_page_as_a_folder_has_the_models_own_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And stands for no other folder: a site that lies there is not replaced."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for _ in range(2):
        assert run(folder, "--to", "html", "--folder") == 0
        assert capsys.readouterr().err.startswith("mine-page: 0.")
    page = tmp_path / "here" / "mine-page"
    assert names(page.parent) == ["mine-page"] and names(page) == ["index.html", "model.safetensors"]
    assert (page / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert run(folder, "--to", "html", "--folder", "--type", "f16") == 0
    assert (page / "model.safetensors").stat().st_size < 0.6 * (folder / "model.safetensors").stat().st_size
    (page / "notes.txt").write_text("mine")
    before = held(page)
    assert run(folder, "--to", "html", "--folder") == 1
    assert "mine-page holds something that is not an exported page" in capsys.readouterr().err
    assert held(page) == before


def test_a_process_that_is_stopped_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    place = tmp_path / "m"
    place.write_bytes(b"old")
    for error in (KeyboardInterrupt(), ValueError("x"), OSError(errno.ENOSPC, "No space left on device")):
        with pytest.raises(type(error)), atomic_file(place) as draft:
            draft.write_bytes(b"half")
            raise error
        assert names(tmp_path) == ["m"] and place.read_bytes() == b"old"
    with atomic_file(place) as draft:
        draft.write_bytes(b"new")
        assert place.read_bytes() == b"old"
    assert names(tmp_path) == ["m"] and place.read_bytes() == b"new"


def test_weights_beyond_float16_name_the_remedy(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer()
    model = random_model(shape(tokenizer))
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight[0, 0] = 1e6
    save(tmp_path / "huge", model, tokenizer)
    for to, kind in (("gguf", "auto"), ("html", "f16")):
        assert run(tmp_path / "huge", "--to", to, "--out", str(tmp_path / "m"), "--type", kind) == 1
        assert "take --type f32" in capsys.readouterr().err
        assert run(tmp_path / "huge", "--to", to, "--out", str(tmp_path / "m"), "--type", "f32") == 0


def test_every_tensor_of_a_page_is_the_files(folder: Path, tmp_path: Path) -> None:
    """The base64 blocks, read back, hold what GGUF holds."""
    import base64
    import json
    import re

    model, _ = load_model(folder)
    web_page.write_page(
        tmp_path / "m.html", model, tiny_tokenizer(), name="m", generation=export.GenerationParams(), card={}
    )
    page = (tmp_path / "m.html").read_text(encoding="utf-8")

    def block(name: str) -> Any:
        found = re.search(rf'id="{name}">([^<]*)</script>', page)
        assert found
        return found[1]

    listed = json.loads(block("model"))["tensors"]
    for number, (name, values) in enumerate(gguf.gguf_tensors(model)):
        assert listed[number] == {"name": name, "shape": list(values.shape), "type": "f32"}
        held = np.frombuffer(base64.b64decode(block(f"tensor-{number}")), "<f4")
        assert np.array_equal(held, values.reshape(-1))
