"""minilora/models/swiglu.py against PyTorch's own steps, bit for bit, and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.models.swiglu import swiglu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_output_and_gradients_are_those_of_the_steps_and_two_tensors_are_saved(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate, up = (3 * torch.randn(4, 7, 9).to(dtype) for _ in range(2))
    upstream = torch.randn(4, 7, 9).to(dtype)

    def results(function: object) -> tuple[list[Tensor], int]:
        leaves, saved = [t.clone().requires_grad_() for t in (gate, up)], []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, upstream)], len(saved)

    (ours, two), (steps, three) = results(swiglu), results(lambda gate, up: F.silu(gate) * up)
    assert (two, three) == (2, 3)
    for a, b in zip(ours, steps, strict=True):
        assert torch.equal(a, b)


def test_gradients_equal_finite_differences() -> None:
    gate, up = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))
