"""Whole-or-nothing folders under every kind of interruption; tensors and nested state without pickle."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from checkpoint import load_model, load_training, newest_checkpoint, save_model, save_training
from config import ConfigError, GenerationParams, ModelConfig
from model import GPT
from storage import atomic
from storage.atomic import (
    CheckpointError,
    atomic_folder,
    exclusive_lock,
    faults,
    pack,
    present,
    recover,
    sha256,
    unpack,
    write_tensors,
)
from support.helpers import ROOT
from tokenizer import Tokenizer, char_tokenizer

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork to kill")
CHARS = char_tokenizer(["abcdef "], documents=2)
DEAD = 99_999_999  # above every system's largest process number
STEPS = ("fsync", "rename", "mkdir", "unlink", "rmdir")  # system calls at which a write can be cut off


def tiny() -> GPT:
    torch.manual_seed(0)
    return GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=CHARS.vocab_size))


def save(folder: Path, model: GPT, step: int, tokenizer: Tokenizer = CHARS) -> None:
    with torch.no_grad():
        model.wte.weight.fill_(step)
    state = {"step": step, "moments": torch.full((1000,), float(step))}
    save_training(folder, model, tokenizer, state=state, card={}, generation=GenerationParams())


def whole_step(run: Path) -> int:
    """The step of the newest checkpoint, whose weights and state must belong together."""
    said: list[str] = []
    newest = newest_checkpoint(run, said.append)
    assert newest is not None and not said, said
    state = load_training(newest)
    assert state["moments"].unique().tolist() == [state["step"]]
    assert load_model(newest)[0].wte.weight.unique().tolist() == [state["step"]]
    return int(state["step"])


def interrupt_at(monkeypatch: pytest.MonkeyPatch, count: int, act: Callable[[], None]) -> list[str]:
    """Call `act` before system call number `count` of STEPS, and before each opening of a file; returns the calls."""
    calls: list[str] = []

    def wrap(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == count:
                act()
            return call(*args, **kwargs)

        return called

    for name in STEPS:
        monkeypatch.setattr(os, name, wrap(name, getattr(os, name)))
    monkeypatch.setattr(atomic, "open", wrap("open", open), raising=False)
    return calls


def in_child(body: Callable[[], None]) -> int:
    """Run `body` in a forked process; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            body()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@needs_fork
@pytest.mark.parametrize("name", ["last", "last-000002"])
def test_sigkill_before_any_system_call_leaves_a_whole_checkpoint(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`last` is exchanged, `last-000002` comes beside `last-000001`; then the next save must clear up."""
    model, first = tiny(), "last" if name == "last" else "last-000001"
    steps_seen = set()
    for count in range(1, 200):
        run = tmp_path / str(count)
        save(run / first, model, 1)

        def body(run: Path = run, count: int = count) -> None:
            interrupt_at(monkeypatch, count, kill_self)
            save(run / name, model, 2)

        status = in_child(body)
        steps_seen.add(whole_step(run))
        assert present(run / first).is_dir()
        save(run / name, model, 3)
        assert whole_step(run) == 3
        assert sorted(path.name for path in run.iterdir()) == sorted({first, name})
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
    assert count > 15 and steps_seen == {1, 2}


def test_an_error_at_any_system_call_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, run, failures = tiny(), tmp_path / "run", 0

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save(run / "last", model, 1)
    for count in range(1, 200):
        with monkeypatch.context() as patch:
            calls = interrupt_at(patch, count, full)
            try:
                save(run / "last", model, 2)
            except OSError as error:
                assert error.errno == errno.ENOSPC and "last could not be saved: No space left" in str(error)
                failures += 1
                assert [path.name for path in run.iterdir()] == ["last"]
                assert whole_step(run) == 1 or calls[: count - 1].count("rename") == 2  # it stood already
        assert whole_step(run) in (1, 2)
        if len(calls) < count:
            break
        save(run / "last", model, 1)
        assert [path.name for path in run.iterdir()] == ["last"]
    assert failures > 15


@pytest.mark.skipif(os.name == "nt", reason="no file size limits")
@pytest.mark.parametrize("limit", [0, 100, 3000, 4100])
def test_a_disk_that_fills_up_in_the_middle_of_a_file(limit: int, tmp_path: Path) -> None:
    import resource

    model = tiny()
    save(tmp_path / "last", model, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="could not be saved: File too large; a complete last is still there"):
            save(tmp_path / "last", model, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert whole_step(tmp_path) == 1 and [path.name for path in tmp_path.iterdir()] == ["last"]


@needs_fork
def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    """A child saves without pause; it is killed some time within its second or third save."""
    model, dice = tiny(), random.Random(4)
    save(tmp_path / "last", model, 1)
    newest = 1
    for _ in range(20):
        reader, writer = os.pipe()
        began, child = time.monotonic(), os.fork()
        if child == 0:
            for step in range(newest + 1, 10**9):
                save(tmp_path / "last", model, step)
                os.write(writer, b".")
        os.read(reader, 1)  # the first is on the disk
        time.sleep(dice.uniform(0, 2 * (time.monotonic() - began)))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader), os.close(writer)
        found = whole_step(tmp_path)
        assert found > newest
        newest = found
    save(tmp_path / "last", model, newest + 1)
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_an_exception_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "m") as draft:
        (draft / "config.json").write_text("{}")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_only_leftovers_of_dead_processes_are_cleared(tmp_path: Path) -> None:
    kept = ["best", "last.tmp-1", "last-000001", "other.tmp-99999999", "last.tmp-x", "last.old-1"]
    gone = [f"last.tmp-{DEAD}", f"last-000007.tmp-{DEAD}", f"last-000001.old-{DEAD}", f"last.tmp-{os.getpid()}"]
    gone.append(f"last-000001.tmp-{os.getpid()}")
    for name in [*kept, *gone]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    (tmp_path / f"last.tmp-{DEAD - 1}").write_text("a file")
    (tmp_path / f"last-000003.old-{DEAD}").mkdir()
    with atomic_folder(tmp_path / "last", group="last") as draft:
        (draft / "config.json").write_text("new")
        recover(tmp_path, lambda name: name == "last")  # as another thread's save would: it must not touch this draft
        assert draft.exists()
        with pytest.raises(CheckpointError, match="another thread"), atomic_folder(tmp_path / "last"):
            pass
    made = ["last", "last-000003", f"last.tmp-{DEAD - 1}"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, *made])
    assert (tmp_path / "last" / "config.json").read_text() == "new"


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.toml"
    atomic.atomic_write_text(path, "old = 1\n")
    assert path.read_text() == "old = 1\n" and [*tmp_path.iterdir()] == [path]

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"config\.toml could not be written: No space left"):
        atomic.atomic_write_text(path, "new = 2\n")
    assert path.read_text() == "old = 1\n" and [*tmp_path.iterdir()] == [path]


def test_folders_that_hold_something_else_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "aunt.txt").write_text("Dear Aunt,")
    (tmp_path / "file").write_text("x")
    for name in ("letters", "file"):
        with pytest.raises(CheckpointError, match="not a model"):
            save_model(tmp_path / name, tiny(), CHARS, card={}, generation=GenerationParams())
    assert (tmp_path / "letters" / "aunt.txt").read_text() == "Dear Aunt," and len(list(tmp_path.iterdir())) == 2
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    save_model(tmp_path / "link", tiny(), CHARS, card={}, generation=GenerationParams())
    assert (tmp_path / "link").is_symlink() and load_model(tmp_path / "empty")


def test_present_finds_the_folder_or_what_stood_in_for_it(tmp_path: Path) -> None:
    assert present(tmp_path / "a") == tmp_path / "a" and present(tmp_path / "x" / "y") == tmp_path / "x" / "y"
    (tmp_path / f"a.old-{DEAD}").mkdir()
    (tmp_path / f"b.tmp-{DEAD}").mkdir()
    assert present(tmp_path / "a").name == f"a.old-{DEAD}" and present(tmp_path / "b").name == "b"
    (tmp_path / "a").mkdir()
    assert present(tmp_path / "a").name == "a"


def test_tensor_files_are_safetensors_and_their_sum_is_right(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = torch.randn(6, 4)
    kinds = [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int16, torch.int8, torch.uint8]
    tensors = {"odd": torch.arange(3, dtype=torch.uint8), "t": wide.t(), "slice": wide[1:3], "column": wide[:, 1]}
    tensors |= {str(kind): (wide * 9).to(kind) for kind in kinds}
    tensors |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "flags": wide > 0,
        "long": torch.tensor([2**62]),
    }
    digest = write_tensors(tmp_path / "x.safetensors", tensors)
    assert digest == sha256(tmp_path / "x.safetensors") and not write_tensors(tmp_path / "y", tensors, hashed=False)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in tensors.items())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    raw = (tmp_path / "x.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    assert all(header[n]["data_offsets"][0] % t.element_size() == 0 for n, t in tensors.items())
    with pytest.raises(CheckpointError, match="z: dtype torch.complex64 cannot be saved"):
        write_tensors(tmp_path / "z", {"z": torch.zeros(1, dtype=torch.complex64)})


def test_nested_state_comes_back_as_it_was() -> None:
    state = {
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "groups": [{"betas": (0.9, 0.95), "lr": 0.1}]},
        "python": random.Random(3).getstate(),
        "numbers": [1, -(2**70), 0.1 + 0.2, 1e-320, float("inf"), True, None, "“é”"],
        "a/b": torch.ones(1),
        "a": {"b": torch.zeros(1)},
        "__tensor__": "not one",
        (1, "x"): [(), [], {}],
    }
    text, tensors = pack(state)
    again = unpack(json.loads(text), tensors)
    left, right = again.pop("optimizer"), state.pop("optimizer")
    assert left["groups"] == right["groups"] and type(left["groups"][0]["betas"]) is tuple
    assert list(left["state"]) == [0, 1] and torch.equal(left["state"][0]["step"], right["state"][0]["step"])
    assert again.pop("a/b").item() == 1 and again.pop("a")["b"].item() == 0
    state.pop("a/b"), state.pop("a")
    assert again == state and [type(part) for part in again["numbers"]] == [type(part) for part in state["numbers"]]
    assert random.Random().setstate(again["python"]) is None
    assert str(unpack(json.loads(pack({"x": float("nan")})[0]), {})["x"]) == "nan"
    with pytest.raises(CheckpointError, match="state/a/1: set cannot be saved"):
        pack({"a": [1, {2}]})


def test_every_damaged_file_is_named(tmp_path: Path) -> None:
    save(tmp_path / "last", tiny(), 1)
    assert faults(tmp_path / "last") == []
    names = sorted(path.name for path in (tmp_path / "last").iterdir())
    assert len(names) == 9
    for name in names:
        path = tmp_path / "last" / name
        content = path.read_bytes()
        path.write_bytes(content[:-3])
        assert name in (said := " ".join(faults(tmp_path / "last")))
        assert f"{len(content) - 3:,} bytes instead of {len(content):,}" in said or name == "checksums.json"
        path.unlink()
        assert name in " ".join(faults(tmp_path / "last"))
        if name != "checksums.json":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 4]))
            assert name in " ".join(faults(tmp_path / "last"))
        path.write_bytes(content)
    shutil.rmtree(tmp_path / "last")
    assert faults(tmp_path / "last")


def test_a_lock_refuses_a_second_holder_and_leaves_no_file(tmp_path: Path) -> None:
    lock = tmp_path / "runs" / ".lock"
    with exclusive_lock(lock, "free"):
        with pytest.raises(ConfigError, match=r"--out runs: taken"):
            with exclusive_lock(lock, "--out runs: taken"):
                pass
        assert lock.is_file(), "the second one, refused, must not remove the lock of the first"
    assert not lock.exists()
    with pytest.raises(KeyError), exclusive_lock(lock, "free"):
        raise KeyError
    with exclusive_lock(lock, "free"):
        pass


HOLD = """
import sys, time
from pathlib import Path
from storage.atomic import exclusive_lock
with exclusive_lock(Path(sys.argv[1]), "taken"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_free_again(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, lock], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="taken"), exclusive_lock(lock, "taken"):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with exclusive_lock(lock, "taken"):
        pass
    assert not lock.exists()
