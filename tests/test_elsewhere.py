"""A model folder, unchanged, in other programs: each writes what generate.py writes.

transformers is compared in test_gpt2_format.py. llama.cpp is compiled for that: `pytest tests/test_elsewhere.py --optin`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from checkpoint import load_model
from config import GenerationParams
from inference.writing import generate
from support.tiny_models import TEXT, random_model, save, shape, tiny_tokenizer
from tokenizer import gpt2_tokenizer, train_bpe

PROMPT = "It was the best"
GREEDY = GenerationParams(temperature=0, repetition_penalty=1.0, max_tokens=24)


@pytest.fixture(scope="module", params=["tied", "no bias"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never says end-of-text, as its row of the embedding is far from every other."""
    tokenizer = train_bpe([TEXT] * 4, 280) if request.param == "tied" else tiny_tokenizer()
    config = shape(tokenizer, n_layer=2, n_head=2, n_embd=64, block_size=64, bias=request.param == "tied")
    return save(tmp_path_factory.mktemp("model"), random_model(config, seed=3), tokenizer)


def ours(folder: Path) -> tuple[list[int], str]:
    model, tokenizer = load_model(folder)
    (result,) = generate(model, tokenizer, PROMPT, GREEDY)
    return tokenizer.encode(PROMPT), result.text


def test_ctranslate2_writes_the_same(folder: Path, tmp_path: Path) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2")
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(folder)).convert(str(tmp_path / "made"))
    prompt, text = ours(folder)
    _, tokenizer = load_model(folder)
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    generator = ctranslate2.Generator(str(tmp_path / "made"))
    found = generator.generate_batch(
        [theirs.convert_ids_to_tokens(prompt)], max_length=24, sampling_topk=1, include_prompt_in_result=False
    )
    assert text and tokenizer.decode(found[0].sequences_ids[0]) == text


@pytest.fixture(scope="module")
def llama_cpp_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama.cpp as the source package of llama-cpp-python carries it; the library itself compiled from it if need be."""
    folder = tmp_path_factory.mktemp("llama")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wanted = ["--no-deps", "--no-binary", "llama-cpp-python", "llama-cpp-python"]
    subprocess.run([*pip, "download", "-q", "-d", folder, *wanted], check=True)
    (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    if importlib.util.find_spec("llama_cpp") is None:
        lean = os.environ | {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF"}  # a third of the compiling, for pictures
        subprocess.run([*pip, "install", "-q", "--target", folder / "made", archive], check=True, env=lean)
        sys.path.insert(0, str(folder / "made"))
    return next(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))


@pytest.mark.optin
@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_llama_cpp_writes_the_same(llama_cpp_source: Path, tmp_path: Path, positions: str) -> None:
    """With GPT-2's vocabulary: llama.cpp knows the ways of splitting words by name, and not those of one's own."""
    tokenizer = gpt2_tokenizer()
    config = shape(tokenizer, n_layer=2, n_head=2, n_embd=64, block_size=64, positions=positions)
    folder, gguf = save(tmp_path / "model", random_model(config, seed=3), tokenizer), tmp_path / "model.gguf"
    script = [llama_cpp_source / "convert_hf_to_gguf.py", folder, "--outfile", gguf, "--outtype", "f32"]
    path = os.pathsep.join([str(llama_cpp_source / "gguf-py"), *sys.path])
    made = subprocess.run(
        [sys.executable, *map(str, script)], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert made.returncode == 0, made.stderr[-2000:]
    import llama_cpp

    prompt, text = ours(folder)
    model = llama_cpp.Llama(str(gguf), n_ctx=64, verbose=False)
    assert model.tokenize(PROMPT.encode(), add_bos=False) == prompt
    model.eval(prompt)
    ids = []
    for _ in range(24):
        ids.append(model.sample(temp=0.0, repeat_penalty=1.0))
        model.eval(ids[-1:])
    assert text and tokenizer.decode(ids) == text
