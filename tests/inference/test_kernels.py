"""The compiled forward step: the numbers of the plain forward pass, in every shape and format, on any number of threads."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from config import load_config, preset_names
from inference import compiled, kernels, quantize, vectors
from inference.compiled import CompiledStep
from inference.quantize import prepare
from model import GPT
from support.tiny_models import random_model, shape, some_ids, tiny_tokenizer


def step_of(model: GPT, threads: int = 1) -> CompiledStep:
    return CompiledStep(model, compiled.load_kernels(), threads)


def read_in_parts(model: GPT, ids: list[int], parts: list[int], threads: int = 1) -> np.ndarray:
    """Logits [T, N] after every token, read in parts of so many tokens, in turns."""
    step, cache, found, at = step_of(model, threads), model.new_cache(3, torch.float32), [], 0
    while at < len(ids):
        part = ids[at : at + parts[len(found) % len(parts)]]
        found.append(step(cache, part, [1] * len(part)).copy())
        at += len(part)
    assert cache.length == [0, len(ids), 0]
    return np.concatenate(found)


ROOT = Path(compiled.__file__).parent.parent
FORMS: list[dict[str, Any]] = [
    {},
    {"tied_head": False, "bias": False, "positions": "sinusoidal"},
    {"padding": 9, "positions": "sinusoidal"},
    {"bias": False, "n_head": 1, "n_embd": 30},  # numbers that fill no vector
    {"n_layer": 1, "n_head": 3, "n_embd": 201},
    {"n_head": 2, "n_embd": 256},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_position_has_the_logits_of_the_plain_forward_pass(form: dict[str, Any]) -> None:
    model = random_model(shape(tiny_tokenizer(), **{"block_size": 40, "n_embd": 64, **form}))
    ids = some_ids(model.config)[0, :40].tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([ids]))[0].numpy()
    found = read_in_parts(model, ids, [1])
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-4 * max(1.0, expected.std())
    for parts, threads in (([40], 1), ([3, 1, 9], 1), ([7, 2], 2), ([40], 3)):
        assert np.array_equal(read_in_parts(model, ids, parts, threads), found)  # the very bits


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_rounded_weights_are_read_as_they_are_stored(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 and bfloat16: as float32 weights of the same values. int8: the activations are rounded as well."""
    model = random_model(shape(tiny_tokenizer(), block_size=40, n_embd=96, n_layer=2, padding=3))
    ids = some_ids(model.config)[0, :40].tolist()
    monkeypatch.setattr(quantize, "native_bf16", lambda device: False)  # torch widens the weights to float32
    assert prepare(model, dtype) == (dtype, "")
    with torch.inference_mode():
        expected = model(torch.tensor([ids]))[0].numpy()
    found = read_in_parts(model, ids, [1])
    off = np.abs(found - expected)
    assert (
        off.max() < 1e-4 * max(1.0, expected.std())
        if dtype != "int8"
        else np.sqrt((off**2).mean()) < 0.05 * expected.std()
    )
    for parts, threads in (([40], 1), ([3, 1], 2)):
        assert np.array_equal(read_in_parts(model, ids, parts, threads), found)


def test_every_preset_has_a_head_size_that_the_kernels_read() -> None:
    """One layer of each preset's shape, with a short context: learned and sinusoidal, narrow and wide."""
    seen = set()
    for name in preset_names():
        config = load_config(name).model
        form = {"n_head": config.n_head, "n_embd": config.n_embd, "bias": config.bias, "positions": config.positions}
        if tuple(form.values()) in seen:
            continue
        seen.add(tuple(form.values()))
        model = random_model(shape(tiny_tokenizer(), block_size=8, n_layer=1, tied_head=config.tied_head, **form))
        ids = some_ids(model.config)[0, :8].tolist()
        with torch.inference_mode():
            expected = model(torch.tensor([ids]))[0].numpy()
        assert np.abs(read_in_parts(model, ids, [5, 1]) - expected).max() < 1e-4 * max(1.0, expected.std()), name
    assert len(seen) > 2


def test_a_full_slot_is_refused() -> None:
    model = random_model(shape(tiny_tokenizer(), block_size=16, n_embd=32))
    step, cache = step_of(model), model.new_cache(1, torch.float32)
    step(cache, list(range(15)), [0] * 15, last=1)
    with pytest.raises(ValueError, match="a slot is full at 16 tokens"):
        step(cache, [1, 2], [0, 0])
    assert cache.length == [15] and step(cache, [1], [0]).shape == (1, model.config.tokens)


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("inside", [7, 96, 1000])
def test_integer_sums_are_exact(inside: int, vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Largest numbers of both signs: nothing saturates, with the processor's 8-bit sums and without."""
    if vnni and vectors.VNNI is None:
        pytest.skip("this processor has no 8-bit sums")
    monkeypatch.setattr(vectors, "VNNI", vectors.VNNI if vnni else None)
    dots = vectors.make_dots(2, 4)
    from numba import njit

    run = njit(lambda w, x, y: dots(np.int8(0), w, inside, x, inside, inside, y, 4, 0, 0))
    generator = np.random.default_rng(1)
    w = generator.choice(np.array([-127, 127, 3], dtype=np.int8), (4, inside))
    w[0] = 127
    numbers = generator.choice(np.array([-127, 127, 50]), (2, inside))
    numbers[0] = -127
    x = (numbers + 128).astype(np.uint8) if vnni else numbers.astype(np.int16)
    y = np.zeros((2, 4), dtype=np.int32)
    run(w.ctypes.data, x.ctypes.data, y.ctypes.data)
    assert np.array_equal(y, (numbers + (128 if vnni else 0)) @ w.astype(np.int64).T)


def test_exp_and_gelu() -> None:
    x = np.linspace(-100, 90, 20_001, dtype=np.float32)
    inside = (x > -87) & (x < 88)
    found = np.array([kernels.exp(value) for value in x])
    assert np.abs(found[inside] / np.exp(x[inside].astype(np.float64)) - 1).max() < 3e-7
    assert found[0] < 1e-37 and np.isfinite(found).all()
    values = np.linspace(-12, 12, 4001, dtype=np.float32)
    kernels.gelu(values_in := values.copy(), 0, len(values), len(values), 1)
    expected = torch.nn.functional.gelu(torch.from_numpy(values), approximate="tanh").numpy()
    assert np.abs(values_in - expected).max() < 1e-6


def test_steps_of_several_threads_at_once() -> None:
    """Two models in one process, each with two threads of its own: neither waits for the other."""
    model = random_model(shape(tiny_tokenizer(), block_size=64, n_embd=64))
    ids = some_ids(model.config)[0, :32].tolist()
    expected = read_in_parts(model, ids, [1])
    found: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: found.append(read_in_parts(model, ids, [1], 2))) for _ in range(3)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    assert len(found) == 3 and all(np.array_equal(one, expected) for one in found)


def test_compiled_code_is_kept_where_that_is_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "kept"))
    folder = compiled.code_folder()
    assert folder is not None and folder.parent == tmp_path / "kept" and folder == compiled.code_folder()

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    (folder / "code").write_text("compiled")
    monkeypatch.setattr(Path, "touch", read_only)
    copy = compiled.code_folder()
    assert copy is not None and tmp_path not in copy.parents and (copy / "code").read_text() == "compiled"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "empty"))
    assert compiled.code_folder() is None


def test_code_of_another_version_or_processor_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import llvmlite.binding as llvm
    import numba

    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    first = compiled.code_folder()
    assert first is not None and not compiled.only_other_code(first)
    (first / "forward.nbc").touch()
    assert not compiled.only_other_code(first)
    with monkeypatch.context() as changed:
        changed.setattr(llvm, "get_host_cpu_name", lambda: "another")
        other = compiled.code_folder()
    assert other is not None and other != first and compiled.only_other_code(other)
    monkeypatch.setattr(numba, "__version__", "0.0.0")
    later = compiled.code_folder()
    assert later is not None and later not in (first, other) and compiled.only_other_code(later)


def test_a_new_process_takes_the_code_that_is_kept() -> None:
    """What this process compiled, the next one finds on disk; Numba counts that."""
    step_of(random_model(shape(tiny_tokenizer())))
    script = (
        "from inference import compiled; from config import ModelConfig; from model import GPT;"
        "model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=8, vocab_used=8));"
        "compiled.CompiledStep.of(model); stats = compiled.load_kernels().forward.stats;"
        "print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))"
    )
    made = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert made.stdout.split() == ["1", "0"]
