"""A model folder, unchanged, in other programs: each writes what generate.py writes.

transformers is compared in test_gpt2_format.py. llama.cpp is compiled for that: `pytest tests/test_elsewhere.py --optin`.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint import load_model
from config import GenerationParams
from generate import generate
from tiny_models import TEXT, random_model, save, shape, tiny_tokenizer
from tokenizer import train_bpe

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
    script = ["-m", "ctranslate2.converters.transformers", "--model", folder, "--output_dir", tmp_path / "made"]
    made = subprocess.run([sys.executable, *map(str, script)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    prompt, text = ours(folder)
    _, tokenizer = load_model(folder)
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    generator = ctranslate2.Generator(str(tmp_path / "made"))
    found = generator.generate_batch(
        [theirs.convert_ids_to_tokens(prompt)], max_length=24, sampling_topk=1, include_prompt_in_result=False
    )
    assert text and tokenizer.decode(found[0].sequences_ids[0]) == text


@pytest.mark.optin
def test_llama_cpp_writes_the_same(folder: Path, tmp_path: Path) -> None:
    """llama.cpp and its converter out of the source package of llama-cpp-python, which pip compiles for minutes."""
    llama_cpp = pytest.importorskip("llama_cpp")
    converter = next(Path(p).parent for p in [importlib.util.find_spec("llama_cpp").origin]) / "convert_hf_to_gguf.py"
    gguf = tmp_path / "model.gguf"
    made = subprocess.run(
        [sys.executable, str(converter), str(folder), "--outfile", str(gguf), "--outtype", "f32"],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    prompt, text = ours(folder)
    _, tokenizer = load_model(folder)
    model = llama_cpp.Llama(str(gguf), n_ctx=64, verbose=False)
    model.eval(prompt)
    ids = []
    for _ in range(24):
        ids.append(model.sample(temp=0.0, repeat_penalty=1.0))
        model.eval(ids[-1:])
    assert tokenizer.decode(ids) == text
