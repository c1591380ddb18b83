"""`python`, without the seconds that importing torch takes: `subprocess.run([*PYTHON, "train.py", ...])`.

A server, started by the first command that asks for it and shared by all test processes of one pytest run, imports
torch once and forks for each command. The command below stands in for it on this side of the socket: it hands over its
arguments, folder, environment and standard streams, passes signals on, and ends as the forked process ends. Killed, it
takes the forked process and its children along. Of the project itself the server imports nothing.
"""

from __future__ import annotations

import os
import sys

PYTHON = [sys.executable, "-I", "-S", os.path.abspath(__file__)]  # without site-packages: 15 ms
ADDRESS = "VLG_TEST_FORKS"  # environment variable: path of the server's socket; not set: the real interpreter runs
OWNER = "VLG_TEST_FORKS_OWNER"  # process id of the pytest run; the server ends when it has ended
PRELOAD = (
    "torch",
    "torch._dynamo",
    "torch.distributed.run",
    "torch.nn.parallel",
    "numpy",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "pydantic_settings",
    "safetensors.torch",
    "tiktoken",
    "tokenizers",
    "tyro",
)


def client() -> int:
    """Run `sys.argv[1:]` in a process forked by the server; returns its exit code, or dies of its signal."""
    import json
    import signal
    import socket

    path = os.environ.get(ADDRESS)
    if not path or not hasattr(os, "pidfd_open"):
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError:
        start_server(path)
        connection.connect(path)
    command = json.dumps({"argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}).encode()
    socket.send_fds(connection, [len(command).to_bytes(8, "big")], [0, 1, 2])
    connection.sendall(command)
    answers = connection.makefile("rb")
    child = int(answers.readline())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, _: os.kill(child, number))
    status = os.waitstatus_to_exitcode(int(answers.readline()))
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def start_server(path: str) -> None:
    """Start it and wait until it listens; whoever comes second finds it listening."""
    import fcntl
    import socket
    import subprocess

    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            socket.socket(socket.AF_UNIX).connect(path)
            return
        except OSError:
            pass
        with open(f"{path}.log", "a") as log:
            server = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), "--serve", path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                cwd="/",
            )
        assert server.stdout is not None
        if server.stdout.readline() != b"listening\n":
            raise SystemExit(f"the server of forked processes did not start: see {path}.log")


def serve(path: str) -> None:
    import importlib
    import socket

    sys.path[0:1] = []  # this folder
    for name in PRELOAD:
        importlib.import_module(name)
    draw_once()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        listener.settimeout(1.0)
        print("listening", flush=True)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        while owner_runs():
            reap()
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection:
                if os.fork() == 0:
                    listener.close()
                    os._exit(keep(connection))


def draw_once() -> None:
    """Let matplotlib find its fonts."""
    import io

    from matplotlib.figure import Figure

    Figure(layout="constrained").add_subplot().figure.savefig(io.BytesIO())


def reap() -> None:
    """Wait for what has ended, so that its processor time counts as the server's children's."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def stop_server(path: str) -> float:
    """End the server, if there is one; returns the seconds of processor time that it and its commands took."""
    import signal
    import socket
    import struct

    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(path)
        except OSError:
            return 0.0
        server = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    with open(f"/proc/{server}/stat") as stat:
        ticks = stat.read().rpartition(")")[2].split()[11:15]  # of its own and of its children: user, system
    os.kill(server, signal.SIGTERM)
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def owner_runs() -> bool:
    owner = int(os.environ.get(OWNER, 0))
    return not owner or os.path.exists(f"/proc/{owner}")


def keep(connection: object) -> int:
    """Fork the command, tell its process id and then its wait status; kill it when the other side or pytest is gone."""
    import contextlib
    import json
    import select
    import signal
    import socket

    assert isinstance(connection, socket.socket)
    connection.setblocking(True)
    head, streams, _, _ = socket.recv_fds(connection, 8, 3)
    if not head:
        return 0  # somebody looked whether the server listens
    length, content = int.from_bytes(head, "big"), b""
    while len(content) < length:
        content += connection.recv(length - len(content))
    command = json.loads(content)
    child = os.fork()
    if child == 0:
        connection.close()
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        run(command["argv"], command["cwd"], command["env"])
    for stream in streams:
        os.close(stream)
    connection.sendall(f"{child}\n".encode())
    ended = os.pidfd_open(child)
    while not (ready := select.select([ended, connection], [], [], 2.0)[0]) and owner_runs():
        pass
    if ended not in ready:
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):
        connection.sendall(f"{status}\n".encode())
    return 0


def run(argv: list[str], folder: str, environment: dict[str, str]) -> None:
    """Do what `python ARGV` does, in this process, and end it."""
    import atexit
    import contextlib
    import signal
    import threading
    import traceback

    signal.signal(signal.SIGINT, signal.default_int_handler)
    code: object = 1
    try:
        start(argv, folder, environment)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code & 255 if isinstance(code, int) else 1)  # at once: taking torch apart would take a second


def start(argv: list[str], folder: str, environment: dict[str, str]) -> None:
    import runpy

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    words = [*argv]
    while words[0] == "-u":
        words.pop(0)
    sys.path[:0] = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    if words[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *words[2:]]
        runpy_main = type(sys)("__main__")
        sys.modules["__main__"] = runpy_main
        exec(compile(words[1], "<string>", "exec"), runpy_main.__dict__)
    elif words[0] == "-m":
        sys.path.insert(0, folder)
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    else:
        sys.exit(client())
