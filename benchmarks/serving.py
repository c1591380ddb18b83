"""Tokens a second through the server, with one user and with several: the server's processor time, and the wall.

    python benchmarks/serving.py --seconds 60
    python benchmarks/serving.py --users 1 16 --beside ../parent

Each user sends `POST /generate` with `stream` again and again and reads every event. The server runs in its own process, and
only its processor time counts, not that of the clients. Another checkout (--beside) is measured in turns with this one, so
that the ratios mean something on a busy machine as well.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
from common import ROOT, middle, report, table
from pydantic import Field

from cli import parse_flags, run_main
from config import FrozenSettings

START_S = 180.0


class Args(FrozenSettings):
    """Tokens a second through the server."""

    model: Path = ROOT / "models" / "victorian-mini"
    """Model folder."""
    users: tuple[int, ...] = (1, 16)
    """Users at the same time; one figure for each."""
    tokens: int = Field(200, ge=2, le=4096)
    """Tokens a text."""
    seconds: float = Field(60.0, gt=0)
    """Seconds to measure in all."""
    beside: Path | None = None
    """Another checkout, measured in turns with this one."""


@contextmanager
def running_server(checkout: Path, model: Path) -> Iterator[tuple[psutil.Process, int]]:
    """(process, port) of a server of one checkout, which ends with the block."""
    words = [sys.executable, "api.py", "serve", "--host", "127.0.0.1", "--port", "0", "--log-level", "info"]
    command = [*words, "--model", str(model.resolve())]
    with subprocess.Popen(command, cwd=checkout, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield psutil.Process(process.pid), port_of(process)
        finally:
            process.kill()


def port_of(process: subprocess.Popen[str]) -> int:
    """The port on which a server listens, once it is ready to write."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        for connection in psutil.Process(process.pid).net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and ready(connection.laddr.port):
                return int(connection.laddr.port)
        time.sleep(0.2)
    raise SystemExit(f"{' '.join(map(str, process.args))}: not ready after {START_S:.0f} s")  # type: ignore[arg-type]


def ready(port: int) -> bool:
    """Whether the server has its model."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def write(port: int, tokens: int, seed: int) -> int:
    """One streamed text; the number of its tokens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    body = {"prompt": "The old house stood", "max_tokens": tokens, "seed": seed, "stream": True}
    connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    last = b""
    for line in connection.getresponse():
        last = line if line.startswith(b"data: ") else last
    connection.close()
    return int(json.loads(last.removeprefix(b"data: "))["usage"]["completion_tokens"])


def run_once(server: tuple[psutil.Process, int], users: int, tokens: int, seed: int) -> tuple[float, float]:
    """(tokens a processor second of the server, tokens a wall second) of one text of each user; seeds from `seed` on.

    No seed should come twice: what a text has read before is not read again.
    """
    process, port = server
    used, begun = sum(process.cpu_times()[:2]), time.perf_counter()
    with ThreadPoolExecutor(users) as pool:
        written = sum(pool.map(lambda seed: write(port, tokens, seed), range(seed, seed + users)))
    return written / (sum(process.cpu_times()[:2]) - used), written / (time.perf_counter() - begun)


def _main(argv: list[str] | None) -> int:
    args = parse_flags(Args, argv, examples=__doc__)
    checkouts = {"this": ROOT} | ({"beside": args.beside} if args.beside else {})
    with ExitStack() as held:
        servers = {name: held.enter_context(running_server(path, args.model)) for name, path in checkouts.items()}
        found: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for name, server in servers.items():
            for users in args.users:
                run_once(server, users, 16, 0)
                found[name, users] = []
        end = time.perf_counter() + args.seconds
        while time.perf_counter() < end or len(next(iter(found.values()))) < 3:
            for (name, users), runs in found.items():
                runs.append(run_once(servers[name], users, args.tokens, 10_000 * (1 + len(runs)) + 100 * users))
    rows: list[dict[str, Any]] = [
        {
            "checkout": name,
            "users": users,
            "tokens a processor second": middle([run[0] for run in runs]),
            "tokens/s": middle([run[1] for run in runs]),
            "runs": len(runs),
        }
        for (name, users), runs in found.items()
    ]
    ratios = []
    for users in args.users if args.beside else []:
        pairs = list(zip(found["this", users], found["beside", users], strict=True))
        row: dict[str, Any] = {"users": users, "processor, this / beside": middle([a[0] / b[0] for a, b in pairs])}
        ratios.append(row | {"wall, this / beside": middle([a[1] / b[1] for a, b in pairs])})
    if ratios:
        print(table(ratios), end="\n\n")
    report("serving", rows, ratios=ratios)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 when it failed, 2 for bad flags."""
    return run_main(lambda: _main(argv))


if __name__ == "__main__":
    sys.exit(main())
