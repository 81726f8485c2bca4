"""What the machine has for this process: cores, limits of memory, and a cache folder.

PyTorch does not look at the CPU quota of a container (`docker run --cpus 2`, a Kubernetes limit, systemd's CPUQuota):
on 64 cores it then starts 64 threads that are stopped together for most of the time. Linux keeps such limits in control
groups.
"""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import torch

from minilora.errors import InputError

CONTROL_GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
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


def group_folders(controller: str) -> Iterator[Path]:
    """The folders of this process's control groups and of all groups around them, whose limits hold too.

    `controller` is "cpu" or "memory", of version 1; in version 2 a group's one folder has the files of all. Inside a
    container the roots are its own group. A folder need not exist, nor have a file with a limit.
    """
    yield from (CONTROL_GROUPS, CONTROL_GROUPS / controller)
    with suppress(OSError):  # a system without control groups
        for line in MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            group = PurePosixPath(path.lstrip("/"))
            if ".." in group.parts or (controllers and controller not in controllers.split(",")):
                continue  # a group outside the container, or of another controller
            root = CONTROL_GROUPS / controller if controllers else CONTROL_GROUPS
            yield from (root / folder for folder in (group, *group.parents) if folder.parts)


def cache_folder() -> Path:
    """The folder for fetched files: `$MINILORA_CACHE`, or `~/.cache/minilora` (`$XDG_CACHE_HOME` respected).

    Raises InputError for a user without a home folder, as containers may have one.
    """
    if "MINILORA_CACHE" in os.environ:
        return Path(os.environ["MINILORA_CACHE"])
    if "XDG_CACHE_HOME" in os.environ:
        return Path(os.environ["XDG_CACHE_HOME"]) / "minilora"
    try:
        return Path.home() / ".cache/minilora"
    except RuntimeError:
        raise InputError("there is no home folder to keep files in: set MINILORA_CACHE to a folder") from None
