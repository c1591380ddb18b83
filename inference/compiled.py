"""A model's forward step on CPUs through the compiled `kernels`: addresses of its weights, room to work in, threads.

    >>> step = CompiledStep.of(model)                       # None on other devices, or where Numba is not installed
    >>> cache = model.new_cache(2, torch.float32)
    >>> logits = step(cache, [17, 3], [0, 1])               # one token for each of two slots: [2, N]
    >>> logits = step(cache, ids, [0] * len(ids), last=1)   # a prompt: its ids in order, logits after the last one

The weights are the model's own, whatever their format (`quantize`): nothing is copied but biases and LayerNorms. Compiled
code is kept on disk, by Numba, for this version of the kernels and this processor.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from devices import native_bf16
from model import GPT, Block, KVCache

MIN_THREADED = 1 << 23  # numbers in all weights; below, waiting for other threads costs what they save, or far more
LONGEST = 32  # rows at most where torch is faster with more
THREADS = torch.get_num_threads()
MISSING = "Numba is not installed (pip install numba)"
TOKENS = {
    torch.float32: np.float32(0),
    torch.float16: np.uint16(0),
    torch.bfloat16: np.int16(0),
    torch.int8: np.int8(0),
}
_loading = threading.Lock()
_compiled: set[tuple[type, type]] = set()  # formats of weights and cache for which the code is in memory


def code_folder() -> Path | None:
    """Where compiled code is kept: a folder for this version and processor, None where nothing can be written.

    $NUMBA_CACHE_DIR comes before the user's cache folder. Code that lies
    there in a read-only installation is copied for this process, as Numba only reads folders that it can write.
    """
    import llvmlite.binding as llvm
    import numba
    from platformdirs import user_cache_path

    here = Path(__file__).parent
    processor = llvm.get_host_cpu_name() + llvm.get_host_cpu_features().flatten()
    version = hashlib.sha256((numba.__version__ + processor).encode())
    for name in ("candidates.py", "kernels.py", "vectors.py"):
        version.update((here / name).read_bytes())
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    folder = (Path(chosen) if chosen else user_cache_path("victorian-kernels")) / version.hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        return folder
    except OSError:
        pass
    with contextlib.suppress(OSError):
        if any(folder.iterdir()):
            copy = tempfile.mkdtemp(prefix="victorian-kernels-")
            atexit.register(shutil.rmtree, copy, ignore_errors=True)
            shutil.copytree(folder, copy, dirs_exist_ok=True)
            return Path(copy)
    return None


def only_other_code(folder: Path) -> bool:
    """Whether what is kept beside an empty `folder` was compiled by other versions or for other processors."""
    return not any(folder.rglob("*.nbc")) and any(folder.parent.rglob("*.nbc"))


@lru_cache(maxsize=1)
def load_kernels() -> Any:
    """The module `kernels`, its code kept in `code_folder`; None where Numba is missing or cannot be loaded."""
    with _loading:
        try:
            import numba
        except ImportError:
            return None
        folder = code_folder()
        numba.config.CACHE_DIR = str(folder or "")  # type: ignore[attr-defined]
        from inference import candidates, kernels

        if folder is not None:
            kernels.forward.enable_caching()
            candidates.largest.enable_caching()
        return kernels


def available(device: torch.device) -> bool:
    """Whether models on this device are read through compiled kernels."""
    return device.type == "cpu" and load_kernels() is not None


def reads_float16() -> bool:
    """Whether the kernels can read float16 weights on this processor; all with AVX2 can."""
    from inference import vectors

    return vectors.HALF


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class CompiledStep:
    """Reads tokens into a key-value cache; see above. Not safe for several threads at once."""

    def __init__(self, model: GPT, kernels: Any, threads: int = 1):
        """threads: among which outputs and heads are shared; the results do not depend on it."""
        from inference.candidates import largest

        self.config, self.kernels, self.largest = model.config, kernels, largest
        c = self.config
        self.held: list[Any] = []  # whatever the addresses below point to
        vectors: list[np.ndarray] = []

        def vector(values: Tensor | None) -> int:
            """The place of some float32 numbers in `vectors`."""
            if values is None:
                return int(kernels.NONE)
            vectors.append(values.detach().float().numpy())
            return sum(map(len, vectors[:-1]))

        def matrix(layer: Any, outputs: int | None = None) -> tuple[int, int]:
            """(address of a layer's weights, place of their scales); only of the first `outputs`."""
            weight = layer.weight.detach()[:outputs]
            if not weight.is_contiguous():
                weight = weight.contiguous()
            self.held.append(weight)
            if weight.dtype != torch.int8:
                return weight.data_ptr(), int(kernels.NONE)
            rows = weight.sum(1, dtype=torch.int32).float()
            return weight.data_ptr(), vector(torch.cat((layer.scale[: len(weight)], rows)))

        table = np.full((c.n_layer + 1, kernels.FIELDS), kernels.NONE, dtype=np.int64)
        for fields, block in zip(table, cast(Sequence[Block], model.h), strict=False):
            parts = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
            for at, layer in enumerate(parts):
                fields[kernels.ATTN + at], fields[kernels.SCALE + at] = matrix(layer)
                fields[kernels.BIAS + at] = vector(layer.bias)
            norms = (block.ln_1.weight, block.ln_1.bias, block.ln_2.weight, block.ln_2.bias)
            fields[kernels.LN_1 : kernels.LN_2_BIAS + 1] = [vector(values) for values in norms]
        table[-1, kernels.LN_1], table[-1, kernels.LN_1_BIAS] = vector(model.ln_f.weight), vector(model.ln_f.bias)
        table[-1, kernels.ATTN], table[-1, kernels.SCALE] = matrix(model.lm_head, c.tokens)
        embedding, scales = matrix(model.wte)
        positions = model._positions(0, c.block_size).detach().float().contiguous()
        self.held.append(positions)
        self.tables = np.array([embedding, scales, positions.data_ptr()], dtype=np.int64)
        self.table, self.vectors = table, np.concatenate(vectors)
        self.dtype, self.token = model.wte.weight.dtype, TOKENS[model.wte.weight.dtype]
        self.shape = (c.n_layer, c.n_head, c.head_size, c.block_size, c.tokens, model.wte.weight.element_size())
        self.threads = threads if kernels.COMPILED_BARRIER else 1
        self.team = np.zeros(34, dtype=np.int64)
        if self.threads > 1:
            self.helpers, self.leader = ThreadPoolExecutor(self.threads - 1), ThreadPoolExecutor(1)
            library, address = ctypes.CDLL(None), self.team.ctypes.data
            library.pthread_mutex_init(ctypes.c_void_p(address + 16), None)
            library.pthread_cond_init(ctypes.c_void_p(address + 16 + 128), None)
        self.rows = self.outputs = 0
        self._known: tuple[KVCache, np.ndarray] | None = None
        # Tokens of a prompt read at once; torch reads more of them faster where it multiplies matrices in bfloat16.
        fast = (
            self.dtype != torch.float32 and model.num_parameters() >= MIN_THREADED and native_bf16(torch.device("cpu"))
        )
        self.longest = LONGEST if fast else c.block_size
        self._compile()

    @classmethod
    def of(cls, model: GPT) -> CompiledStep | None:
        """The compiled step of a model on a CPU, on several threads if it is large; None where there is none."""
        weight = model.wte.weight
        kernels = load_kernels() if weight.device.type == "cpu" and weight.dtype in TOKENS else None
        if kernels is None:
            return None
        return cls(model, kernels, THREADS if model.num_parameters() >= MIN_THREADED else 1)

    def _compile(self) -> None:
        """Have the code for this format ready; says so if that takes long."""
        formats = (type(TOKENS[self.dtype]), np.float32)
        with _loading:
            if formats in _compiled:
                return
            path = self.kernels.forward.stats.cache_path
            kept = "once" if path else "at each start: set NUMBA_CACHE_DIR to keep it"
            if path and only_other_code(Path(path).parent):
                kept += "; what is kept is of another version or for another processor"
            text = f"compiling the model's code for this processor (about ten seconds, {kept}) ..."
            slow = threading.Timer(3.0, _say, [text])
            slow.daemon = True
            slow.start()
            try:
                self(KVCache(self.config, 1, torch.device("cpu"), torch.float32), [0], [0], threads=1)
                one, ids = np.float32(1), np.zeros(2, dtype=np.int64)
                self.largest(np.zeros(2, dtype=np.float32), ids[:1], one, one, 1, np.zeros(2, dtype=np.float32), ids)
            finally:
                slow.cancel()
            _compiled.add(formats)

    def _room(self, rows: int, last: int) -> None:
        """Arrays large enough for so many rows, and for the logits of the `last`."""
        c, width = self.config, self.config.n_embd
        if rows > self.rows:
            self.rows = rows
            size = 9 * rows * width + width + self.threads * (rows * width + c.block_size)
            self.work = np.empty(size, dtype=np.float32)
            self.numbers = np.empty((self.threads, rows * 4 * width), dtype=self.kernels.ROUNDED)
            self.scales = np.empty((self.threads, rows), dtype=np.float32)
        if last > self.outputs:
            self.outputs = last
            self.logits = np.empty((last, c.tokens), dtype=np.float32)

    def _addresses(self, cache: KVCache) -> np.ndarray:
        """Where the cache's layers are."""
        if self._known is None or self._known[0] is not cache:
            self._known = (cache, np.array([layer.data_ptr() for layer in cache.layers], dtype=np.int64))
        return self._known[1]

    def __call__(
        self,
        cache: KVCache,
        ids: Sequence[int],
        slots: Sequence[int],
        last: int | None = None,
        threads: int | None = None,
    ) -> np.ndarray:
        """Read one token a row into its slot, rows of one slot in order; returns the logits [last, N] of the last rows.

        They are valid until the next call. Raises ValueError where a slot would hold more than the context.
        """
        threads, last = threads or self.threads, len(ids) if last is None else last
        length, positions = dict.fromkeys(slots, 0), []
        for slot in slots:
            positions.append(cache.length[slot] + length[slot])
            length[slot] += 1
        if max(positions) >= self.config.block_size:
            raise ValueError(f"a slot is full at {self.config.block_size} tokens: prefill the end of its text again")
        self._room(len(ids), last)
        shared = (
            self.token,
            TOKENS[cache.layers[0].dtype],
            (*self.shape, cache.layers[0].element_size()),
            self.table,
            self.vectors,
            self.tables,
            self._addresses(cache),
            np.array(ids, dtype=np.int64),
            np.array(slots, dtype=np.int64),
            np.array(positions, dtype=np.int64),
            self.logits[:last],
            self.work,
        )
        if threads == 1:
            self._part(shared, 0, 1)
        else:  # never by the main thread: Ctrl-C must not leave the others waiting for it
            self.leader.submit(self._together, shared, threads).result()
        for slot, count in length.items():
            cache.length[slot] += count
        return self.logits[:last]

    def _part(self, shared: tuple[Any, ...], thread: int, threads: int) -> None:
        """One thread's part of a step."""
        self.kernels.forward(*shared, self.numbers[thread], self.scales[thread], thread, threads, self.team)

    def _together(self, shared: tuple[Any, ...], threads: int) -> None:
        """All threads' parts."""
        helping = [self.helpers.submit(self._part, shared, thread, threads) for thread in range(1, threads)]
        self._part(shared, 0, threads)
        for one in helping:
            one.result()
