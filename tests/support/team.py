"""Processes that train as one, without torchrun: `python tests/support/team.py COUNT SCRIPT FLAGS...`

They are forked from a process that has imported torch, which takes each of torchrun's three seconds. The environment is
the one torchrun gives; when one of them fails, the others are ended.
"""

from __future__ import annotations

import os
import runpy
import signal
import socket
import sys
import traceback


def leave(script: str) -> None:
    """Run the script and end this process at once: taking torch apart would take a second."""
    code: object = 1
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def main() -> int:
    import matplotlib.backends.backend_agg  # noqa: F401
    import torch._dynamo  # noqa: F401

    count, script = int(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    family: list[int] = []
    for rank in map(str, range(count)):
        if not (child := os.fork()):
            os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            leave(script)
        family.append(child)
    worst = 0
    for _ in range(count):
        child, status = os.wait()
        family.remove(child)
        if status and not worst:
            worst = 1
            for other in family:
                os.kill(other, signal.SIGTERM)
    return worst


if __name__ == "__main__":
    os._exit(main())
