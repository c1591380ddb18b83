"""Who may import whom: rooms import only from lower floors or from themselves, nobody imports a command, no circles.

Imports inside functions and under TYPE_CHECKING count as well. The floors are those of docs/architecture.md. And how long
a function may be; how many branches and statements it may have is ruff's to say (pyproject.toml).
"""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

from support.helpers import ROOT

FLOORS = (
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
FLOOR_OF = {name: number for number, names in enumerate(FLOORS, 1) for name in names}
COMMANDS = 8
FRONT_DOOR = ("app", "ui")  # the app's command is the way into its folder
LONGEST = 80  # lines of a function
STARTERS = {"ui", "sagemaker"}  # besides tests and benchmarks: they start commands in-process


def product_files(root: Path = ROOT) -> list[Path]:
    """The Python files of the product, relative to `root`, without tests, benchmarks and what draws pictures."""
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
    """Each import that the rules forbid, and each circle, in words."""
    found = []
    graph = arrows(sources)
    for name, others in sorted(graph.items()):
        room = name.split(".")[0]
        for other in sorted(others):
            target = other.split(".")[0]
            if FLOOR_OF[target] == COMMANDS and room not in STARTERS:
                found.append(f"{name} imports the command {other}")
            elif target != room and FLOOR_OF[target] > FLOOR_OF[room] and (room, target) != FRONT_DOOR:
                found.append(f"{name} (floor {FLOOR_OF[room]}) imports {other} (floor {FLOOR_OF[target]})")
    return found + [f"circle: {' -> '.join(circle)}" for circle in circles(graph)]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """One way around for each circle that a depth-first walk meets."""
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


def test_rooms_import_downwards_and_never_a_command(sources: dict[str, str]) -> None:
    assert not faults(sources), "\n".join(faults(sources))


def test_every_folder_and_file_has_a_floor(sources: dict[str, str]) -> None:
    assert {name.split(".")[0] for name in sources} <= set(FLOOR_OF)


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
        ({"model": "from storage import atomic"}, "model (floor 2) imports storage (floor 3)"),
        ({"storage.atomic": "import storage.shards", "storage.shards": "if 1:\n import storage.atomic"}, "circle: "),
    ],
)
def test_a_forbidden_import_is_named(sources: dict[str, str], changed: dict[str, str], fault: str) -> None:
    assert any(fault in found for found in faults(sources | changed))
