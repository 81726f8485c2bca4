"""LoRA on frozen linear layers that share their input, as one function with its own way back.

    y_i = x W_iᵀ + b_i + s_i (x A_iᵀ) B_iᵀ              x (M, in), W_i (out_i, in), A_i (r_i, in), B_i (out_i, r_i)

Kept for the way back: x, and h = x Aᵀ (M, r₁ + r₂ + …) with A the A_i one above the other, so that h is one product,
with one read of x. W_i and b_i are frozen. With g_i = ∂L/∂y_i, the chain rule gives

    y_i = … + s_i h_i B_iᵀ      ∂L/∂B_i = s_i g_iᵀ h_i
                                ∂L/∂h_i = s_i g_i B_i =: u_i            side by side: u (M, r₁ + r₂ + …)
    h = x Aᵀ                    ∂L/∂A   = uᵀ x                          again one product, one read of x
    x is in h and in every y_i  ∂L/∂x   = u A + Σ g_i W_i               accumulated in one buffer

Where x = silu(gate) · up, as in the last layer of an MLP, gate and up are kept, and x is computed again.

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
from minilora.linear4bit import nf4_product_onto
from minilora.nf4 import QuantizedTensor


@dataclass(frozen=True, eq=False)
class LoRAProduct:
    """One layer's x ↦ x Wᵀ + b + s (x Aᵀ) Bᵀ; W and b are frozen, and W is in the dtype of x or in 4 bits."""

    W: Tensor | QuantizedTensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    s: float

    def together(self, x: Tensor, gate: Tensor | None, parts: "Sequence[LoRAProduct]") -> tuple[Tensor, ...]:
        return fused_lora(x, gate, parts)


def fused_lora(x: Tensor, gate: Tensor | None, parts: Sequence[LoRAProduct]) -> tuple[Tensor, ...]:
    """y_i (…, out_i) of every part for x (…, in), or for silu(gate) · x where there is a gate, in the dtype of x."""
    factors = [factor for part in parts for factor in (part.A, part.B)]
    frozen = [(part.W, part.bias, part.s) for part in parts]
    ys = _FusedLoRA.apply(_rows(x), None if gate is None else _rows(gate), frozen, *factors)
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def runs_as_written(x: Tensor) -> bool:
    """False where the steps must be PyTorch's own: autocast casts each, torch.func's transforms map each."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return False
    return x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type)


class _FusedLoRA(torch.autograd.Function):
    """x, gate and the outputs are matrices here; frozen holds (W, b, s) of each layer, factors its A and its B."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor | None, frozen: list[tuple[Any, Tensor | None, float]], *factors: Tensor
    ) -> tuple[Tensor, ...]:
        As, Bs = factors[0::2], factors[1::2]
        X = x if gate is None else F.silu(gate).mul_(x)
        h = X @ _stacked(As, x.dtype).T
        ys = []
        for (W, b, s), B, h_i in zip(frozen, Bs, h.split(_ranks(As), dim=1), strict=True):
            y = F.linear(h_i, (s * B).to(x.dtype), None if b is None else b.to(x.dtype))
            ys.append(_product_onto(y, X, W))

        need_x, need_A, need_B = _needed(ctx)
        keep_x = need_A or (need_x and gate is not None)
        ctx.frozen = [(W if isinstance(W, QuantizedTensor) else None, s) for W, _, s in frozen]
        ctx.save_for_backward(
            x if keep_x else None,
            gate if keep_x else None,
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
    """∂L/∂x, ∂L/∂gate, None, and ∂L/∂A_i, ∂L/∂B_i of each layer, from g_i = ∂L/∂y_i; None where not asked for."""
    n, dtype = len(gs), gs[0].dtype
    x, gate, h, *rest = ctx.saved_tensors
    Ws, As, Bs = rest[:n], rest[n::2], rest[n + 1 :: 2]
    need_x, need_A, need_B = _needed(ctx)
    qs, scales = zip(*ctx.frozen, strict=True)
    grad_x = grad_gate = None
    grad_As: Sequence[Tensor | None] = [None] * n
    grad_Bs: Sequence[Tensor | None] = [None] * n

    if need_B:  # ∂L/∂B_i = s_i g_iᵀ h_i; a CPU is faster at (h_iᵀ g_i)ᵀ
        hs = h.split(_ranks(As), dim=1)
        grad_Bs = [s * (h_i.T @ g).T.to(B.dtype) for s, h_i, g, B in zip(scales, hs, gs, Bs, strict=True)]
    if need_x or need_A:  # u_i = s_i g_i B_i
        u = torch.cat([g @ (s * B).to(dtype) for s, g, B in zip(scales, gs, Bs, strict=True)], dim=1)
    if gate is not None:  # what is kept of silu(gate) · up
        up, silu = x, F.silu(gate)
        x = silu * up
    if need_A:  # ∂L/∂A = uᵀ x
        dA = u.T @ x
        grad_As = [rows.to(A.dtype) for rows, A in zip(dA.split(_ranks(As)), As, strict=True)]
    if need_x:  # ∂L/∂x = u A + Σ g_i W_i
        grad_x = u @ _stacked(As, dtype)
        for g, W, q in zip(gs, Ws, qs, strict=True):
            grad_x = _product_onto(grad_x, g, q if W is None else W, transpose=True)
        if gate is not None:  # ∂L/∂gate = ∂L/∂x · up · silu′(gate), and ∂L/∂up = ∂L/∂x · silu(gate)
            grad_gate, grad_x = torch.ops.aten.silu_backward(grad_x * up, gate), grad_x * silu
    return grad_x, grad_gate, None, *(grad for pair in zip(grad_As, grad_Bs, strict=True) for grad in pair)


def _needed(ctx: Any) -> tuple[bool, bool, bool]:
    """Whether a gradient is asked for of x (or of the gate), of any A, and of any B."""
    x, gate, _, *factors = ctx.needs_input_grad
    return x or gate, any(factors[0::2]), any(factors[1::2])


def _ranks(As: Sequence[Tensor]) -> list[int]:
    return [len(A) for A in As]


def _stacked(As: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All A_i one above the other, (r₁ + r₂ + …, in)."""
    return (As[0] if len(As) == 1 else torch.cat(list(As))).to(dtype)


def _product_onto(y: Tensor, rows: Tensor, W: Tensor | QuantizedTensor, transpose: bool = False) -> Tensor:
    """y + rows Wᵀ, or with `transpose` y + rows W; y may be overwritten."""
    if isinstance(W, QuantizedTensor):
        return nf4_product_onto(y, rows, W, transpose)
    return y.addmm_(rows, W if transpose else W.T)
