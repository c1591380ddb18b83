"""Fine-tuning: models of transformers and of the hub, other texts, a longer context, refusals."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import train
from checkpoint import load_model
from config import load_config
from dataset import TokenData
from support.forked import PYTHON
from support.helpers import ROOT, nonsense, prepare_text
from support.tiny_models import TEXT, saved_by_transformers, tiny_tokenizer
from test_train import rows, weights

SHA = "0123456789abcdef0123456789abcdef01234567"
QUICK = (
    "--train.max-steps 3 --train.eval-interval 2 --train.sample-interval 0 --train.no-tensorboard --train.device cpu"
)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 as transformers saves it, with GPT-2's kind of tokenizer, and what else lies in hub folders."""
    folder = tmp_path_factory.mktemp("hub") / "tiny-gpt2"
    saved_by_transformers(folder, tiny_tokenizer(), {})
    (folder / "pytorch_model.bin").write_bytes(b"never to be opened")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def texts(theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another corpus, in the ids of that model's tokenizer."""
    folder = tmp_path_factory.mktemp("texts")
    return prepare_text(folder, nonsense(6000, seed=4) + TEXT, "--tokenizer-from", str(theirs))


@pytest.fixture
def hub(theirs: Path) -> Iterator[tuple[str, list[str]]]:
    """A server that speaks as much of the hub's language as a download needs: its address, and what was asked."""
    asked: list[str] = []
    files = {str(path.relative_to(theirs)): path for path in sorted(theirs.rglob("*")) if path.is_file()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            asked.append(path)
            if path.startswith("/api/models/nobody/tiny-gpt2/revision/"):
                listed = [{"rfilename": name} for name in files]
                self.reply(json.dumps({"id": "nobody/tiny-gpt2", "sha": SHA, "siblings": listed}).encode())
            elif path.startswith("/api/models/nobody/tiny-gpt2/tree/"):
                tree = [
                    {"type": "file", "path": name, "size": path.stat().st_size, "oid": f"{at:040x}"}
                    for at, (name, path) in enumerate(files.items())
                ]
                self.reply(json.dumps(tree).encode())
            elif path.startswith(f"/nobody/tiny-gpt2/resolve/{SHA}/") and path.split("/", 5)[5] in files:
                self.reply(files[path.split("/", 5)[5]].read_bytes())
            else:
                self.send_error(404)

        do_HEAD = do_GET

        def reply(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hash(body):x}"')
            self.send_header("X-Repo-Commit", SHA)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_a_gpt2_of_the_hub_learns_other_texts_and_goes_back(
    hub: tuple[str, list[str]], theirs: Path, texts: Path, tmp_path: Path
) -> None:
    """The whole way: hub (another address by HF_ENDPOINT), our training, transformers."""
    address, asked = hub
    out = tmp_path / "run"
    words = ["train.py", "--init-from", "nobody/tiny-gpt2", "--data", str(texts), "--out", str(out), *QUICK.split()]
    there = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [*PYTHON, *words], cwd=ROOT, env=os.environ | there, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    got = {path.split("/", 5)[5] for path in asked if "/resolve/" in path}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= got
    assert not [name for name in got if name.endswith(".bin") or "/" in name]
    settings = train.read_args(["--resume", "--out", str(out)])[1]
    assert (settings.train.lr, settings.train.epochs) == (3e-5, 3.0)  # preset finetune, without a word
    assert (settings.model.n_layer, settings.model.block_size) == (2, 24)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = AutoModelForCausalLM.from_pretrained(theirs).eval()
    after = AutoModelForCausalLM.from_pretrained(out / "best").eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(out / "best").encode(TEXT)[:24]])
    assert ids.tolist()[0] == tiny_tokenizer().encode(TEXT)[:24]
    moved = (after(ids).logits - before(ids).logits).abs().max()
    assert 0 < moved < 0.05
    model, _ = load_model(out / "best")
    torch.testing.assert_close(after(ids).logits, model(ids), atol=1e-4, rtol=0)


def test_it_goes_on_where_the_other_stopped(theirs: Path, texts: Path, tmp_path: Path) -> None:
    flags = [*QUICK.split(), "--init-from", str(theirs), "--train.log-interval", "1", "--train.lr", "1e-9"]
    assert train.main(["--data", str(texts), "--out", str(tmp_path / "a"), *flags]) == 0
    from transformers import AutoModelForCausalLM

    before = AutoModelForCausalLM.from_pretrained(theirs).eval()
    val = TokenData.open(texts).val
    ids = torch.from_numpy(val.read(0, len(val)).astype("int64"))
    nats, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 24):
            part = ids[None, start : start + 25]
            found = before(part[:, :-1]).logits
            nats += float(torch.nn.functional.cross_entropy(found[0], part[0, 1:], reduction="sum"))
            count += part.size(1) - 1
    assert rows(tmp_path / "a", "val_loss")[0]["val_loss"] == pytest.approx(nats / count, abs=1e-3)


def test_a_longer_context_and_another_dropout(theirs: Path, texts: Path, tmp_path: Path) -> None:
    flags = ["--init-from", str(theirs), "--model.block-size", "40", "--model.dropout", "0.3", "--train.lr", "1e-9"]
    assert train.main(["--data", str(texts), "--out", str(tmp_path / "a"), *QUICK.split(), *flags]) == 0
    table, before = weights(tmp_path / "a")["transformer.wpe.weight"], load_model(theirs)[0].wpe.weight
    assert table.shape == (40, 16)
    torch.testing.assert_close(table[:24], before, atol=1e-6, rtol=0)
    torch.testing.assert_close(table[24:36], before[12:], atol=1e-6, rtol=0)
    assert load_model(tmp_path / "a/best")[0].config.dropout == 0.3


def test_what_does_not_fit_is_refused(
    theirs: Path, texts: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--init-from", str(theirs), "--out", str(tmp_path / "a"), *QUICK.split()]
    assert train.main([*words, "--data", str(tiny_data)]) == 2
    said = capsys.readouterr().err
    assert "its tokenizer is not the one of" in said and f"--tokenizer-from {theirs}" in said
    assert train.main([*words, "--data", str(texts), "--model.n-layer", "3", "--model.n-embd", "32"]) == 2
    said = capsys.readouterr().err
    assert "--model.n-layer 3: --init-from" in said and "has 2: leave it out" in said and "--model.n-embd 32" in said
    assert train.main(["--init-from", str(tmp_path / "none"), "--data", str(texts)]) == 2
    assert f"--init-from {tmp_path / 'none'}: no model there" in capsys.readouterr().err
    assert train.main(["--preset", "finetune", "--data", str(texts)]) == 2
    assert "--preset finetune has no model shape: give --init-from MODEL" in capsys.readouterr().err
    assert train.main(words) == 2
    assert "--preset finetune has no texts of its own: prepare yours" in capsys.readouterr().err
    assert not (tmp_path / "a" / "config.toml").exists()


def test_the_preset_is_gentler_than_training_from_scratch() -> None:
    gentle, scratch = load_config("finetune").train, load_config("shakespeare-124m").train
    assert gentle.lr <= scratch.lr / 3 and 0 < gentle.patience and gentle.epochs <= 3


def test_gpt2_s_own_tokenizer_is_named_where_it_is_missing(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizer import gpt2_tokenizer

    saved_by_transformers(tmp_path / "gpt2", gpt2_tokenizer(), {}, n_embd=8, n_layer=1, n_positions=8)
    words = ["--init-from", str(tmp_path / "gpt2"), "--data", str(tiny_data), "--out", str(tmp_path / "run")]
    assert train.main([*words, *QUICK.split()]) == 2
    assert "python prepare_data.py --input my_books/ --tokenizer gpt2" in capsys.readouterr().err
