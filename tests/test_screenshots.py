"""`docs/take_screenshots.py` writes the pictures that it was asked for, and touches no other."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from support.helpers import ROOT

OTHERS = ("write-light.png", "training.png", "sample-loss.png")


def taking(name: str) -> Any:
    """Stands in for a function that takes a picture into its third argument."""

    def take(browser: Any, place: Any, out: Path, seed: int = 0) -> None:
        from PIL import Image

        out.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").convert("RGB").save(out / name)

    return take


@pytest.mark.parametrize("words", [["--only-page"], []])
def test_only_the_pictures_that_were_taken_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("PIL")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import take_screenshots

    @contextmanager
    def no_app(runs: Path, home: Path) -> Any:
        yield "http://127.0.0.1:9"

    monkeypatch.setitem(sys.modules, "playwright.sync_api", SimpleNamespace(sync_playwright=MagicMock()))
    monkeypatch.setattr(take_screenshots, "take_page", taking("page-light.png"))
    monkeypatch.setattr(take_screenshots, "take", taking("write-light.png"))
    monkeypatch.setattr(take_screenshots, "running_app", no_app)
    out, best = tmp_path / "images", tmp_path / "runs" / "one" / "best"
    for folder in (out, best):
        folder.mkdir(parents=True)
    (best / "model.safetensors").touch()
    for name in OTHERS:
        (out / name).write_bytes(b"as it was")
    assert take_screenshots.main([*words, "--out", str(out), "--runs", str(tmp_path / "runs")]) == 0
    written = ["page-light.png"] if words else ["page-light.png", "write-light.png"]
    assert [Path(line).name for line in capsys.readouterr().out.splitlines()] == written
    assert (out / "page-light.png").read_bytes().startswith(b"\x89PNG")
    assert [name for name in OTHERS if (out / name).read_bytes() == b"as it was"] == [
        name for name in OTHERS if name not in written
    ]
