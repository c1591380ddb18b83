"""Fixtures shared by all tests: the real texts where they lie beside the project, and tiny stand-ins."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads only cost
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--optin", action="store_true", help="also run the tests that compile or download for minutes")
    parser.addoption("--soak", default="0", help="seconds of killing and resuming in tests/test_resume.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))
        if "optin" in item.keywords and not config.getoption("--optin"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: run with --optin"))


@pytest.fixture
def shared_data() -> Path:
    """The folder of real texts beside the project; the test is skipped where it is missing."""
    if not SHARED.is_dir():
        pytest.skip("the real texts are not on this machine")
    return SHARED


def nonsense(characters: int, seed: int = 0) -> str:
    """Deterministic text of that length that looks like prose to a model: words from a small stock, in sentences."""
    words = [
        "the",
        "old",
        "house",
        "stood",
        "upon",
        "a",
        "hill",
        "and",
        "its",
        "door",
        "was",
        "shut",
        "when",
        "she",
        "came",
        "with",
        "lamp",
        "letter",
        "of",
        "his",
        "in",
        "rain",
    ]
    rng = random.Random(seed)
    text = ""
    while len(text) < characters:
        text += " ".join(rng.choice(words) for _ in range(rng.randint(3, 9))).capitalize() + rng.choice(
            [". ", "! ", ".\n"]
        )
    return text[:characters]


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of about 700 training characters: a few epochs in 20 steps."""
    return prepare_text(tmp_path_factory.mktemp("tiny"), nonsense(800))


def prepare_text(folder: Path, text: str, *flags: str) -> Path:
    """Prepare one text, by characters unless `flags` say otherwise; returns the prepared folder."""
    import prepare_data

    (folder / "text.txt").write_text(text, encoding="utf-8")
    words = ["--input", str(folder / "text.txt"), "--out", str(folder / "data"), "--workers", "1"]
    assert prepare_data.main(words + (list(flags) or ["--tokenizer", "char"])) == 0
    return folder / "data"


TINY_FLAGS = [
    "--model.n-layer",
    "2",
    "--model.n-head",
    "2",
    "--model.n-embd",
    "16",
    "--model.block-size",
    "16",
    "--model.dropout",
    "0.1",
    "--model.vocab-size",
    "0",
    "--train.batch-size",
    "4",
    "--train.warmup-steps",
    "2",
    "--train.log-interval",
    "1",
    "--train.eval-interval",
    "5",
    "--train.sample-interval",
    "0",
    "--train.checkpoint-minutes",
    "0",
    "--train.device",
    "cpu",
    "--train.no-tensorboard",
    "--train.compile",
    "off",
]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order, so that runs compare bitwise whatever else the machine does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
