"""The pages name what exists: files, functions, links, the floors, the version, and the hooks that mirror `make lint`."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from config import read_toml
from server.settings import Settings
from support.helpers import ROOT
from test_architecture import LAYERS

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "findings/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
ARCHITECTURE = ROOT / "docs" / "architecture.md"
WRITTEN_LATER = (
    "data/",
    "runs/",
    "reports/",
    "models/",
    "originality/",
    "tensorboard/",
    "best/",
    "last/",
    "benchmarks/out/",
)


FOLDERS = {
    name.split("/")[0]
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    if "/" in name
}


def tokens(page: Path, kind: str) -> list[str]:
    """The contents of a page's inline tokens of one kind: code_inline, or the targets of link_open and image."""
    found = []
    for block in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        for part in block.children or ():
            if part.type == kind:
                found.append(
                    part.content if kind == "code_inline" else str(part.attrs.get("href", part.attrs.get("src")))
                )
    return found


@lru_cache
def names(path: Path) -> set[str]:
    """What a module defines: functions, classes, constants, and `Class.member`."""
    found: set[str] = set()

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                walk(node.body, f"{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    walk(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


def unknown(code: str) -> str:
    """What is wrong with `path.py: name` or `folder/file`, or an empty string where it exists or is no such thing."""
    path, _, name = code.partition(": ")
    if path.startswith(WRITTEN_LATER) or not re.fullmatch(r"[\w.-]+(/[\w.-]*)*", path):
        return ""
    if path.endswith(".py") or ("/" in path and path.split("/")[0] in FOLDERS):
        if not (ROOT / path).exists():
            return f"{path}: no such file"
        if re.fullmatch(r"[\w.]+", name) and name not in names(ROOT / path):
            return f"{path}: defines no {name}"
    return ""


def test_architecture_names_files_and_functions_that_exist() -> None:
    found = tokens(ARCHITECTURE, "code_inline")
    assert len([code for code in found if re.fullmatch(r"[\w/]+\.py: [\w.]+", code)]) > 40
    faults = [fault for code in found if (fault := unknown(code))]
    assert not faults, "\n".join(faults)


def test_the_drawings_name_files_and_functions_that_exist() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    drawn = re.findall(r"[\w/]+\.py: [\w.]+", "".join(re.findall(r"```mermaid\n(.*?)```", text, re.DOTALL)))
    assert len(drawn) > 15
    faults = [fault for code in drawn if (fault := unknown(code))]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("model.py: GPT.forward", ""),
        ("model.py: GPT.backward", "defines no GPT.backward"),
        ("corpus/nothing.py", "no such file"),
        ("nothing.py: main", "no such file"),
        ("docs/guide.md", "no such file"),
        ("data/mine", ""),
        ("app.py: PAGES", ""),
    ],
)
def test_a_name_that_does_not_exist_is_found(code: str, fault: str) -> None:
    assert fault in unknown(code) and bool(unknown(code)) == bool(fault)


def test_the_other_pages_name_files_that_exist() -> None:
    former = {"sources.py", "originality.py", "s3.py", "docs/guide.md"}
    code = [(page, code) for page in PAGES for code in tokens(page, "code_inline")]
    code = [(page, code) for page, code in code if page.name != "CHANGELOG.md" or code not in former]
    faults = [f"{page.name}: {unknown(code)}" for page, code in code if unknown(code)]
    assert not faults, "\n".join(faults)


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for link in tokens(page, "link_open") + tokens(page, "image"):
            if not re.match(r"\w+:|#", link):
                assert (page.parent / link.split("#")[0]).exists(), f"{page.name}: {link}"


def test_the_picture_shows_the_floors_of_the_import_rule() -> None:
    drawn = re.findall(r'F(\d)\["\1 · (.*?)"\]', ARCHITECTURE.read_text(encoding="utf-8"))
    assert [tuple(names.split(" · ")) for _, names in drawn] == list(LAYERS)


def test_the_readme_is_short_and_shows_each_folder() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert not [name for name in FOLDERS if not name.startswith(".") and f"{name}/" not in text]


def test_the_version_stands_in_one_place() -> None:
    from api import create_app

    version = read_toml(ROOT / "pyproject.toml")["project"]["version"]
    assert create_app(Settings()).version == version
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1] == version  # type: ignore[index]
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        assert f'"{version}"' not in path.read_text(encoding="utf-8"), path


def test_the_hooks_before_a_commit_run_what_make_lint_runs() -> None:
    recipe = re.search(r"^lint:.*?\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert recipe
    lint = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines() if "mypy" not in line]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == lint and not any(hook["pass_filenames"] for hook in hooks)


def test_the_shipped_model_has_one_figure_in_bits_a_byte() -> None:
    folder = ROOT / "models" / "victorian-mini"
    held = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    bits = f"{next(part['card']['val_bpb'] for part in held.values() if isinstance(part, dict) and 'card' in part):.3f}"
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", results.split("\n## victorian-mini\n")[1], flags=re.MULTILINE)[0]
    assert re.findall(r"([\d.]+) bits (?:per|a) byte(?! more)", section) == [bits]
    for page in (folder / "README.md", ROOT / "README.md"):
        assert bits in page.read_text(encoding="utf-8"), page
