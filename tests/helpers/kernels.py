"""Kernels run on a GPU where there is one, and else in Triton's interpreter, on the CPU."""

from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", "3.6", reason="needs triton: pip install minilora[gpu]")

from minilora.kernels.codes import INTERPRETED

from minilora import nf4
from minilora.nf4.codec import QuantizedTensor

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

if INTERPRETED and metadata.version("triton").startswith("3.6") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    pytest.skip(
        "Triton 3.6's interpreter fails with NumPy 2.4: needs a newer Triton, an older NumPy, or a GPU",
        allow_module_level=True,
    )

runs_somewhere = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device, or TRITON_INTERPRET=1"
)


def packed(N: int, K: int, double_quant: bool = True, block_size: int = 64, seed: int = 0) -> QuantizedTensor:
    torch.manual_seed(seed)
    W = torch.randn(N, K) * torch.rand(N, 1)  # rows of different sizes, so that a wrong absmax shows
    return nf4.quantize(W.to(DEVICE) / K**0.5, block_size, double_quant)


def as_stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 rounded to dtype as the kernel's store does it; the interpreter cuts bfloat16 off instead of rounding."""
    if INTERPRETED and dtype == torch.bfloat16:
        values = (values.view(torch.int32) & ~0xFFFF).view(torch.float32)
    return values.to(dtype)


def weight(q: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """W as the kernels must see it: minilora.nf4's, itself bitsandbytes', in dtype."""
    return as_stored(nf4.dequantize(q, torch.float32), dtype)


def assert_near(y: Tensor, exact: Tensor, x: Tensor, W: Tensor, dtype: torch.dtype) -> None:
    """|y − exact| ≤ 2ᵉ |exact| + 2⁻¹⁴ (|x| |W|): y rounded once to dtype, the sum in float32.

    2ᵉ is the unit in the last place; half of it for rounding, all of it where the interpreter cuts bfloat16 off.
    """
    ulp = {torch.float32: 2**-20, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    bound = ulp * exact.abs() + 2**-14 * (x.double().abs() @ W.double().abs().T)
    worst = ((y.double() - exact).abs() / bound).max().item()
    assert worst <= 1, f"{worst:.3g} times the bound"


Mutation = Callable[[QuantizedTensor], QuantizedTensor]


def mutations() -> Iterator[Any]:
    """Faults that a kernel could have, put into its input instead: each must be seen by the tests' own comparison."""
    from dataclasses import replace

    yield pytest.param(lambda q: replace(q, codes=(q.codes >> 4) | (q.codes << 4)), id="nibbles swapped")
    yield pytest.param(lambda q: replace(q, absmax=q.absmax.roll(1)), id="absmax off by one block")
    yield pytest.param(lambda q: replace(q, offset=torch.zeros_like(q.offset)), id="offset missing")
    yield pytest.param(lambda q: replace(q, nested_absmax=q.nested_absmax.roll(1)), id="nested absmax off by one")
    yield pytest.param(_transposed, id="W transposed")


def _transposed(q: QuantizedTensor) -> QuantizedTensor:
    N, K = q.shape
    return nf4.quantize(nf4.dequantize(q, torch.float32).T.contiguous().view(N, K), q.block_size)
