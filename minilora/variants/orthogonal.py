"""Orthogonal start: neither A nor B is zero, and yet BA is.

    Q (r, r) random orthogonal     A = Q_oddᵀ X / 10     B = Y Q_even / 10     X (r/2, in), Y (out, r/2) ~ N(0, 1)
    BA = Y Q_even Q_oddᵀ X / 100 = 0, as the rows of Q are orthogonal

PEFT has it from a blog post, https://datta0.github.io/posts/rethink-lora-init/, section "Orthogonal initialisation".
"""

import torch
from torch import nn

from minilora.adapters import LoRA, register_initialization, require_linear
from minilora.errors import InputError


@register_initialization("orthogonal")
def orthogonal(adapter: LoRA, layer: nn.Module) -> None:
    """A, B random with BA = 0. The same seed draws the same as PEFT."""
    require_linear(adapter, layer)
    r, (out_features, in_features) = adapter.r, adapter.kind.shape
    if r % 2:
        raise InputError(f"needs an even r, not {r}: half of A's directions pair with the other half of B's")
    Q = torch.linalg.qr(torch.randn(r, r, dtype=torch.float32)).Q  # a QR has no half-precision form
    adapter.lora_A.copy_((torch.randn(in_features, r // 2, dtype=torch.float32) @ Q[0::2]).T / 10)
    adapter.lora_B.copy_(torch.randn(r // 2, out_features, dtype=torch.float32).T @ Q[1::2] / 10)
