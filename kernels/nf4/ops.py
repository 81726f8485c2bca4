"""The kernels as PyTorch operators, so that torch.compile, autograd and fake tensors know them.

    minilora::nf4_dequantize(packed …)         W               no gradient: W is frozen
    minilora::nf4_matmul(x, packed …, add, x_A, B)             x W^T (+ add) (+ x_A B^T)
                                               dL/dx = dL/dy W      dL/dadd = dL/dy
                                               dL/dx_A = dL/dy B    dL/dB = dL/dy^T x_A
    minilora::nf4_backward(g, packed …)        g W             dL/dg = dL/dy W^T
    minilora::nf4_quantize(w, block_size)      codes, absmax   no gradient: rounding has none

`packed …` is a QuantizedTensor as plain arguments; `packed(q)` turns one into them.
"""

from typing import Any

import torch
from torch import Tensor

from minilora.nf4.codec import QuantizedTensor

from . import backward, dequantize, gemv, matmul, quantize


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
    N: int, K: int, block_size: int, add: Tensor | None, xA: Tensor | None, B: Tensor | None,
) -> Tensor:  # fmt: skip
    """x W^T (+ add) (+ xA B^T): x (M, K), add (N,) or (M, N), xA (M, r), B (N, r), all in x's dtype -> (M, N).

    A single row has a kernel of its own.
    """
    q = _unpacked(codes, absmax, nested_absmax, offset, N, K, block_size)
    if len(x) == 1:
        return gemv.gemv(x[0], q, None if add is None else add.view(-1), None if xA is None else xA[0], B)[None]
    return matmul.matmul(x, q, add, xA, B)


@torch.library.custom_op("minilora::nf4_backward", mutates_args=())
def nf4_backward(
    g: Tensor, codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None,
    N: int, K: int, block_size: int,
) -> Tensor:  # fmt: skip
    """g W: g (M, N) -> (M, K)."""
    return backward.backward(g, _unpacked(codes, absmax, nested_absmax, offset, N, K, block_size))


@torch.library.custom_op("minilora::nf4_quantize", mutates_args=())
def nf4_quantize(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Of a flat tensor, whose length block_size divides: packed codes, uint8 (n / 2,), and float32 absmax."""
    return quantize.quantize(w, block_size)


# --- shapes, for fake tensors ----------------------------------------------------------------------------------------


@nf4_dequantize.register_fake
def _(codes: Tensor, absmax: Any, nested_absmax: Any, offset: Any, N: int, K: int, block_size: int, dtype: Any) -> Any:
    return codes.new_empty((N, K), dtype=dtype)


@nf4_matmul.register_fake
def _(
    x: Tensor, codes: Any, absmax: Any, nested_absmax: Any, offset: Any, N: int, K: int, block_size: int,
    add: Any, xA: Any, B: Any,
) -> Any:  # fmt: skip
    return x.new_empty((x.shape[0], N))


@nf4_backward.register_fake
def _(g: Tensor, codes: Any, absmax: Any, nested_absmax: Any, offset: Any, N: int, K: int, block_size: int) -> Any:
    return g.new_empty((g.shape[0], K))


@nf4_quantize.register_fake
def _(w: Tensor, block_size: int) -> Any:
    n = w.numel()
    return w.new_empty(n // 2, dtype=torch.uint8), w.new_empty(n // block_size, dtype=torch.float32)


# --- gradients: each of the two products is the other's --------------------------------------------------------------

FROZEN = (None,) * 7  # no gradient for what is packed


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, absmax, nested_absmax, offset, N, K, block_size = inputs
    ctx.save_for_backward(codes, absmax, nested_absmax, offset)
    ctx.sizes = (N, K, block_size)


def _remember_factors(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, absmax, nested_absmax, offset, N, K, block_size, add, xA, B = inputs
    ctx.save_for_backward(codes, absmax, nested_absmax, offset, xA, B)
    ctx.sizes, ctx.add_is_bias = (N, K, block_size), add is not None and add.dim() == 1


def _matmul_gradient(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    *packed, xA, B = ctx.saved_tensors
    need_x, *_, need_add, need_xA, need_B = ctx.needs_input_grad
    grad_x = nf4_backward(g.contiguous(), *packed, *ctx.sizes) if need_x else None
    grad_add = (g.sum(0) if ctx.add_is_bias else g) if need_add else None
    return grad_x, *FROZEN, grad_add, g @ B if need_xA else None, g.T @ xA if need_B else None


def _backward_gradient(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    grad_g = None
    if ctx.needs_input_grad[0]:
        grad_g = nf4_matmul(g.contiguous(), *ctx.saved_tensors, *ctx.sizes, None, None, None)
    return grad_g, *FROZEN


nf4_matmul.register_autograd(_matmul_gradient, setup_context=_remember_factors)
nf4_backward.register_autograd(_backward_gradient, setup_context=_remember)
