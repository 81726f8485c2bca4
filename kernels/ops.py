"""The kernels as PyTorch operators, so that torch.compile, autograd and fake tensors know them.

    minilora::nf4_dequantize(packed …)         W               no gradient: W is frozen
    minilora::nf4_matmul(x, packed …, add)     x W^T (+ add)   dL/dx = dL/dy W         dL/dadd = dL/dy
    minilora::nf4_backward(g, packed …)        g W             dL/dg = dL/dy W^T

`packed …` is a QuantizedTensor as plain arguments; `packed(q)` turns one into them.
"""

from typing import Any

import torch
from torch import Tensor

from minilora.nf4 import QuantizedTensor

from . import backward, dequantize, gemv, matmul


def packed(q: QuantizedTensor) -> tuple[Any, ...]:
    """q as the operators take it: codes, absmax, nested_absmax, offset, N, K, block_size."""
    N, K = q.shape
    return q.codes, q.absmax, q.nested_absmax, q.offset, N, K, q.block_size


def _unpacked(
    codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None, N: int, K: int, block_size: int
) -> QuantizedTensor:
    return QuantizedTensor(codes, absmax, (N, K), torch.float32, block_size, nested_absmax, offset)


@torch.library.custom_op("minilora::nf4_dequantize", mutates_args=())
def nf4_dequantize(
    codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None,
    N: int, K: int, block_size: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """W (N, K) in dtype."""
    return dequantize.dequantize(_unpacked(codes, absmax, nested_absmax, offset, N, K, block_size), dtype)


@torch.library.custom_op("minilora::nf4_matmul", mutates_args=())
def nf4_matmul(
    x: Tensor, codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None,
    N: int, K: int, block_size: int, add: Tensor | None,
) -> Tensor:  # fmt: skip
    """x W^T (+ add): x (M, K), add (M, N) in x's dtype -> (M, N). A single row has a kernel of its own."""
    q = _unpacked(codes, absmax, nested_absmax, offset, N, K, block_size)
    if len(x) == 1:
        return gemv.gemv(x[0], q, None if add is None else add[0])[None]
    return matmul.matmul(x, q, add)


@torch.library.custom_op("minilora::nf4_backward", mutates_args=())
def nf4_backward(
    g: Tensor, codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None,
    N: int, K: int, block_size: int,
) -> Tensor:  # fmt: skip
    """g W: g (M, N) -> (M, K)."""
    return backward.backward(g, _unpacked(codes, absmax, nested_absmax, offset, N, K, block_size))


# --- shapes, for fake tensors ----------------------------------------------------------------------------------------


@nf4_dequantize.register_fake
def _(codes: Tensor, absmax: Any, nested_absmax: Any, offset: Any, N: int, K: int, block_size: int, dtype: Any) -> Any:
    return codes.new_empty((N, K), dtype=dtype)


@nf4_matmul.register_fake
def _(
    x: Tensor, codes: Any, absmax: Any, nested_absmax: Any, offset: Any, N: int, K: int, block_size: int,
    add: Any,
) -> Any:  # fmt: skip
    return x.new_empty((x.shape[0], N))


@nf4_backward.register_fake
def _(g: Tensor, codes: Any, absmax: Any, nested_absmax: Any, offset: Any, N: int, K: int, block_size: int) -> Any:
    return g.new_empty((g.shape[0], K))


# --- gradients: each of the two products is the other's --------------------------------------------------------------

FROZEN = (None,) * 7  # no gradient for what is packed


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, absmax, nested_absmax, offset, N, K, block_size, *_ = inputs
    ctx.save_for_backward(codes, absmax, nested_absmax, offset)
    ctx.sizes = (N, K, block_size)


def _matmul_gradient(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    grad_x = nf4_backward(g.contiguous(), *ctx.saved_tensors, *ctx.sizes) if ctx.needs_input_grad[0] else None
    return grad_x, *FROZEN, g if ctx.needs_input_grad[8] else None


def _backward_gradient(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    grad_g = nf4_matmul(g.contiguous(), *ctx.saved_tensors, *ctx.sizes, None) if ctx.needs_input_grad[0] else None
    return grad_g, *FROZEN


nf4_matmul.register_autograd(_matmul_gradient, setup_context=_remember)
nf4_backward.register_autograd(_backward_gradient, setup_context=_remember)
