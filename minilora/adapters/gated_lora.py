"""The low-rank term of a layer after SwiGLU, as one function that saves SwiGLU's factors for backward, not the product.

    x = silu(gate) · up                                 (M, in), as are gate and up
    h = x Aᵀ
    y₀ = b + s h Bᵀ                                     then y = y₀ + x Wᵀ is any frozen layer's product, made elsewhere

Saved for backward: gate, up and h; x is computed again. With g = ∂L/∂y₀, and p = ∂L/∂x of what else x goes into, the
product with W:

    ∂L/∂B = s gᵀ h              u := ∂L/∂h = s g B
    ∂L/∂A = uᵀ x                ∂L/∂x = p + u A
    ∂L/∂up = ∂L/∂x · silu(gate)
    ∂L/∂gate = ∂L/∂x · up · silu′(gate)

The product with W is separate because it saves nothing for backward: gradient checkpointing recomputes a block up to
the last saved tensor, and so does not make the block's last product, a quarter of an MLP block's work, in vain.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.torch_helpers import as_output, without_autocast


def gated_lora(gate: Tensor, up: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """x (M, in) and y₀ (M, out) for gate and up (M, in), in their dtype; A (r, in), B (out, r), frozen b (out,)."""
    x, y = _GatedLoRA.apply(gate, up, b, A, B, s)
    return x, y


class _GatedLoRA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float
    ) -> tuple[Tensor, Tensor]:
        x = F.silu(gate).mul_(up)
        h = x @ A.to(x.dtype).T
        ctx.s = s
        ctx.save_for_backward(gate, up, h if ctx.needs_input_grad[4] else None, A, B)
        return as_output(x), F.linear(h, (s * B).to(x.dtype), b)

    @staticmethod
    @once_differentiable  # as in fused_lora
    def backward(ctx: Any, p: Tensor, g: Tensor) -> tuple[Any, ...]:
        gate, up, h, A, B = ctx.saved_tensors
        s, dtype = ctx.s, g.dtype
        grad_A = grad_B = None
        with without_autocast(g.device):
            silu = F.silu(gate)
            u = g @ (s * B).to(dtype)
            if ctx.needs_input_grad[4]:
                grad_B = s * (h.T @ g).T.to(B.dtype)
            if ctx.needs_input_grad[3]:
                grad_A = (u.T @ (silu * up)).to(A.dtype)
            grad_x = torch.addmm(p, u, A.to(dtype))
        return torch.ops.aten.silu_backward(grad_x * up, gate), grad_x * silu, None, grad_A, grad_B, None
