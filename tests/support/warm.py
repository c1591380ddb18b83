"""A process that has imported the large packages and forks for every command, so that none of them waits for torch.

>>> with warm(folder) as run:
...     done = run(["train.py", "--plan"], text="")          # as `python train.py --plan` in that folder
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HEAVY = (
    "torch",
    "torch._dynamo",
    "numpy",
    "pydantic",
    "tyro",
    "tiktoken",
    "tokenizers",
    "safetensors.torch",
    "pyarrow",
)
HEAVY += ("matplotlib.backends.backend_agg", "sacrebleu", "ftfy", "tqdm", "psutil", "huggingface_hub", "datasets")
SECONDS = 240  # a command may take

Run = Callable[..., subprocess.CompletedProcess]


@contextlib.contextmanager
def warm(folder: Path) -> Iterator[Run]:
    """A function that runs the words after `python` in `folder` and returns what the process printed and its exit code.

    The project's own modules are not among those imported before: each command reads those of `folder`. No GPU, one thread.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    server = subprocess.Popen(
        [sys.executable, __file__],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin and server.stdout

    def run(words: list[str], text: str = "") -> subprocess.CompletedProcess:
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / "in").write_text(text, encoding="utf-8")
            server.stdin.write(json.dumps({"words": words, "place": place}) + "\n")
            server.stdin.flush()
            code = int(server.stdout.readline() or 1)
            out, err = ((Path(place) / name).read_text(encoding="utf-8") for name in ("out", "err"))
        return subprocess.CompletedProcess(words, code, out, err)

    try:
        yield run
    finally:
        server.stdin.close()
        server.wait(timeout=SECONDS)


def child(words: list[str], place: str) -> int:
    """Run a script or, after -m, a module as the main program, its streams tied to files; returns the exit code."""
    import signal
    import traceback

    for number, (name, flags) in enumerate((("in", os.O_RDONLY), ("out", os.O_WRONLY), ("err", os.O_WRONLY))):
        os.dup2(os.open(os.path.join(place, name), flags | os.O_CREAT), number)
    signal.alarm(SECONDS)
    sys.path[0] = os.getcwd() if words[0] == "-m" else os.path.dirname(os.path.abspath(words[0]))
    code: Any = 1
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else 1


def main() -> int:
    for name in HEAVY:
        __import__(name)
    jobs, codes = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")  # the streams themselves are the commands'
    for line in jobs:
        job = json.loads(line)
        if not (pid := os.fork()):
            os._exit(child(**job))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=codes, flush=True)
    return 0


if __name__ == "__main__":
    os._exit(main())  # taking torch apart would take a second
