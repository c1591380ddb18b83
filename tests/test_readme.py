"""Every command that the README, the pages of docs/ and the errors show runs, in the order of the pages.

What trains or writes gets flags behind its own that make it small: shape, steps, tokens. What needs a network, a server,
an account or hours is run by hand (BY_HAND, RECORDS); of these the tests check that the program exists and knows the flags.
The commands build on each other: run them with `--dist loadfile`, or one after the other.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from corpus.preparation import PrepareFlags, default_out, own_texts_command
from support.forked import PYTHON
from support.helpers import ROOT, nonsense

SMALL = shlex.split(
    """
    --model.n-layer 1 --model.n-head 2 --model.n-embd 16 --model.block-size 16 --train.batch-size 2
    --train.tokens-per-step 0 --train.max-steps 2 --train.eval-tokens 200 --train.sample-interval 0
    --train.no-tensorboard --train.device cpu --train.epochs 0
"""
)
BY_HAND = (
    "make ",
    "python3 -m venv",
    "pip install",
    "streamlit run",
    "python api.py",
    "python prepare_data.py --preset",  # these two run against a hub in tests/corpus/test_sources.py
    "python prepare_data.py --hub",
    "python -m corpus.sources",
    "python prepare_data.py --join",  # in tests/test_prepare_data.py
    "python prepare_data.py --input /opt",
    "python -m storage.s3",
    "python benchmarks/",
    "python sagemaker/",
    "python lambda/",
    "python tests/",
    "python -m pytest",
    "pytest ",
    "git ",
    "pre-commit ",
    "gunicorn",
    "docker ",
    "vllm ",
    "hf ",
    "curl ",
    "llama-server ",
    "lm-eval ",
    "aws ",
    "export ",
    "npx ",
    "VLG_",
    "HF_",
    "GLIBC_TUNABLES",
    "bash findings/",
)
RECORDS = ("results.md", "experiments.md", "decisions.md")  # how figures were measured: hours each
FIRST = ("README.md", "training.md", "data.md", "writing.md", "serving.md", "formats.md", "sharing.md")
SHELLS = ("", "sh", "bash")
OURS = ("python ", "torchrun ", "echo ")


def pages() -> list[Path]:
    """README and docs/, in the order in which their commands build on each other."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    return sorted(found, key=lambda page: FIRST.index(page.name) if page.name in FIRST else len(FIRST))


def whole_lines(block: str) -> list[str]:
    """The commands of a code block, without comments; a command may go over several lines."""
    found, begun = [], ""
    for line in block.splitlines():
        begun += line.split("  #")[0].strip()
        if begun.endswith("\\"):
            begun = begun[:-1]
            continue
        try:
            shlex.split(begun, posix=True)
        except ValueError:  # an open quotation
            begun += " "
            continue
        if begun and not begun.startswith("#"):
            found.append(begun)
        begun = ""
    return found


@lru_cache
def commands(page: Path) -> tuple[str, ...]:
    """The lines of a page's code blocks, and what stands inline and begins like a command."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        if (token.type == "fence" and token.info in SHELLS) or token.type == "code_block":
            found += whole_lines(token.content)
        for part in token.children or ():
            if part.type == "code_inline" and re.match(r"(python3? (-m )?[\w./]+|torchrun .*\.py) ", part.content):
                found.append(part.content)
    return tuple(found)


def runnable() -> list[str]:
    """Each command that is run here once, in the order of the pages."""
    found = [line for page in pages() if page.name not in RECORDS for line in commands(page)]
    return [line for line in dict.fromkeys(found) if line.startswith(OURS) and not line.startswith(BY_HAND)]


def checked() -> list[str]:
    """The commands of this repository's programs that are run by hand, each once."""
    found = [re.sub(r"^(\w+=\S+ )+", "", line) for page in pages() for line in commands(page)]
    return [
        line for line in dict.fromkeys(found) if line.startswith(("python ", "torchrun ")) and line not in runnable()
    ]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as a newcomer has it after one small training run, with a folder of own books."""
    folder = tmp_path_factory.mktemp("clone") / "project"
    left_out = (
        ".git",
        ".venv",
        "runs",
        "reports",
        "__pycache__",
        ".*_cache",
        "images",
        "novels",
        "tokens",
        "node_modules",
    )
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*left_out))
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


def test_the_pages_hold_commands_and_no_others_than_those_looked_after() -> None:
    assert len(runnable()) >= 25 and len(checked()) >= 25
    for page in pages():
        if page.name in (*FIRST, "CONTRIBUTING.md", "scaling.md"):
            strange = [line for line in commands(page) if not line.startswith((*OURS, *BY_HAND, ". "))]
            assert not strange, f"{page.name}: {strange}"


@pytest.mark.parametrize("line", runnable())
def test_the_command_runs(clone: Path, line: str) -> None:
    line = line.replace("…", "The old house")
    text = ""
    if line.startswith("echo "):
        said, line = line.split(" | ", 1)
        text = shlex.split(said)[1]
    words = shlex.split(line)
    if words[0] == "torchrun":  # two processes in place of eight, and the texts that are there
        words = ["tests/support/team.py", "2", *words[3:], "--data", "data/sample/tokens"]
    else:
        words = words[1:]
    if "train.py" in words and "--help" not in words:
        words = [word for word in words if word != "--resume"] + SMALL + ["--resume"] * ("--resume" in words)
    if words[0] == "evaluate.py":
        words += ["--max-tokens", "4", "--samples", "1", "--limit-tokens", "100", "--device", "cpu"]
    if words[0] == "generate.py":
        words += ["--max-tokens", "4"]
        text = text or ("The door\n/retry\n/undo\n/set temperature 0.5\n/quit\n" if "--interactive" in words else "")
    done = execute(clone, words, text)
    assert done.returncode == 0, done.stderr[-3000:]
    if words[0] == "generate.py":
        assert done.stdout.strip()


@lru_cache
def help_of(clone: Path, program: tuple[str, ...]) -> str:
    done = execute(clone, [*program, "--help"])
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.replace("_", "-")


@pytest.mark.parametrize("line", checked())
def test_a_command_run_by_hand_names_a_program_and_flags_that_exist(clone: Path, line: str) -> None:
    words = line.split()
    at = next(number for number, word in enumerate(words) if re.fullmatch(r"-m|[\w./]+\.py", word))
    program = tuple(words[at : at + 2] if words[at] == "-m" else words[at : at + 1])
    if program[1:] in (("pytest",), ("venv",)):
        return
    assert program[0] == "-m" or (ROOT / program[0]).is_file(), program[0]
    flags = {word.split("=")[0].replace("_", "-") for word in words[at + len(program) :] if re.match(r"--\w", word)}
    if flags:
        unknown = [flag for flag in flags if not re.search(rf"(?<![\w-]){flag}(?![\w-])", help_of(clone, program))]
        assert not unknown, f"{' '.join(program)} --help does not name {', '.join(unknown)}"


SOURCES = (
    "*.py",
    *(f"{room}/**/*.py" for room in ("storage", "inference", "evaluation", "corpus", "server", "training")),
)
SHOWN = re.compile(r"`((?:python|torchrun) [^`]+)`|^ {4}(python [^\n]+)$|: {2,}(python [^(\n]+)", re.MULTILINE)
# what stands for a value in an error's text -> such a value in the clone
VALUES = {
    "flag": "--tokenizer-from runs/sample/best",
    "folder": "data/remedy",
    "out": "data/remedy",
    "where": "runs/sample",
    "FOLDER": "data/remedy",
}


def shown_text(node: ast.expr) -> str:
    """A string of the source, with its placeholders filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(shown_text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return VALUES.get(ast.unparse(node.value).split(".")[-1], "")
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


@lru_cache
def remedies() -> tuple[str, ...]:
    """Each command that an error or a summary of the programs tells to type."""
    found = []
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
        parts -= {id(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)}
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in parts | docs:
                found += ["".join(groups).strip() for groups in SHOWN.findall(shown_text(node))]
    found += [own_texts_command(PrepareFlags(preset=name), default_out(name)) for name in ("story-nano", "starter")]
    found.append(own_texts_command(PrepareFlags(source="tinystories"), Path("data/fetched")))
    return tuple(sorted(dict.fromkeys(line.replace("FOLDER", VALUES["FOLDER"]) for line in found)))


def test_errors_tell_commands() -> None:
    assert len(remedies()) >= 12, remedies()


@pytest.mark.parametrize("line", [line for line in remedies() if "s3://" not in line])
def test_a_remedy_that_an_error_prints_runs(clone: Path, line: str) -> None:
    if "--data data/remedy" in line and not (clone / "data" / "remedy").is_dir():
        test_the_command_runs(clone, "python prepare_data.py --input my_books/ --out data/remedy")
    test_the_command_runs(clone, line)
