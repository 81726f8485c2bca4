"""What the benchmark `kernels` times: products with an NF4 weight by shape, rows and direction; making it, or W of it.

The roofline of each is the time in which its bytes can be moved or its operations be done, whichever takes longer, at
the speeds measured in the same run (Williams et al., "Roofline", CACM 52(4), 2009).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from benchmarks.measure import take_turns
from minilora.auto_dtype import auto_dtype

LLAMA = {"8B q, o": (4096, 4096), "8B k, v": (1024, 4096), "8B gate, up": (14336, 4096), "8B down": (4096, 14336),
         "70B q, o": (8192, 8192), "70B gate, up": (28672, 8192), "70B down": (8192, 28672)}  # fmt: skip
SMOLLM2 = {"q, o": (576, 576), "k, v": (192, 576), "gate, up": (1536, 576), "down": (576, 1536), "4096²": (4096, 4096)}
ROWS = {"cuda": (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192), "cpu": (1, 16, 128, 512)}
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # a weight: its code, its share of an 8-bit absmax, and of that one's absmax

Operation = Literal["quantize", "dequantize", "forward", "backward"]


@dataclass(frozen=True)
class Speeds:
    """What the device reaches: bytes a second of a copy, operations a second of a large product in each dtype."""

    bytes_per_s: float
    flops: Mapping[torch.dtype, float]


@dataclass(frozen=True)
class Case:
    """x W^T of x (M, K) and W (N, K); or backward, g W of g (M, N); or W alone, (de)quantized, and M is 0."""

    layer: str
    N: int
    K: int
    M: int
    dtype: torch.dtype
    operation: Operation

    def __str__(self) -> str:
        rows = f", M={self.M}" if self.M else ""
        return f"{self.layer} {self.N}x{self.K}{rows}, {self.operation}"

    @property
    def x_shape(self) -> tuple[int, int]:
        return (self.M, self.N if self.operation == "backward" else self.K)

    @property
    def bytes(self) -> float:
        """Moved at least: W in NF4, x and y once; or W in NF4 and in dtype."""
        dense = self.M * (self.N + self.K) if self.M else self.N * self.K
        return self.N * self.K * NF4_BITS / 8 + dense * self.dtype.itemsize

    @property
    def operations(self) -> float:
        return 2 * self.M * self.N * self.K

    def is_bound_by_bytes(self, speeds: Speeds) -> bool:
        return self.bytes / speeds.bytes_per_s >= self.operations / speeds.flops[self.dtype]

    def seconds_at_best(self, speeds: Speeds) -> float:
        """The roofline."""
        return max(self.bytes / speeds.bytes_per_s, self.operations / speeds.flops[self.dtype])


def cases(kind: str) -> list[Case]:
    """Shape by shape, so that its weights are made once; on a CPU float32 too, where many people train in it."""
    shapes = LLAMA if kind == "cuda" else SMOLLM2
    found = []
    for dtype, (layer, (N, K)) in product(dtypes(kind), shapes.items()):
        if kind == "cuda":  # where a kernel may do it
            found.append(Case(layer, N, K, 0, dtype, "quantize"))
        found.append(Case(layer, N, K, 0, dtype, "dequantize"))
        for operation in ("forward", "backward"):
            found += [Case(layer, N, K, M, dtype, operation) for M in ROWS[kind]]
    return found


def dtypes(kind: str) -> tuple[torch.dtype, ...]:
    """In which each kind of device is measured: a CPU in bfloat16 too, where it has instructions for that."""
    if kind == "cuda":
        return (torch.bfloat16,)
    fast = auto_dtype("cpu").dtype == torch.bfloat16  # else a large product takes the better part of a minute
    return (torch.bfloat16, torch.float32) if fast else (torch.float32,)


def measured_speeds(device: torch.device) -> Speeds:
    """Of a copy (bytes read and written), and of a large product in each dtype: the best of nine."""
    big = device.type == "cuda"
    source = torch.empty(2**30 if big else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = {"copy": lambda _: target.copy_(source)}
    copies = take_turns(copy, 9, device, warmup=3, progress="Speed of a copy")["copy"]
    n, flops = 8192 if big else 2048, {}
    for dtype in dtypes(device.type):
        a = torch.randn(n, n, device=device).to(dtype)
        product = {"product": partial(_square, a)}
        times = take_turns(product, 9, device, warmup=3, progress=f"Speed of a product, {dtype}")["product"]
        flops[dtype] = 2 * n**3 / min(times)
    return Speeds(2 * source.numel() / min(copies), flops)


def _square(a: Tensor, round: int) -> Tensor:
    return a @ a
