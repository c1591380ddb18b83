"""Device, precision, and the distributed context of several training processes.

device = pick_device("auto")                 # CUDA, then MPS, then CPU
precision = pick_precision("auto", device)   # "bf16", "fp16" or "fp32"
distributed = DistributedContext.join("auto", device)             # rank and size under torchrun, 0 of 1 otherwise
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from config import ConfigError

T = TypeVar("T")

# Dense matrix rate in FLOP/s of the formats used here, from the makers' data sheets (without sparsity).
PEAK_FLOPS = {
    "H200": {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
    "H100 PCIE": {"bf16": 756e12, "fp16": 756e12, "fp32": 51e12},
    "H100": {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
    "B200": {"bf16": 2250e12, "fp16": 2250e12, "fp32": 80e12},
    "A100": {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12},
    "A10G": {"bf16": 70e12, "fp16": 70e12, "fp32": 31.2e12},
    "L40S": {"bf16": 362e12, "fp16": 362e12, "fp32": 91.6e12},
    "L4": {"bf16": 121e12, "fp16": 121e12, "fp32": 30.3e12},
    "V100": {"fp16": 125e12, "fp32": 15.7e12},
    "T4": {"fp16": 65e12, "fp32": 8.1e12},
    "RTX 4090": {"bf16": 165.2e12, "fp16": 165.2e12, "fp32": 82.6e12},
    "RTX 3090": {"bf16": 71e12, "fp16": 71e12, "fp32": 35.6e12},
}


def keep_memory() -> None:
    """Let this process reuse the memory it frees, where the C library is glibc (Linux).

    A training step frees and allocates the same large blocks again and again. By default each is mapped
    again, page by page, which takes a tenth of a step's time on CPUs (docs/results.md). All threads take their memory
    from one arena, as those of other threads than the first are smaller than a chunk of logits.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        import ctypes

        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in (
            (-4, 0),
            (-1, 2**31 - 1),
            (-2, 1 << 26),
            (-8, 1),
        ):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX
            mallopt(parameter, value)


def release_memory() -> None:
    """Give memory that was freed back to the system, where the C library is glibc: it keeps pieces below 32 MB."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` takes CUDA, then Apple's MPS, then the CPU. Under torchrun: this rank's GPU.

    Raises ConfigError if there is no such device.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", local)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if name == "xla":
        try:
            import torch_xla.core.xla_model as xm  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            raise ConfigError(["--train.device xla: torch_xla is not installed (pip install torch_xla)"]) from None
        return xm.xla_device()  # type: ignore[no-any-return, unused-ignore]
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError([f"device {name!r}: not one of auto, cpu, cuda, cuda:N, mps, xla"]) from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError([f"device {name}: no usable NVIDIA GPU here: use cpu, or install a CUDA build of torch"])
        if device.index is None:
            return torch.device("cuda", local)
        if device.index >= torch.cuda.device_count():
            raise ConfigError(
                [f"device {name}: this machine has {torch.cuda.device_count()} GPUs, counted from cuda:0"]
            )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(["device mps: only on Apple silicon: use cpu"])
    return device


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware (AVX512-BF16, AMX, Ampere and newer).

    Not where ATEN_CPU_CAPABILITY holds torch to AVX2, as for measuring what a processor without bfloat16 would do.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
            return False
        tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, test)() for test in tests if hasattr(torch.cpu, test))
    return device.type == "xla"


def pick_precision(name: str, device: torch.device) -> tuple[str, str]:
    """(precision, warning): `auto` resolved; an unsupported format falls back with a warning to print."""
    if name == "auto":
        if native_bf16(device):
            return "bf16", ""
        return ("fp16", "") if device.type == "cuda" else ("fp32", "")
    if name == "fp16" and device.type != "cuda":
        used, _ = pick_precision("auto", device)
        return used, f"--train.precision fp16 needs an NVIDIA GPU; computing in {used} on {device.type}"
    if name == "bf16" and device.type == "cpu" and not native_bf16(device):
        return "bf16", "this processor has no bf16 instructions: --train.precision fp32 is faster here"
    return name, ""


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The context in which the model computes in `precision`."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


def seed_dropout(device: torch.device, seed: int) -> None:
    """Seed the generators that dropout on `device` draws from.

    `torch.manual_seed` seeds every kind of device and records a stack trace for each that is not in use, which takes a
    millisecond in every step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


def device_name(device: torch.device) -> str:
    """Name of the device for logs: the GPU's, or the processor's with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return str(device)


def peak_flops(name: str, precision: str) -> float | None:
    """Peak matrix rate of a GPU by (part of) its name; None if it is not in the table (no MFU is reported)."""
    upper = name.upper()
    for key, rates in PEAK_FLOPS.items():
        if all(part in upper for part in key.split()):
            return rates.get(precision)
    return None


def energy_meter(device: torch.device) -> Callable[[], float] | None:
    """A function that gives the joules the GPU has drawn since now; None if NVML (nvidia-ml-py) does not report it."""
    if device.type != "cuda":
        return None
    try:
        import pynvml  # type: ignore[import-not-found, unused-ignore]

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # not installed, no driver, or a GPU older than Volta: the run continues without
        return None
    return lambda: (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1000


def gpu_memory(device: torch.device) -> float | None:
    """Peak memory of a GPU's tensors so far, in GB; None on other devices."""
    return torch.cuda.max_memory_reserved(device) / 1e9 if device.type == "cuda" else None


@dataclass
class DistributedContext:
    """Rank, world size and collectives of one run. Without torchrun: rank 0 of 1, every method returns its input."""

    rank: int
    size: int
    mode: str  # none, ddp or fsdp
    device: torch.device

    @classmethod
    def join(cls, parallel: str, device: torch.device) -> DistributedContext:
        """Join the process group that torchrun describes in the environment; without torchrun, a single process."""
        size = int(os.environ.get("WORLD_SIZE", 1))
        if parallel == "none" or (parallel == "auto" and size == 1):
            return cls(0, 1, "none", device)
        if "RANK" not in os.environ:
            raise ConfigError(
                [
                    f"--train.parallel {parallel}: start it with `torchrun --standalone --nproc_per_node=2 train.py` and your flags"
                ]
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            store, rank, size = next(dist.rendezvous("env://"))
            # after an elastic restart the store still holds the dead processes' addresses: use a new key prefix
            fresh = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo", store=fresh, rank=rank, world_size=size
            )
        return cls(dist.get_rank(), dist.get_world_size(), "ddp" if parallel == "auto" else parallel, device)

    @property
    def leader(self) -> bool:
        return self.rank == 0

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Each value summed over all ranks, in double precision."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def broadcast(self, value: T) -> T:
        """The value of rank 0, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """End the process group."""
        if self.mode != "none" and dist.is_initialized():
            dist.destroy_process_group()
