"""Dequantized weights kept for a while, where the same NF4 layers are used again and again on a CPU.

    of each layer     token or step 1             2           3           …
    without           dequantize, product         the same    the same
    with              dequantize, keep, product   product     product

Up to some hundred rows a product with W takes less time than making W. What is computed is the same. The price is a
copy of the model in the dtype of its products for as long as the `with` lasts; what does not fit is dequantized each
time. On a GPU the kernels multiply with the packed weight itself.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from minilora.machine import group_folders
from minilora.nf4 import codec
from minilora.nf4.codec import QuantizedTensor


class _Kept:
    """Of the whole process, since a generator may go on in another thread than the one it began in."""

    def __init__(self) -> None:
        # Re-entrant: the garbage collector may end an abandoned generator in this thread while the lock is taken.
        self.lock = RLock()
        self.users, self.room = 0, 0  # how many `with` are open; bytes that may yet be taken
        # By dtype, shape, address and version of each tensor of q: q, so that nothing else has these addresses, and W.
        self.weights: dict[tuple[Any, ...], tuple[QuantizedTensor, Tensor]] = {}


_kept = _Kept()


@contextmanager
def keeping_weights(share: float = 0.5) -> Iterator[None]:
    """Inside the `with`, W of a layer on a CPU is made once, for as many layers as fit in a share of the free memory.

    Of several such `with` the first one's share counts. Only Linux tells how much is free; elsewhere nothing is kept.
    """
    with _kept.lock:
        if _kept.users == 0:
            _kept.room = int(share * _free_memory())
        _kept.users += 1
    try:
        yield
    finally:
        with _kept.lock:
            _kept.users -= 1
            if _kept.users == 0:
                _kept.weights.clear()


def weights_that_fit(weights: Iterable[tuple[QuantizedTensor, torch.dtype]]) -> tuple[int, int]:
    """How many of these, used one after the other inside the `with`, are kept, and the bytes they take."""
    count, taken = 0, 0
    with _kept.lock:
        room = _kept.room + sum(W.nbytes for _, W in _kept.weights.values()) if _kept.users else 0
    for q, dtype in weights:
        size = prod(q.shape) * dtype.itemsize
        if q.codes.device.type == "cpu" and taken + size <= room:
            count, taken = count + 1, taken + size
    return count, taken


def kept_weight(q: QuantizedTensor, dtype: torch.dtype) -> Tensor | None:
    """W (of q's shape) if it is kept, not to be written to; made now if there is room. Else None."""
    # A compiled graph must not look at `users`: it would be compiled anew for every number of them.
    if torch.compiler.is_compiling() or _kept.users == 0 or q.codes.device.type != "cpu":
        return None
    versions: list[int] = []
    for part in (q.codes, q.absmax, q.nested_absmax, q.offset):
        if part is not None:
            if part.is_inference():  # nothing tells when it is written to
                return None
            versions += (part.data_ptr(), part._version)
    key = dtype, q.shape, *versions
    with _kept.lock:
        if key in _kept.weights:
            return _kept.weights[key][1]
        size = prod(q.shape) * dtype.itemsize
        if size > _kept.room:
            return None
        W = codec.dequantize(q, dtype)
        if _kept.users > 0:  # else the last `with` has ended meanwhile
            _kept.room -= size
            _kept.weights[key] = q, W
        return W


def _free_memory() -> int:
    """Bytes that can be taken without swapping, by Linux's estimate; 0 on other systems."""
    file = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", file.read_text()) if file.exists() else None
    return min([int(found[1]) * 1024, *_left_to_container()]) if found else 0


def _left_to_container() -> list[int]:
    """Bytes up to the limits of the control groups, such as a container's, of which /proc/meminfo knows nothing.

    Cached files count towards a limit, and are dropped before a process is killed.
    """
    left = []
    for folder in group_folders("memory"):
        for limit, used, files in (
            ("memory.max", "memory.current", "inactive_file"),  # version 2, of which "max" is no limit
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
        ):
            with suppress(OSError, ValueError):
                room = int((folder / limit).read_text()) - int((folder / used).read_text())
                read = re.search(rf"^{files} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
                left.append(max(0, room + (int(read[1]) if read else 0)))
    return left
