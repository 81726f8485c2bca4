"""Scratch memory on a CPU, and the lookup of dequantization that works in it.

A CPU's allocator hands megabytes back to the system as soon as they are free, and faulting fresh pages in costs several
times what the dequantization does.
"""

import threading
from math import gcd

import torch
from torch import Tensor

LOOKUP_ROWS = 64  # of a gather: no more threads than this help


class _Workspaces(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}


_workspaces = _Workspaces()


def workspace(role: str, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized tensor (n,), on a CPU in the same memory at every call of this thread for the same role."""
    if device.type != "cpu":
        return torch.empty(n, dtype=dtype, device=device)
    buffer = _workspaces.buffers.get((role, dtype))
    if buffer is None or buffer.numel() < n:
        with torch.inference_mode(False):  # an inference tensor could not be written to outside
            buffer = _workspaces.buffers[role, dtype] = torch.empty(n, dtype=dtype, device=device)
    return buffer[:n]


def look_up_pairs(table: Tensor, index: Tensor) -> Tensor:
    """table[index], flat: table float32 (256, 2), index uint8 (n,) -> (2n,). The next call may overwrite the result.

    On a CPU a pair is one complex64, and a gather looks it up, whose rows PyTorch divides among its threads
    (index_select would run in one). Elsewhere a pair is a row, since not every device has complex numbers.
    """
    if index.device.type != "cpu":
        return torch.index_select(table, 0, index.int()).view(-1)
    n, rows = index.numel(), gcd(index.numel(), LOOKUP_ROWS)
    wide = workspace("index", n, torch.int64, index.device).copy_(index)
    pairs = workspace("pairs", n, torch.complex64, index.device)
    complex_table = torch.view_as_complex(table).expand(rows, 256)
    torch.gather(complex_table, 1, wide.view(rows, -1), out=pairs.view(rows, -1))
    return pairs.view(torch.float32)
