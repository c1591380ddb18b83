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


@pytest.mark.parametrize("name", ["sagemaker/Dockerfile", "lambda/Dockerfile", "Dockerfile"])
def test_what_an_image_copies_is_there_and_sent_to_docker(name: str) -> None:
    text = (ROOT / name).read_text()
    sent = {line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    for source in re.findall(r"^COPY (?:--chown=\S+ )?((?!--from)\S+)", text, re.MULTILINE):
        assert source == "." or (list(ROOT.glob(source)) and source in sent), source
    assert re.search(r'ENTRYPOINT \["', text), "signals must reach the process: exec form"
    assert "FROM python:3.11-slim" in text and ":latest" not in text


# Runs the words after it as a program that can import nothing but the packages of a requirements file, and theirs.
ONLY = """
import importlib.metadata as metadata, re, runpy, sys
from packaging.requirements import Requirement
todo = [Requirement(line.split("#")[0].strip()) for line in open(sys.argv[1]) if line.split("#")[0].strip()]
allowed = set()
while todo:
    wanted = todo.pop()
    name = re.sub("[-_.]+", "-", wanted.name.lower())
    if (name, *wanted.extras) in allowed:
        continue
    allowed.add((name, *wanted.extras))
    for text in metadata.distribution(name).requires or []:
        more = Requirement(text)
        if more.marker is None or any(more.marker.evaluate({"extra": extra}) for extra in ["", *wanted.extras]):
            todo.append(more)
names = {name for name, *_ in allowed}
owners = metadata.packages_distributions()
class Refuse:
    def find_spec(self, name, path=None, target=None):
        found = owners.get(name.split(".")[0])
        if found and not {re.sub("[-_.]+", "-", owner.lower()) for owner in found} & names:
            raise ModuleNotFoundError(f"{name} is not in the image", name=name)
sys.meta_path.insert(0, Refuse())
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_only(requirements: str, *words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ONLY, ROOT / requirements, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120
    )


def test_an_image_that_writes_needs_no_more_than_its_requirements(tmp_path: Path) -> None:
    """The server answers and the worker in Lambda writes where only requirements-write.txt is installed."""
    model = save(tmp_path / "model", random_model(shape(tiny_tokenizer())), tiny_tokenizer())
    script = tmp_path / "both.py"
    script.write_text(
        "import sys, asyncio; sys.path[:0] = ['lambda', '.']\n"
        "from pathlib import Path\n"
        "import importlib\n"
        "for path in sorted(Path('server').rglob('*.py')) + sorted(Path('inference').glob('*.py')):\n"
        "    if path.name not in ('__init__.py', 'terminal.py', 'candidates.py', 'kernels.py', 'vectors.py'):\n"
        "        importlib.import_module('.'.join(path.with_suffix('').parts))\n"
        "import api; api.create_app()\n"
        "import writer, relay\n"
        "reader = relay.Reader(lambda reader: [])\n"
        "said = list(writer.messages(None, {'prompt': 'It', 'max_tokens': 3}, 'trace', reader))\n"
        "assert said[-1]['type'] == 'complete', said\n"
        "try:\n"
        "    import streamlit\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error)\n"
    )
    done = run_only("requirements-write.txt", script, MODEL_FOLDER=str(model))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "streamlit is not in the image"


def test_the_images_requirements_are_those_of_the_whole() -> None:
    pinned = (ROOT / "requirements.txt").read_text().splitlines()
    heavy = ("streamlit", "datasets", "pandas", "matplotlib", "tensorboard", "pyarrow", "sacrebleu")
    for line in (ROOT / "requirements-write.txt").read_text().splitlines():
        assert line.startswith("#") or line in pinned, line
        assert not line.startswith(heavy)


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
