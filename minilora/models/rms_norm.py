"""Root-mean-square normalization (Zhang & Sennrich, arXiv 1910.07467, equation 4), with its own backward pass.

    y = w · x r,  r = 1 / sqrt(mean(x²) + eps)         all in float32 up to the product with w
    ∂L/∂x = r (g − x r · mean(g · x r))                with g = w · ∂L/∂y
    ∂L/∂w = Σ_tokens ∂L/∂y · x r

Autograd would save three tensors of x's size, two of them in float32; here x and one number a token are saved.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minilora.torch_helpers import as_output


class RMSNorm(nn.Module):
    """Normalizes over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
        return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        r = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, r)
        return as_output((x32 * r).to(x.dtype).mul_(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, r = ctx.saved_tensors
        normalized = x.to(r.dtype) * r
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normalized).flatten(0, -2).sum(0).to(weight.dtype)
        g = (grad * weight).to(r.dtype)
        projection = (g * normalized).mean(-1, keepdim=True)
        return g.addcmul_(normalized, projection, value=-1).mul_(r).to(x.dtype), grad_weight, None
