"""How many threads PyTorch works in: no more than there are cores for this process.

Which cores a process may run on, PyTorch asks the system. What it does not ask for is the quota of a container
(`docker run --cpus 2`, a Kubernetes limit, systemd's CPUQuota): on 64 cores it then starts 64 threads that are stopped
together for most of the time.
"""

import math
import os
from contextlib import suppress
from pathlib import Path

import torch

from minilora.cgroups import group_folders

__all__ = ["available_cores", "use_available_cores"]

CHOSEN_BY_THE_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def available_cores() -> int:
    """Cores that this process may keep busy, at least 1: by its affinity and its groups' quotas, rounded up."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min(map(_quota, group_folders("cpu")))
    return max(1, min(affinity, math.ceil(quota) if math.isfinite(quota) else affinity))


def use_available_cores() -> None:
    """Let PyTorch work in no more threads than there are `available_cores`.

    The `minilora` command does this for itself; `import minilora` changes nothing. A number of threads that the user
    has chosen, in OMP_NUM_THREADS or MKL_NUM_THREADS, stays.
    """
    if torch.get_num_threads() > available_cores() and not any(name in os.environ for name in CHOSEN_BY_THE_USER):
        torch.set_num_threads(available_cores())


def _quota(folder: Path) -> float:
    """Seconds of CPU time that the group may take in a second; infinite without a limit."""
    with suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()  # version 2, of which "max" is no limit
        return int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))  # version 1
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    return math.inf
