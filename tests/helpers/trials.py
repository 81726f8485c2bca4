"""A GPU for trials that is none: a clock of its own, and kernels that take as long as they are told to."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from minilora.nf4.kernel_device import GPU, Contest, Kind, Shape

Cost = Callable[[Kind, Shape, int], tuple[float, float]]  # seconds of the kernel and of PyTorch's way


class FakeGPU(GPU):
    """Counts what is tried on it. A kernel that ends well is `clock` seconds later, and so is PyTorch's way."""

    def __init__(
        self,
        cost: Cost = lambda kind, shape, M: (1e-5, 2e-5),
        beside: Callable[[float], float] = lambda pytorch: 0.0,  # what a trial takes besides, given PyTorch's way
        **identity: str,
    ) -> None:
        super().__init__(torch.device("cpu"))
        self.cost, self.beside, self.clock = cost, beside, 0.0
        self.proven: list[Kind] = []
        self.tried: list[tuple[Kind, Shape, int]] = []
        self.calls: list[str] = []
        self.faults: dict[str, str] = {}  # of a kernel
        self.recording = self.broken = False
        self.name = {"GPU": "Fake 100", "driver": "1.2", "torch": "2", "Triton": "3", "source": "abc", **identity}

    def identity(self) -> dict[str, str]:
        return self.name

    def is_recording(self) -> bool:
        return self.recording

    def synchronize(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        yield

    def fault(self, kind: Kind) -> str:
        self.proven.append(kind)
        return self.faults.get(kind.kernel, "")

    def contest(self, kind: Kind, shape: Shape, M: int, by_kernel: bool) -> Contest:
        self.tried.append((kind, shape, M))
        kernel, pytorch = self.cost(kind, shape, M)
        self.clock += self.beside(pytorch)
        return Contest(lambda: self.take("kernel", kernel), lambda: self.take("pytorch", pytorch), lambda a, b: "")

    def take(self, what: str, seconds: float) -> None:
        self.calls.append(what)
        self.clock += seconds

    def seconds(self, call: Callable[[], Any]) -> float:
        began = self.clock
        call()
        return self.clock - began
