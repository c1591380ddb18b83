"""Who may import whom: folders import only from lower layers or from themselves, nobody imports a command, no import cycles.

Imports inside functions and under TYPE_CHECKING count as well. The layers are those of docs/architecture.md. Also
the length of functions; their branches and statements are limited by ruff (pyproject.toml).
"""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

from support.helpers import ROOT

LAYERS = (
    ("config", "cli"),
    ("model", "loss", "tokenizer", "devices", "sampling"),
    ("storage",),
    ("dataset", "checkpoint"),
    ("inference", "evaluation"),
    ("corpus", "server"),
    ("training",),
    ("prepare_data", "train", "generate", "evaluate", "api", "app", "export"),
    ("ui", "web", "sagemaker", "lambda"),
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS, 1) for name in names}
COMMANDS = 8
FRONT_DOOR = ("app", "ui")  # the only upward import: app.py starts the app in ui/
LONGEST = 80  # lines of a function
STARTERS = {"ui", "sagemaker"}  # besides tests and benchmarks: they start commands in-process


def product_files(root: Path = ROOT) -> list[Path]:
    """The Python files of the product, relative to `root`, without tests, benchmarks and scripts of docs/ and findings/."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=root, capture_output=True, text=True, check=True).stdout
    aside = ("tests/", "benchmarks/", "docs/", "findings/")
    return [Path(name) for name in listed.splitlines() if not name.startswith(aside) and (root / name).is_file()]


def imports(source: str) -> set[str]:
    """Dotted names of all modules that `source` imports anywhere, `from a import b` as both `a` and `a.b`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def arrows(sources: dict[str, str]) -> dict[str, set[str]]:
    """For each module of `sources` (name -> text) the others of them that it imports."""
    return {name: (imports(text) & set(sources)) - {name} for name, text in sources.items()}


def faults(sources: dict[str, str]) -> list[str]:
    """A message for each forbidden import and each import cycle."""
    found = []
    graph = arrows(sources)
    for name, others in sorted(graph.items()):
        folder = name.split(".")[0]
        for other in sorted(others):
            target = other.split(".")[0]
            if LAYER_OF[target] == COMMANDS and folder not in STARTERS:
                found.append(f"{name} imports the command {other}")
            elif target != folder and LAYER_OF[target] > LAYER_OF[folder] and (folder, target) != FRONT_DOOR:
                found.append(f"{name} (layer {LAYER_OF[folder]}) imports {other} (layer {LAYER_OF[target]})")
    return found + [f"import cycle: {' -> '.join(circle)}" for circle in import_cycles(graph)]


def import_cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The modules of each import cycle that a depth-first search finds."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for other in sorted(graph[name]):
                walk(other, [*path, name])
            done.add(name)

    for name in sorted(graph):
        walk(name, [])
    return found


def long_functions(source: str, limit: int = LONGEST) -> list[str]:
    """Names of the functions in `source` that take more than `limit` lines, from `def` to the last one."""
    functions = (
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= limit]


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {module_of(path): (ROOT / path).read_text(encoding="utf-8") for path in product_files()}


def test_folders_import_downwards_and_never_a_command(sources: dict[str, str]) -> None:
    assert not faults(sources), "\n".join(faults(sources))


def test_every_folder_and_file_has_a_layer(sources: dict[str, str]) -> None:
    assert {name.split(".")[0] for name in sources} <= set(LAYER_OF)


def test_the_root_holds_commands_and_core_only() -> None:
    assert len([path for path in product_files() if len(path.parts) == 1]) <= 16


def test_no_function_is_too_long() -> None:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [name for name in listed.splitlines() if (ROOT / name).is_file()]
    found = {f"{path}: {name}" for path in paths for name in long_functions((ROOT / path).read_text(encoding="utf-8"))}
    assert not found


def test_a_long_function_is_named() -> None:
    body = "    x = 1\n" * 3
    assert long_functions(
        f"def f():\n{body}\nclass C:\n    async def g(self):\n        x = 1\n\n\n        y = 2", limit=3
    ) == ["f", "g"]
    assert long_functions(f"def f():\n{body}", limit=4) == []


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"training.plan": "def f():\n    from train import main"}, "training.plan imports the command train"),
        ({"model": "from storage import atomic"}, "model (layer 2) imports storage (layer 3)"),
        (
            {"storage.atomic": "import storage.shards", "storage.shards": "if 1:\n import storage.atomic"},
            "import cycle: ",
        ),
    ],
)
def test_a_forbidden_import_is_named(sources: dict[str, str], changed: dict[str, str], fault: str) -> None:
    assert any(fault in found for found in faults(sources | changed))
