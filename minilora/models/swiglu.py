"""SwiGLU's product, h = silu(gate) · up, which saves gate and up alone for backward (Shazeer, arXiv 2002.05202).

    σ = sigmoid(gate)       silu(gate) = gate σ
    ∂L/∂up   = ∂L/∂h · silu(gate)
    ∂L/∂gate = ∂L/∂h · up · σ (1 + gate (1 − σ))

Autograd's own steps would save silu(gate) too; here it is computed again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.torch_helpers import as_output


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, of any shape, each step in the dtype of both: as the models in transformers compute it."""
    h: Tensor = _SwiGLU.apply(gate, up)
    return h


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return as_output(F.silu(gate).mul_(up))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)
