"""Fixtures shared by all tests: the real texts where they lie beside the project, and tiny stand-ins."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads only cost
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--optin", action="store_true", help="also run the tests that compile or download for minutes")


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
