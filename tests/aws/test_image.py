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


# Indexes of download.pytorch.org that have this version, by its release's list of wheels (cu128 ended with 2.12).
TORCH_INDEXES = {"2.13.0": {"cpu", "cu126", "cu130"}}


def test_every_torch_index_named_has_this_torch(tmp_path: Path) -> None:
    """Dockerfiles and documents name only indexes with wheels of the pinned torch; the index is asked where it answers."""
    version = re.search(r"^torch==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[1]
    named = set()
    for path in [*ROOT.rglob("*Dockerfile"), *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "docker-compose.yml"]:
        named |= set(re.findall(r"download\.pytorch\.org/whl/(\w+)", path.read_text()))
    assert named and named <= TORCH_INDEXES[version]
    try:
        socket.create_connection(("download.pytorch.org", 443), timeout=3).close()
    except OSError:
        return  # the table is all there is
    for index in sorted(named):  # --dry-run: the metadata decides, and a wheel has up to 3 GB
        asked = [sys.executable, "-m", "pip", "--isolated", "install", "--dry-run", "--no-deps", "--ignore-installed"]
        asked += [
            "--index-url",
            f"https://download.pytorch.org/whl/{index}",
            f"torch=={version}",
            "--target",
            str(tmp_path),
        ]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{index}: {done.stderr[-500:]}"


def test_a_server_told_to_use_a_gpu_does_not_start_without_one(tmp_path: Path) -> None:
    """The GPU endpoint's container is given VLG_DEVICE=cuda: with a driver too old for torch it must end, not write slowly."""
    model = save(tmp_path / "model", random_model(shape(tiny_tokenizer())), tiny_tokenizer())
    variables = {
        **os.environ,
        "VLG_DEVICE": "cuda",
        "VLG_PORT": "0",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, ROOT / "api.py", "--model", model], capture_output=True, text=True, env=variables, timeout=60
    )
    assert done.returncode == 1 and "device cuda: no usable NVIDIA GPU" in done.stderr


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
