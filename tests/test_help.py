"""`--help` of every program: no traceback, nothing empty, each example of its docstring on a line of its own."""

from __future__ import annotations

import ast
import subprocess

import pytest

from cli import example_lines
from support.forked import PYTHON
from support.helpers import ROOT

ROOMS = ("storage", "inference", "evaluation", "corpus", "server", "training", "ui")  # run with -m
FILES = ("sagemaker", "lambda", "benchmarks")


def programs() -> list[str]:
    """What is typed behind `python`, for each file that is a program; app.py, which Streamlit runs, has a test of its own."""
    found = [path for path in ROOT.glob("*.py") if path.name != "app.py"]
    found += [path for room in (*ROOMS, *FILES) for path in ROOT.glob(f"{room}/**/*.py")]
    found = [path for path in found if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")]
    words = [path.relative_to(ROOT) for path in sorted(found)]
    return [
        f"-m {'.'.join(path.with_suffix('').parts)}" if path.parts[0] in ROOMS else path.as_posix() for path in words
    ]


def test_the_programs_are_found() -> None:
    assert {"train.py", "-m storage.s3", "sagemaker/job_entry.py", "lambda/writer.py"} <= set(programs())


@pytest.mark.parametrize("program", programs())
def test_help(program: str) -> None:
    done = subprocess.run([*PYTHON, *program.split(), "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    shown = [line.strip() for line in done.stdout.splitlines()]
    assert len(done.stdout.strip()) > 40
    path = ROOT / (program.removeprefix("-m ").replace(".", "/") + ".py" if program.startswith("-m") else program)
    documentation = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False) or ""
    if shown[0].startswith("usage:"):
        assert f"usage: {'python ' if program.startswith('-m') else ''}{program}".split("/")[-1].split()[-1] in shown[0]
        for example in filter(None, map(str.strip, example_lines(documentation).splitlines())):
            assert example in shown, f"{program} --help does not show on its own line: {example}"


@pytest.mark.parametrize(
    ("words", "command"), [((), "streamlit run app.py"), (("--model", "a b"), "streamlit run app.py -- --model 'a b'")]
)
def test_the_app_outside_streamlit_names_the_command(words: tuple[str, ...], command: str) -> None:
    done = subprocess.run([*PYTHON, "app.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"the app is started by Streamlit; type: {command}\n"


def test_the_app_lists_its_flags_outside_streamlit() -> None:
    done = subprocess.run([*PYTHON, "app.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "streamlit run app.py -- --model" in done.stdout and "--without-password" in done.stdout
