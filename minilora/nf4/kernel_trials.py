"""Trials of the kernels: on the GPU at hand each must be right, and then faster than PyTorch, before it is used.

    first use of a kind     kernel, dtype, block size, double quantization: compared with PyTorch on small random
                            weights (minilora.kernels.proof)
    first use of a shape    of W, and of M rows of x, rounded up to a power of two: the kernel and PyTorch's way take
                            turns on random data, and the faster one is used

    M, rows of x      1 … M*            above M*               one M* for each kind and shape: with more rows a product
                      fused kernel      PyTorch's way          costs more, and the dequantization that it saves does not

What wins at M wins with fewer rows, and what loses loses with more, so few M are tried. For a kind that is wrong,
raises or does not compile there is one warning, and PyTorch does its work. While a CUDA graph is captured or something
is traced nothing is tried, and what is known holds.
"""

import logging
import sys
import threading
from math import inf
from pathlib import Path
from statistics import median

import torch

from minilora.nf4.kernel_device import GPU, Contest, Kind, Shape
from minilora.nf4.kernel_verdicts import Verdicts

MOST_TRIED = 4096  # rows: by then the dequantization that a fused kernel saves is some 7% of the product on an H100
ROUNDS, SECONDS = 5, 0.005  # of a trial: no round begins after so many seconds
PRODUCTS = ("gemv", "matmul", "backward")
logger = logging.getLogger("minilora")


class Trials:
    """Which kernels are used on one GPU. Threads may share it: only one is in a trial at a time."""

    def __init__(self, gpu: GPU, folder: Path) -> None:
        self.gpu, self.verdicts = gpu, Verdicts(folder, gpu.identity())
        self._decided: dict[tuple[Kind, Shape, int], bool] = {}
        self._named: set[str] = set()
        self._lock = threading.RLock()

    def wins(self, kind: Kind, shape: Shape, M: int = 1) -> bool:
        """True if the kernel is to be used for a weight of this shape and M rows; tried now if that is not known."""
        key = kind, shape, min(MOST_TRIED, 1 << (M - 1).bit_length())
        if key not in self._decided:
            if self.gpu.is_recording():
                return self.most_rows(kind, shape) >= M
            with self._lock:
                if key not in self._decided:
                    self._decided[key] = self._decide(*key)
        return self._decided[key]

    def most_rows(self, kind: Kind, shape: Shape) -> int:
        """Up to how many rows the kernel is known to win; 0: none. What wins at MOST_TRIED wins with any number."""
        won, _ = self._limits(kind, shape)
        return sys.maxsize if won == MOST_TRIED else won

    def _limits(self, kind: Kind, shape: Shape) -> tuple[int, float]:
        """Up to how many rows the kernel has won, and from how many on it has lost."""
        if self.verdicts.kinds.get(str(kind)) != "":
            return 0, inf
        times = dict(self.verdicts.times.get(shape_key(kind, shape), {}))  # other threads may add to it
        lost = min((M for M, (kernel, pytorch) in times.items() if kernel >= pytorch), default=inf)
        return max((M for M in times if lost > M), default=0), lost

    def _known(self, kind: Kind, shape: Shape, M: int) -> bool | None:
        if self.verdicts.kinds.get(str(kind)):
            return False
        won, lost = self._limits(kind, shape)
        return True if won >= M else False if lost <= M else None

    def _decide(self, kind: Kind, shape: Shape, M: int) -> bool:
        if (known := self._known(kind, shape, M)) is None:
            with self.gpu.alone():
                known = self._try(kind, shape, M)
        fault = self.verdicts.kinds.get(str(kind))
        if fault and str(kind) not in self._named:
            self._named.add(str(kind))
            # another shape may have been right
            self._decided |= {key: False for key in self._decided if key[0] == kind}
            where = ", ".join(f"{part} {value}" for part, value in self.verdicts.device.items() if part != "source")
            logger.warning("PyTorch does the work of the NF4 kernel (%s), which failed on %s: %s", kind, where, fault)
        return known

    def _try(self, kind: Kind, shape: Shape, M: int) -> bool:
        """What a trial says; False, without a verdict, where there is no memory or no turn for one."""
        by_kernel = kind.kernel in PRODUCTS and self.wins(kind._replace(kernel="dequantize"), shape)
        try:
            self.gpu.synchronize()  # what others have broken shows now
            with self.verdicts.trial(str(kind)):
                if (known := self._known(kind, shape, M)) is None:  # no other process was faster
                    self._judge(kind, shape, M, by_kernel)
                    known = self._known(kind, shape, M)
                return bool(known)
        except (torch.OutOfMemoryError, TimeoutError):
            return False

    def _judge(self, kind: Kind, shape: Shape, M: int, by_kernel: bool) -> None:
        """Right? Then, faster? Raises RuntimeError if the device is broken for this process; the next will know why."""
        kinds = self.verdicts.kinds
        try:
            if str(kind) not in kinds:
                kinds[str(kind)] = self.gpu.fault(kind)
            if not kinds[str(kind)]:
                contest = self.gpu.contest(kind, shape, M, by_kernel)
                if fault := contest.fault(contest.kernel(), contest.pytorch()):
                    kinds[str(kind)] = f"{fault} ({shape_key(kind, shape)}, {M} rows)"
                else:
                    self.verdicts.times.setdefault(shape_key(kind, shape), {})[M] = race(self.gpu, contest)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            kinds[str(kind)] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            try:
                self.gpu.synchronize()
            except Exception:
                raise RuntimeError(
                    f"the NF4 kernel {kind} has broken the GPU for this process; start it again: that kernel will be"
                    " left out (all are with MINILORA_KERNELS=off)"
                ) from error


def shape_key(kind: Kind, shape: Shape) -> str:
    return f"{kind}, {'x'.join(map(str, shape))}"


def race(gpu: GPU, contest: Contest) -> tuple[float, float]:
    """Median microseconds of the kernel and of PyTorch's way, in turns; both have run once before."""
    rounds: list[tuple[float, float]] = []
    while len(rounds) < ROUNDS and sum(map(sum, rounds)) < SECONDS:
        rounds.append((gpu.seconds(contest.kernel), gpu.seconds(contest.pytorch)))
    kernel, pytorch = (round(1e6 * median(times), 2) for times in zip(*rounds, strict=True))
    return kernel, pytorch
