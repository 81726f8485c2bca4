"""dtype="auto": the dtype of activations and products that suits a device, and why.

    a CPU      bfloat16 where a product in it takes no longer than in float32, which a probe times; else float32
    a GPU      bfloat16 where it is in hardware; else float16, for which training scales the loss

Where a CPU has no instructions for bfloat16, PyTorch multiplies in one thread and without vectors: a product takes some
ten times as long as in float32, though it reads half the bytes.
"""

import sys
import time
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

M, N, K = 256, 512, 512  # a product of 0.13 GFLOP: under a millisecond where there are vectors
REPEATS = 5


@dataclass(frozen=True)
class DtypeChoice:
    """What "auto" is on a device, and a half-sentence that says why."""

    dtype: torch.dtype
    reason: str

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}, {self.reason}"


def auto_dtype(device: torch.device | str) -> DtypeChoice:
    """The dtype for a device; a CPU is probed once a process, which takes some milliseconds."""
    device = torch.device(device)
    if device.type == "cpu":
        times = slower_than_float32(torch.bfloat16)
        if times <= 1:
            return DtypeChoice(torch.bfloat16, f"since a product in it takes {times:.2f} of float32's time on this CPU")
        return DtypeChoice(torch.float32, f"since a product in bfloat16 takes {times:.1f} times as long on this CPU")
    if _has_bfloat16(device):
        return DtypeChoice(torch.bfloat16, f"which {device.type} has in hardware")
    return DtypeChoice(torch.float16, f"since this {device.type} device has no bfloat16; training scales the loss")


@cache
def slower_than_float32(dtype: torch.dtype) -> float:
    """A product's time on this CPU in `dtype`, divided by its time in float32: the fastest of some, taken in turns.

    In one thread: with two, one may wait for a core that another process is using, and only in float32.
    """
    pairs = [(torch.ones(M, K, dtype=each), torch.ones(N, K, dtype=each)) for each in (dtype, torch.float32)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        in_turns = [[_seconds(*pair) for pair in pairs] for _ in range(REPEATS)]
    finally:
        torch.set_num_threads(threads)
    in_dtype, in_float32 = (min(times) for times in zip(*in_turns, strict=True))
    return in_dtype / in_float32


def _seconds(x: Tensor, W: Tensor) -> float:
    began = time.perf_counter()
    x @ W.T
    return time.perf_counter() - began


def _has_bfloat16(device: torch.device) -> bool:
    """True if a GPU multiplies bfloat16 itself; CUDA counts an emulation, unless asked not to."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        x = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
        return bool((x @ x == 8).all())
    except (RuntimeError, TypeError):  # TypeError: MPS before macOS 14
        return False


@cache
def say_once(line: str) -> None:
    """Print a line on stderr, the first time in this process."""
    print(f"minilora: {line}", file=sys.stderr, flush=True)
