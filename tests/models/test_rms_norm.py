"""minilora/models/rms_norm.py against PyTorch's own, and finite differences."""

import torch
from torch import nn

from minilora.models.rms_norm import RMSNorm


def test_rms_norm_against_torch() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(12, eps=1e-3).double()
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    expected = nn.functional.rms_norm(x, (12,), norm.weight, eps=1e-3)
    assert torch.allclose(norm(x), expected, rtol=1e-12)  # float64 rounding
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(norm, {"weight": w}, (x,)), (x, norm.weight)
    )
