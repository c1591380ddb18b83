"""The endpoint's image, as far as it can be judged without Docker."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from conftest import ROOT

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
        assert source in ("*.py", "requirements.txt") or (ROOT / source).is_dir(), source
