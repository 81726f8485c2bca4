"""LoRA on frozen linear layers that share their input, as one function with its own backward pass.

    y_i = x W_iᵀ + b_i + s_i (x A_iᵀ) B_iᵀ              x (M, in), W_i (out_i, in), A_i (r_i, in), B_i (out_i, r_i)

Saved for backward: x, and h = x Aᵀ (M, r₁ + r₂ + …) with A the A_i one above the other, so that h is one product,
with one read of x. W_i and b_i are frozen. With g_i = ∂L/∂y_i, the chain rule gives

    y_i = … + s_i h_i B_iᵀ      ∂L/∂B_i = s_i g_iᵀ h_i
                                ∂L/∂h_i = s_i g_i B_i =: u_i            side by side: u (M, r₁ + r₂ + …)
    h = x Aᵀ                    ∂L/∂A   = uᵀ x                          again one product, one read of x
    x is in h and in every y_i  ∂L/∂x   = u A + Σ g_i W_i               accumulated in one buffer

Products are in the dtype of x and accumulate in float32; A and B are float32 masters, as are their gradients. The small
terms come first: a product that starts from them rounds their sum once. A W in 4 bits is dequantized for each product.

LoRA: Hu et al. 2021, arXiv 2106.09685, section 4.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.nf4 import QuantizedTensor, product, product_with_low_rank, weight_to_save
from minilora.torch_helpers import as_output, without_autocast


@dataclass(frozen=True, eq=False)
class LoRAProduct:
    """One layer's x ↦ x Wᵀ + b + s (x Aᵀ) Bᵀ; W and b are frozen, and W is in the dtype of x or in 4 bits."""

    W: Tensor | QuantizedTensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    s: float

    def together(self, x: Tensor, parts: "Sequence[LoRAProduct]") -> tuple[Tensor, ...]:
        return fused_lora(x, parts)


def fused_lora(x: Tensor, parts: Sequence[LoRAProduct]) -> tuple[Tensor, ...]:
    """y_i (…, out_i) of every part for x (…, in), in the dtype of x."""
    Ws = [weight_to_save(part.W, x.dtype) if isinstance(part.W, QuantizedTensor) else part.W for part in parts]
    in_4_bits = [W if isinstance(W, QuantizedTensor) else None for W in Ws]
    whole = [W if isinstance(W, Tensor) else None for W in Ws]
    # Tensors are arguments of their own, so that torch.compile and autograd know them.
    tensors = [*whole, *(p.bias for p in parts), *(p.A for p in parts), *(p.B for p in parts)]
    ys = _FusedLoRA.apply(x.reshape(-1, x.shape[-1]), in_4_bits, [part.s for part in parts], *tensors)
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)


def runs_as_written(x: Tensor) -> bool:
    """False where the steps must be PyTorch's own: autocast casts each, torch.func's transforms map each."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return False
    return x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type)


class _FusedLoRA(torch.autograd.Function):
    """x and the outputs are matrices here; tensors are all W, all b, all A, all B, where a W in 4 bits is among qs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, qs: list[QuantizedTensor | None], scales: list[float], *tensors: Any
    ) -> tuple[Tensor, ...]:
        Ws, bs, As, Bs = _by_kind(tensors)
        h = x @ torch.cat(As).to(x.dtype).T
        ys = []
        for W, q, b, s, B, h_i in zip(Ws, qs, bs, scales, Bs, h.split(_ranks(As), dim=1), strict=True):
            b = None if b is None else b.to(x.dtype)
            ys.append(as_output(product_with_low_rank(x, q if W is None else W, b, h_i, (s * B).to(x.dtype))))

        need_x, need_A, need_B = _needed(ctx)
        ctx.qs, ctx.scales = qs, scales
        ctx.save_for_backward(
            x if need_A else None, h if need_B else None, *(W if need_x else None for W in Ws), *As, *Bs
        )
        return tuple(ys)

    @staticmethod
    @once_differentiable  # h is saved without how it came from x and A; torch.func differentiates as often as asked
    def backward(ctx: Any, *gs: Tensor) -> tuple[Any, ...]:
        with without_autocast(gs[0].device):  # there was none in the forward pass
            return _gradients(ctx, gs)


def _gradients(ctx: Any, gs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """The gradients of _FusedLoRA's arguments, from g_i = ∂L/∂y_i; None where frozen or not asked for."""
    n, dtype, qs, scales = len(gs), gs[0].dtype, ctx.qs, ctx.scales
    x, h, *rest = ctx.saved_tensors
    Ws, As, Bs = rest[:n], rest[n : 2 * n], rest[2 * n :]
    need_x, need_A, need_B = _needed(ctx)
    grad_x = None
    grad_As: Sequence[Tensor | None] = [None] * n
    grad_Bs: Sequence[Tensor | None] = [None] * n

    if need_B:  # ∂L/∂B_i = s_i g_iᵀ h_i; a CPU is faster at (h_iᵀ g_i)ᵀ
        hs = h.split(_ranks(As), dim=1)
        grad_Bs = [s * (h_i.T @ g).T.to(B.dtype) for s, h_i, g, B in zip(scales, hs, gs, Bs, strict=True)]
    if need_x or need_A:  # u_i = s_i g_i B_i
        u = torch.cat([g @ (s * B).to(dtype) for s, g, B in zip(scales, gs, Bs, strict=True)], dim=1)
    if need_A:  # ∂L/∂A = uᵀ x
        dA = u.T @ x
        grad_As = [rows.to(A.dtype) for rows, A in zip(dA.split(_ranks(As)), As, strict=True)]
    if need_x:  # ∂L/∂x = u A + Σ g_i W_i
        grad_x = u @ torch.cat(As).to(dtype)
        for g, W, q in zip(gs, Ws, qs, strict=True):
            grad_x = product(g, q if W is None else W, grad_x, transpose=True, overwrite=True)
    return grad_x, None, None, *[None] * (2 * n), *grad_As, *grad_Bs


def _by_kind(values: Sequence[Any]) -> list[tuple[Any, ...]]:
    """What belongs to the layers' W, to their b, to their A and to their B."""
    n = len(values) // 4
    return [tuple(values[i : i + n]) for i in range(0, 4 * n, n)]


def _needed(ctx: Any) -> tuple[bool, bool, bool]:
    """Whether a gradient is asked for of x, of any A, and of any B."""
    x, _, _, *tensors = ctx.needs_input_grad
    _, _, As, Bs = _by_kind(tensors)
    return x, any(As), any(Bs)


def _ranks(As: Sequence[Tensor]) -> list[int]:
    return [len(A) for A in As]
