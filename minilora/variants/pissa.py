"""PiSSA: start from the r largest singular values of W and their vectors, not from zero.

    W = U S Vᵀ
    A₀ = √(S_r / s) V_rᵀ     B₀ = U_r √(S_r / s)     s·B₀A₀ = U_r S_r V_rᵀ, the best rank-r part of W

"pissa" takes the whole decomposition, "pissa_niter_4" a randomized one with 4 iterations, in a fraction of the time.

Meng et al. 2024, arXiv 2404.02948, section 3, equations 2 to 4. The randomized one: minilora/torch_helpers.py.
"""

import torch
from torch import Tensor, nn

from minilora.adapters import LoRA, register_initialization, weight_to_decompose
from minilora.torch_helpers import randomized_svd


@register_initialization("pissa(_niter_[0-9]+)?")
def pissa(adapter: LoRA, layer: nn.Module) -> None:
    """A₀, B₀ from the principal part of W, which stays as it is: ΔW = s·(BA − B₀A₀)."""
    W = weight_to_decompose(adapter, layer)
    niter = adapter.config.init_lora_weights.removeprefix("pissa").removeprefix("_niter_")
    if niter:
        U, S, Vh = randomized_svd(W, adapter.r, int(niter))
    else:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    adapter.start_from(*halves(U, S, Vh, adapter.r, adapter.scaling))


def halves(U: Tensor, S: Tensor, Vh: Tensor, r: int, s: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with s·BA = U_r S_r V_rᵀ, each with the root of the singular values."""
    root = (S[:r] / s).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root
