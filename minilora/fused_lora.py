"""LoRA on frozen linear layers that share their input, as one function with its own way back.

    y_i = x W_iᵀ + b_i + s_i (x A_iᵀ) B_iᵀ              x (M, in), W_i (out_i, in), A_i (r_i, in), B_i (out_i, r_i)

Kept for the way back: x, and h = x Aᵀ (M, r₁ + r₂ + …) with A the A_i one above the other, so that h is one product,
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
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.adapter import without_autocast
from minilora.linear4bit import product_onto, weight_to_save
from minilora.nf4 import QuantizedTensor


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
    frozen = [
        (weight_to_save(part.W, x.dtype) if isinstance(part.W, QuantizedTensor) else part.W, part.bias, part.s)
        for part in parts
    ]
    factors = [factor for part in parts for factor in (part.A, part.B)]
    ys = _FusedLoRA.apply(x.reshape(-1, x.shape[-1]), frozen, *factors)
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)


def runs_as_written(x: Tensor) -> bool:
    """False where the steps must be PyTorch's own: autocast casts each, torch.func's transforms map each."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return False
    return x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type)


class _FusedLoRA(torch.autograd.Function):
    """x and the outputs are matrices here; frozen holds (W, b, s) of each layer, factors its A and its B."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frozen: list[tuple[Tensor | QuantizedTensor, Tensor | None, float]], *factors: Tensor
    ) -> tuple[Tensor, ...]:
        As, Bs = factors[0::2], factors[1::2]
        h = x @ torch.cat(As).to(x.dtype).T
        ys = []
        for (W, b, s), B, h_i in zip(frozen, Bs, h.split(_ranks(As), dim=1), strict=True):
            y = F.linear(h_i, (s * B).to(x.dtype), None if b is None else b.to(x.dtype))
            ys.append(product_onto(y, x, W))

        need_x, need_A, need_B = _needed(ctx)
        ctx.frozen = [(W if isinstance(W, QuantizedTensor) else None, s) for W, _, s in frozen]
        ctx.save_for_backward(
            x if need_A else None,
            h if need_B else None,
            *(W if need_x and isinstance(W, Tensor) else None for W, _, _ in frozen),
            *factors,
        )
        return tuple(ys)

    @staticmethod
    @once_differentiable  # h is kept without how it came from x and A; torch.func differentiates as often as asked
    def backward(ctx: Any, *gs: Tensor) -> tuple[Any, ...]:
        with without_autocast(gs[0].device):  # there was none on the way forward
            return _gradients(ctx, gs)


def _gradients(ctx: Any, gs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """∂L/∂x, None, and ∂L/∂A_i, ∂L/∂B_i of each layer, from g_i = ∂L/∂y_i; None where not asked for."""
    n, dtype = len(gs), gs[0].dtype
    x, h, *rest = ctx.saved_tensors
    Ws, As, Bs = rest[:n], rest[n::2], rest[n + 1 :: 2]
    qs, scales = zip(*ctx.frozen, strict=True)
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
            grad_x = product_onto(grad_x, g, q if W is None else W, transpose=True)
    return grad_x, None, *(grad for pair in zip(grad_As, grad_Bs, strict=True) for grad in pair)


def _needed(ctx: Any) -> tuple[bool, bool, bool]:
    """Whether a gradient is asked for of x, of any A, and of any B."""
    x, _, *factors = ctx.needs_input_grad
    return x, any(factors[0::2]), any(factors[1::2])


def _ranks(As: Sequence[Tensor]) -> list[int]:
    return [len(A) for A in As]
