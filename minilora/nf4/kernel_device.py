"""The GPU that kernels are tried on: its identity, the time of a call, and the kernel and PyTorch's way to compare."""

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minilora.nf4 import codec
from minilora.nf4.codec import NESTED_BLOCK_SIZE, QuantizedTensor

ROWS_AT_A_TIME = 512  # of two results that are compared: it takes several times their memory
DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version"))
Shape = tuple[int, ...]


class Kind(NamedTuple):
    """What one verdict is about: a file of kernels/nf4, and what its kernel is compiled for."""

    kernel: str
    dtype: torch.dtype
    block_size: int
    double_quant: bool

    def __str__(self) -> str:
        double = ", double quantization" if self.double_quant else ""
        return f"{self.kernel}, {str(self.dtype).removeprefix('torch.')}, blocks of {self.block_size}{double}"


class Contest(NamedTuple):
    """Two ways to one result, and what is wrong with the first result beside the second, "" if nothing."""

    kernel: Callable[[], Any]
    pytorch: Callable[[], Any]
    fault: Callable[[Any, Any], str]


class GPU:
    """A CUDA or ROCm device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def identity(self) -> dict[str, str]:
        """What a verdict holds for."""
        return {
            "GPU": torch.cuda.get_device_name(self.device),
            "driver": _driver(),
            "torch": torch.__version__,
            "Triton": metadata.version("triton"),
            "source": _hash_of_source(),
        }

    def is_recording(self) -> bool:
        """True where a trial would be recorded as part of the caller's work, or is forbidden."""
        return (
            torch.cuda.is_current_stream_capturing()
            or torch.jit.is_tracing()
            or torch._C._len_torch_dispatch_stack() > 0  # make_fx, selective checkpoints, counters of operations
            or torch._C._are_functorch_transforms_active()
        )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, this device is the current one, and modes that the caller has set do not count."""
        kind = self.device.type
        current = torch.cuda.device(self.device if kind == "cuda" else -1)  # -1 changes nothing
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(kind, enabled=False), current:
            yield

    def synchronize(self) -> None:
        """Wait for all work; raises if a kernel has broken the device for this process."""
        torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], Any]) -> float:
        """The time of one call by the device's own clock, with a cold cache, as in a model."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        torch.empty(2 * cache, dtype=torch.uint8, device=self.device).zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def fault(self, kind: Kind) -> str:
        """What is wrong with a kernel on small random weights; "" if nothing."""
        from minilora.kernels import proof

        return proof.fault(*kind, device=self.device)

    def contest(self, kind: Kind, shape: Shape, M: int, by_kernel: bool) -> Contest:
        """The kernel and PyTorch's way on random data: W of this shape, M rows of x.

        by_kernel: PyTorch's way multiplies with a W that the kernel `dequantize` has made.
        """
        from minilora.kernels import ops, proof

        draw = torch.Generator(self.device).manual_seed(0)  # the caller's random numbers stay as they are
        randn = partial(torch.randn, dtype=kind.dtype, device=self.device, generator=draw)
        if kind.kernel == "quantize":
            w, size = randn(prod(shape) // kind.block_size * kind.block_size), kind.block_size
            return Contest(
                partial(ops.nf4_quantize, w, size),
                partial(codec.quantize_whole_blocks, w, size),
                lambda ours, theirs: "".join(map(proof.unequal_bytes, ours, theirs)),
            )
        q = random_weight(kind, shape, draw)
        packed = ops.packed(q)
        plain, one_pass = partial(codec.dequantize, q, kind.dtype), partial(ops.nf4_dequantize, *packed, kind.dtype)
        if kind.kernel == "dequantize":
            return Contest(one_pass, plain, proof.unequal_bytes)
        N, K = shape
        weight = one_pass if by_kernel else plain
        x = randn(M, N if kind.kernel == "backward" else K)

        def fault(ours: Tensor, theirs: Tensor) -> str:
            """On random numbers |y| is some |x| |w| / √K. A sixteenth of it is more than the rounding of TF32 or of
            sums in 16 bits, which the caller may have allowed PyTorch, and less than the error of a wrong block."""
            x_norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
            W_norm = torch.linalg.vector_norm(weight(), dim=int(kind.kernel != "backward"), dtype=torch.float32)
            rough = W_norm / (16 * x.shape[1] ** 0.5)
            for part in zip(*(tensor.split(ROWS_AT_A_TIME) for tensor in (ours, theirs, x_norm)), strict=True):
                y, other, size = (tensor.float() for tensor in part)
                bound = size * rough + 2 * proof.UNIT[kind.dtype] * other.abs()
                if not (worst := ((y - other).abs() / bound).max().item()) <= 1:
                    return f"off by {worst:.3g} times what rounding explains"
            return ""

        if kind.kernel == "backward":
            return Contest(partial(ops.nf4_backward, x, *packed), lambda: x @ weight(), fault)
        return Contest(partial(ops.nf4_matmul, x, *packed, None, None, None), lambda: x @ weight().T, fault)


def random_weight(kind: Kind, shape: Shape, draw: torch.Generator) -> QuantizedTensor:
    """A weight of this shape in 4 bits, made as such."""
    n = prod(shape)
    n_blocks, device = -(-n // kind.block_size), draw.device
    codes = torch.randint(256, (-(-n // 2),), dtype=torch.uint8, device=device, generator=draw)
    rand = partial(torch.rand, dtype=torch.float32, device=device, generator=draw)
    absmax = rand(n_blocks)
    if not kind.double_quant:
        return QuantizedTensor(codes, absmax, shape, kind.dtype, kind.block_size)
    nested, offset = rand(-(-n_blocks // NESTED_BLOCK_SIZE)), torch.ones((), dtype=torch.float32, device=device)
    return QuantizedTensor(codes, (absmax * 256).byte(), shape, kind.dtype, kind.block_size, nested, offset)


def _driver() -> str:
    """The kernel module's version, where the system tells it."""
    for file in DRIVERS:
        found = re.search(r"\d+\.[\d.]+", file.read_text()) if file.exists() else None
        if found:
            return found[0]
    return "unknown"


def _hash_of_source() -> str:
    """Of the files of minilora.kernels."""
    spec = find_spec("minilora.kernels")
    assert spec is not None and spec.origin is not None
    files = sorted(Path(spec.origin).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
