"""Time and memory, measured so that two things can be compared.

A machine's speed drifts by more than the differences of interest: clocks, neighbours, caches. So contenders take turns
in rounds (A B C, then B C A, ...) on the same input, and what is compared is their ratio within each round.
"""

import gc
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from minilora.progress import progress_bar


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (*values, 0.0, *values)
        return cls(median(values), low, high)


FEWEST_ROUNDS = 3  # a median of fewer says nothing


def take_turns(
    contenders: Mapping[str, Callable[[int], object]],
    rounds: int,
    device: torch.device,
    warmup: int,
    seconds: float = math.inf,
    progress: str | None = None,
) -> dict[str, list[float]]:
    """Seconds of each contender in each round; `contender(round)` does that round's work.

    The first contender of a round is another one every time, and the first `warmup` rounds are not counted. No round
    begins after so many `seconds`, except that three are counted in any case, or `rounds` where that is less.
    `progress` labels a progress bar, None shows none.
    """
    names = list(contenders)
    taken: dict[str, list[float]] = {name: [] for name in names}
    deadline = time.monotonic() + seconds
    with progress_bar(progress, (warmup + rounds) * len(names), "turns") as advance:
        for round in range(warmup + rounds):
            if round >= warmup + FEWEST_ROUNDS and time.monotonic() > deadline:
                break
            first = round % len(names)
            for name in names[first:] + names[:first]:
                _synchronize(device)
                started = time.perf_counter()
                contenders[name](round)
                _synchronize(device)
                if round >= warmup:
                    taken[name].append(time.perf_counter() - started)
                advance(1)
    return taken


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- memory: of a process of its own for each contender, since one's allocator remembers another's peak ---------------


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak so far, such as that of loading (Linux and CUDA; elsewhere it is of the whole process)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # other processes may need what loading did
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM


def peak_memory_mb(device: torch.device) -> float:
    """Peak since the reset, MiB: allocated on the GPU, or resident in this process, Python and libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# --- where it was measured --------------------------------------------------------------------------------------------

PACKAGES = ("minilora", "torch", "transformers", "peft", "bitsandbytes", "trl", "triton", "gemlite", "unsloth")


def machine(device: torch.device) -> dict[str, Any]:
    """What a number is worth nothing without."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": _processor(),
        "instructions": _instructions(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_before": round(os.getloadavg()[0], 2),  # near zero, or the numbers are of a busy machine
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "commit": _commit(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _instructions() -> list[str]:
    """Vector instructions for matrix products: the level that PyTorch uses here, then what else the processor names.

    ATEN_CPU_CAPABILITY=avx2 with ONEDNN_MAX_CPU_ISA=AVX2 lets a newer processor stand for an older one.
    """
    level = torch.backends.cpu.get_cpu_capability()
    info = Path("/proc/cpuinfo")
    flags = re.search(r"flags\s*: (.*)", info.read_text()) if info.exists() else None
    known = [flag for flag in ("avx512_bf16", "avx512_fp16", "amx_bf16") if flags and flag in flags[1].split()]
    return [level, *(known if level == "AVX512" else [])]


def _commit() -> str | None:
    """The commit measured, with a + where the working tree differs from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
