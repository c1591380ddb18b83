"""The walkthrough notebook runs from top to bottom and is stored without outputs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from support.helpers import ROOT

NOTEBOOK = ROOT / "notebooks" / "walkthrough.ipynb"


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_whole_and_holds_no_outputs() -> None:
    book = read()
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert len(code) > 8 and all(cell.outputs == [] and cell.execution_count is None for cell in code)
    for module in ("tokenizer", "prepare_data", "dataset", "model", "config", "inference.writing"):
        assert any(f"import {module}" in cell.source or f"from {module} import" in cell.source for cell in code)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WALKTHROUGH_STEPS", "6")
    monkeypatch.setenv("WALKTHROUGH_SHAKESPEARE", "no")  # no test waits for the network
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    book = read()
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 8
    text = "".join(output.get("text", "") for output in outputs)
    assert "of pure guessing 6.93" in text  # log of 1,024: the vocabulary it says it learns
    assert "and back: The old house stood alone" in text and "on stories it has never seen" in text
    assert "counting alone " in text
    assert text.count("--- temperature") == 3
    assert "Shakespeare cannot be fetched" in text and "nats a letter" in text
    line = re.search(r"counting alone: ([\d.]+); this model: ([\d.]+); together: ([\d.]+)", text)
    counted, alone, together = map(float, line.groups()) if line else (0, 0, 0)
    assert 1 < counted < 5 and together <= min(counted, alone)
