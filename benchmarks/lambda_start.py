"""A cold start: a new process up to the first token, of the model in Lambda and of the server in SageMaker's image.

python benchmarks/lambda_start.py --model models/victorian-mini

Numba is hidden from the two in Lambda, as their image has none (requirements-write.txt). Lambda's Runtime API, gateway and tables are the local stand-ins of tests/aws and lambda/local_stack.py. Processor time is
that of the started process alone; the rounds of the three are interleaved.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from common import ROOT, middle, report

sys.path[:0] = [str(ROOT), str(ROOT / "lambda"), str(ROOT / "tests" / "aws")]

from aws_fakes import RuntimeApi  # noqa: E402
from local_stack import Stack  # noqa: E402

BODY = {"prompt": "The old house stood", "max_tokens": 1, "finish_sentence": 0, "seed": 1}


def processor_s(process: subprocess.Popen[bytes]) -> float:
    """Seconds of processor time that a running process has used (Linux)."""
    fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def in_lambda(stack: Stack, hidden: str, *words: str) -> tuple[float, float]:
    """Wall and processor seconds until a new environment has answered its first request, of one token."""
    api = RuntimeApi()
    variables = {**os.environ, **stack.environment, "AWS_LAMBDA_RUNTIME_API": api.place, "PYTHONPATH": hidden}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT / "lambda",
        env=variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        if (
            "awslambdaric" in words
        ):  # no client listens: the first post finds its connection gone, after the first token
            stack.tables["requests"].items[("a" * 15 + "=", "r")] = {"request_id": {"S": "r"}}
            place = {"connection_id": "a" * 15 + "=", "management": f"{stack.aws_url}/prod", "request_id": "r"}
            event: dict[str, object] = {**place, "request": BODY}
        else:
            http = {"method": "POST", "path": "/generate"}
            headers = {"authorization": "Bearer local"}
            event = {"requestContext": {"http": http}, "headers": headers, "body": json.dumps(BODY)}
        answer = api.ask(event, 120)
        assert answer.kind == "response", answer.body
        return time.perf_counter() - began, processor_s(process)
    finally:
        process.kill()
        process.wait()
        api.close()


def server(model: Path) -> tuple[float, float]:
    """The same for `api.py serve`, over /invocations."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {**os.environ, "VLG_MODEL": str(model), "VLG_PORT": str(port), "VLG_HOST": "127.0.0.1"}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "api.py", "serve"],
        cwd=ROOT,
        env=variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            except OSError:
                time.sleep(0.05)
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", json.dumps(BODY).encode(), {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(asked, timeout=60).close()
        return time.perf_counter() - began, processor_s(process)
    finally:
        process.kill()
        process.wait()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "victorian-mini")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    model = args.model.resolve()
    limits = {"MAX_SAMPLES": "4"}  # as the template has it
    with tempfile.TemporaryDirectory() as hidden, Stack("", in_lambda=model, environment=limits) as stack:
        (Path(hidden) / "numba.py").write_text("raise ImportError\n", encoding="utf-8")
        ways: dict[str, Callable[[], tuple[float, float]]] = {
            "Lambda, plain HTTP (writer.py)": lambda: in_lambda(stack, hidden, "writer.py"),
            "Lambda, worker (awslambdaric)": lambda: in_lambda(stack, hidden, "-m", "awslambdaric", "writer.worker"),
            "SageMaker's server (api.py serve)": lambda: server(model),
            "import torch alone": lambda: alone(),
        }
        spent: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                spent[name].append(way())
    rows = [
        {"what": name, "wall s": middle([wall for wall, _ in found]), "processor s": middle([cpu for _, cpu in found])}
        for name, found in spent.items()
    ]
    report("lambda_start", rows)
    return 0


def alone() -> tuple[float, float]:
    """Wall and processor seconds of a process that imports torch and ends."""
    began, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - began, used


if __name__ == "__main__":
    sys.exit(main())
