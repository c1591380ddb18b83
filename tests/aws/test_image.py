"""The endpoint's image, as far as it can be judged without Docker."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from support.helpers import ROOT
from support.tiny_models import random_model, save, shape, tiny_tokenizer

DOCKERFILE = (ROOT / "sagemaker" / "Dockerfile").read_text()


def start_script() -> str:
    """The script that the image starts with, as the Dockerfile writes it."""
    printed = re.search(r"RUN (printf .*?) > /usr/local/bin/start", DOCKERFILE, re.DOTALL)
    assert printed
    return subprocess.run(
        ["sh", "-c", printed[1].replace("\\\n", " ")], capture_output=True, text=True, check=True
    ).stdout


def test_the_start_passes_serve_on_and_gives_root_up(tmp_path: Path) -> None:
    script = start_script().replace("/app/api.py", "api.py")
    for name, body in (
        ("python", 'echo "python $@"'),
        ("setpriv", 'echo "dropped to $1" >&2; shift 3; exec "$@"'),
        ("id", "echo 0"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    done = subprocess.run(["sh", "-c", script, "start", "serve"], capture_output=True, text=True, env={"PATH": path})
    assert done.stdout == "python api.py serve\n" and "dropped to --reuid=10001" in done.stderr
    (tmp_path / "setpriv").write_text("#!/bin/sh\nexit 1\n")
    done = subprocess.run(["sh", "-c", script, "start", "serve"], capture_output=True, text=True, env={"PATH": path})
    assert done.stdout == "python api.py serve\n"


def test_the_image_needs_no_network_and_no_writable_root() -> None:
    assert "HF_HUB_OFFLINE=1" in DOCKERFILE and "gpt2_tokenizer()" in DOCKERFILE and "HOME=/tmp" in DOCKERFILE
    assert re.search(r'ENTRYPOINT \["', DOCKERFILE), "SIGTERM must reach the server: exec form"
    assert "EXPOSE 8080" in DOCKERFILE and "ARG TORCH_INDEX" in DOCKERFILE
    for source in re.findall(r"^COPY ((?!--from)\S+)", DOCKERFILE, re.MULTILINE):
        assert source in ("*.py", "requirements.txt", "pyproject.toml") or (ROOT / source).is_dir(), source


def image_files(folder: Path) -> Path:
    """What the Dockerfile copies into /app, and nothing else."""
    app = folder / "app"
    app.mkdir()
    for source in re.findall(r"^COPY ((?!--from)\S+)", DOCKERFILE, re.MULTILINE):
        for found in ROOT.glob(source):
            if found.is_dir():
                shutil.copytree(found, app / found.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(found, app)
    return app


def image_variables() -> dict[str, str]:
    """The image's ENV lines, without PATH."""
    stage = DOCKERFILE.split("FROM ")[-1].replace("\\\n", " ")
    pairs = (word.split("=", 1) for line in re.findall(r"^ENV (.*)", stage, re.MULTILINE) for word in line.split())
    return {name: value for name, value in pairs if name != "PATH"}


@pytest.mark.slow
def test_serve_starts_from_the_images_files_alone_and_writes_nowhere(tmp_path: Path) -> None:
    """The image's files and variables over a root file system that is read-only but for a folder of temporary files."""
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    seal = 'mount -t tmpfs tmpfs "$0" && mount -o remount,ro,bind / && exec "$@"'
    sealed = ["unshare", "--mount", "sh", "-c", seal, str(scratch)]
    if os.geteuid() or subprocess.run([*sealed, "true"], capture_output=True).returncode:
        pytest.skip("the root file system cannot be made read-only here (needs root and unshare)")
    app = image_files(tmp_path)
    model = save(tmp_path / "model", random_model(shape(tiny_tokenizer())), tiny_tokenizer())
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {**image_variables(), "PATH": os.environ["PATH"], "HOME": "/nonexistent", "OMP_NUM_THREADS": "1"}
    variables |= {"VLG_MODEL": str(model), "SAGEMAKER_BIND_TO_PORT": str(port), "TMPDIR": str(scratch)}
    words = [*sealed, sys.executable, str(app / "api.py"), "serve"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(words, cwd=app, env=variables, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        while not answers(f"{address}/ping"):
            assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.1)
        body = b'{"prompt": "It was", "max_tokens": 5, "seed": 1}'
        asked = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert b"generated_text" in answer.read()
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(30)
    assert code == 0, (tmp_path / "log").read_text()[-2000:]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False
