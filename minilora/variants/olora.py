"""OLoRA: start with an orthonormal B, from the QR decomposition of W.

    W = Q R
    B₀ = Q[:, :r]     A₀ = R[:r]     training starts where ΔW = s·(BA − B₀A₀) is zero

Büyükakyüz 2024, arXiv 2406.01775, section 3.
"""

import torch
from torch import nn

from minilora.adapters import LoRA, register_initialization, weight_to_decompose


@register_initialization("olora")
def olora(adapter: LoRA, layer: nn.Module) -> None:
    """A₀, B₀ from the first r columns of Q and rows of R. W stays as it is."""
    Q, R = torch.linalg.qr(weight_to_decompose(adapter, layer))
    adapter.start_from(R[: adapter.r], Q[:, : adapter.r])
