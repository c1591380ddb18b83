"""Every command that the README shows runs; `make demo` and `make test` are run by CI and by hand.

What trains or writes gets flags behind its own that make it small: shape, steps, tokens.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from support.forked import PYTHON
from support.helpers import ROOT, nonsense

SMALL = [
    "--model.n-layer",
    "1",
    "--model.n-head",
    "2",
    "--model.n-embd",
    "16",
    "--model.block-size",
    "16",
    "--train.batch-size",
    "2",
    "--train.tokens-per-step",
    "0",
    "--train.max-steps",
    "2",
    "--train.eval-tokens",
    "200",
    "--train.sample-interval",
    "0",
    "--train.no-tensorboard",
    "--train.device",
    "cpu",
    "--train.epochs",
    "0",
]
BY_HAND = (
    "make ",
    "python3 -m venv",
    "pip install",
    "streamlit run",
    "python api.py",
    "python prepare_data.py --preset",  # these two run against a hub in tests/test_sources.py
    "python prepare_data.py --hub",
    "gunicorn",
    "docker",
    "curl",
    "npx",
    "VLG_",
)


def commands() -> list[str]:
    """The lines of the README's code blocks, without comments."""
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def runnable() -> list[str]:
    found = [line for line in commands() if not line.startswith(BY_HAND)]
    found += re.findall(
        r"`((?:python|torchrun) [a-z_]+\.py[^`]*|torchrun [^`]*)`", (ROOT / "README.md").read_text(encoding="utf-8")
    )
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as a newcomer has it after one small training run, with a folder of own books."""
    folder = tmp_path_factory.mktemp("clone") / "project"
    skip = shutil.ignore_patterns(
        ".git",
        ".venv",
        "runs",
        "__pycache__",
        ".*_cache",
        "tests",
        "docs",
        "novels",
        "tokens",
        "node_modules",
    )
    shutil.copytree(ROOT, folder, ignore=skip)
    (folder / "my_books").mkdir()
    for number in range(4):
        book = folder / "my_books" / f"{('Dickens', 'Austen')[number % 2]}_Book{number}_1850.txt"
        book.write_text(nonsense(4000, number), encoding="utf-8")
        shutil.copy(book, folder / "data" / f"book{number}.txt")
    shutil.copy(folder / "my_books" / "Dickens_Book0_1850.txt", folder / "story.txt")
    done = execute(folder, ["train.py", *SMALL])
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def execute(folder: Path, words: list[str], text: str = "") -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*PYTHON, *words], cwd=folder, env=environment, input=text, capture_output=True, text=True, timeout=240
    )


def test_there_are_commands() -> None:
    assert len(runnable()) >= 10
    known = ("python ", "torchrun ", "echo ", ". ")
    assert all(line.startswith((*BY_HAND, *known)) for line in commands())


@pytest.mark.parametrize("line", runnable())
def test_the_command_runs(clone: Path, line: str) -> None:
    line = line.replace("…", "The old house")
    text = ""
    if line.startswith("echo "):
        said, line = line.split(" | ", 1)
        text = shlex.split(said)[1]
    words = shlex.split(line)
    if words[0] == "torchrun":  # two processes in place of eight, and the texts that are there
        words = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "--no-python",
            *PYTHON,
            *words[3:],
            "--data",
            "data/sample/tokens",
        ]
    else:
        words = words[1:]
    script = next(word for word in words if word.endswith(".py") and "/" not in word)
    if script == "train.py" and "--help" not in words:
        words += [*SMALL, "--resume"] if "--resume" in words else SMALL
    if "--resume" in words:
        words = [word for at, word in enumerate(words) if word != "--resume" or "--resume" not in words[:at]]
    if script == "evaluate.py":
        words += ["--max-tokens", "4", "--device", "cpu"]
    if script == "generate.py":
        words += ["--max-tokens", "4"]
        text = text or ("The door\n/retry\n/undo\n/set temperature 0.5\n/quit\n" if "--interactive" in words else "")
    done = execute(clone, words, text)
    assert done.returncode == 0, done.stderr[-3000:]
    if script == "generate.py":
        assert done.stdout.strip()
