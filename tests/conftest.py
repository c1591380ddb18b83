"""Fixtures shared by all tests: the real texts where they lie beside the project, and tiny stand-ins."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads only cost
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from support import forked
from support.helpers import SHARED, nonsense, prepare_text
from training import metrics

# Files that take minutes come first, so that none is left to one process at the end (pytest -n N --no-loadscope-reorder).
LONGEST = (
    "test_app_browser",
    "test_readme",
    "test_ddp",
    "test_clients",
    "test_prepare_data",
    "test_resume",
    "test_autotune",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--optin", action="store_true", help="also run the tests that compile or download for minutes")
    parser.addoption("--soak", default="0", help="seconds of killing and resuming in tests/test_resume.py")


def controls(config: pytest.Config) -> bool:
    """Whether this process starts the others (pytest -n), or runs the tests itself."""
    return not hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    if controls(config):
        folder = tempfile.mkdtemp(prefix="vlg-tests-")
        os.environ |= {forked.ADDRESS: f"{folder}/forks", forked.OWNER: str(os.getpid())}
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if controls(config) and (seconds := forked.stop_server(os.environ[forked.ADDRESS])):
        terminalreporter.write_line(f"{seconds:.0f} s of processor time in forked commands, not counted by `time`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
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


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of about 700 training characters: a few epochs in 20 steps."""
    return prepare_text(tmp_path_factory.mktemp("tiny"), nonsense(800))


@pytest.fixture(scope="session", autouse=True)
def draw_losses() -> Iterator[Callable[[Path], Path | None]]:
    """Runs here draw no loss.png, which takes longer than twenty of their steps; gives the function that draws it."""
    draw = metrics.draw_losses
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "draw_losses", lambda folder: None)
        yield draw


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order, so that runs compare bitwise whatever else the machine does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
