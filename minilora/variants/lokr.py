"""LoKr: a Kronecker product of a small and a larger matrix, the larger one of low rank: of high rank at few parameters.

    ΔW = W₁ ⊗ W₂      out = a·c, in = b·d: W₁ (a, b), W₂ (c, d, *kernel)
    W₁ = A₁ B₁        decompose_both, where that saves something: A₁ (a, r), B₁ (r, b)
    W₂ = A₂ B₂        where that saves something: A₂ (c, r), B₂ (r, d·kernel)
    W₂ = T₂ ×₁ A₂ᵀ ×₂ B₂ᵀ    use_effective_conv2d: T₂ (r, r, *kernel), A₂ (r, c), B₂ (r, d)

Yeh et al. 2023 (LyCORIS), arXiv 2309.14859, section 3.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from minilora.adapters import register
from minilora.variants.loha import tucker
from minilora.variants.lycoris import Lycoris, LycorisConfig, empty


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(LycorisConfig):
    """The settings of LoKr, in the names and defaults of PEFT's `LoKrConfig`.

    Raises:
        InputError: where a value is out of range.
    """

    peft_type: ClassVar[str] = "LOKR"

    decompose_both: bool = False
    """make W₁ of low rank too"""
    decompose_factor: int = -1
    """a and b: this number where it divides out or in, else the divisor below it nearest the root; -1: nearest the
    root"""
    rank_dropout_scale: bool = False
    """scale the rows that rank_dropout keeps, to make up for the others"""
    init_weights: bool | str = True
    """True: W₁ = 0. "lycoris": W₂ = 0, as the LyCORIS library starts. False: all are random, for tests"""

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range = self.decompose_factor == -1 or self.decompose_factor >= 1
        self.require("decompose_factor", in_range, "-1 or at least 1")

    def check_init_weights(self) -> None:
        is_known = isinstance(self.init_weights, bool) or self.init_weights == "lycoris"
        self.require("init_weights", is_known, 'True, False or "lycoris"')


@register
class LoKr(Lycoris):
    """lokr_w1 (a, b), or lokr_w1_a and lokr_w1_b; lokr_w2 (c, d, *kernel), or lokr_w2_a, lokr_w2_b and lokr_t2.

    lokr_t2 holds a 1d kernel as (kernel, 1), as in PEFT.
    """

    config_class = LoKrConfig

    def __init__(self, layer: nn.Module, config: LoKrConfig, path: str = "") -> None:
        super().__init__(layer, config, path)
        self.rescales_rows = config.rank_dropout_scale
        r, (out_features, in_features, *kernel) = self.r, self.shape
        a, c = factors(out_features, config.decompose_factor)
        b, d = factors(in_features, config.decompose_factor)
        if config.decompose_both and r < max(a, b) / 2:
            self.lokr_w1_a, self.lokr_w1_b = empty(a, r), empty(r, b)
        else:
            self.lokr_w1 = empty(a, b)
        if r >= max(c, d) / 2:
            self.lokr_w2 = empty(c, d, *kernel)
        elif self.factors_kernel:
            self.lokr_w2_a, self.lokr_w2_b = empty(r, c), empty(r, d)
            self.lokr_t2 = empty(r, r, *kernel, *[1] * (2 - len(kernel)))
        else:
            self.lokr_w2_a, self.lokr_w2_b = empty(c, r), empty(r, d * math.prod(kernel))
        zero = {True: ["lokr_w1", "lokr_w1_a"], "lycoris": ["lokr_w2", "lokr_w2_b"], False: []}[config.init_weights]
        self.reset_parameters(zero)

    def update(self) -> Tensor:
        p = self.float32_factors()
        W1 = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
        if "lokr_w2" in p:
            W2 = p["lokr_w2"]
        elif "lokr_t2" in p:
            W2 = tucker(p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"])
        else:
            W2 = p["lokr_w2_a"] @ p["lokr_w2_b"]
        if W2.dim() == 3:
            # W₂ (c, d, kernel) of a 1d convolution. PEFT multiplies its last two dimensions by W₁: the same products in
            # another order, and an adapter from there must mean the same here.
            return torch.einsum("ab,cdk->cadbk", W1, W2)
        return torch.einsum("ab,cx->acbx", W1, W2.flatten(1))  # W₁ ⊗ W₂, x over in/b and the kernel


def factors(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Two numbers whose product is the dimension, as near to its root as can be, the smaller one first.

    Or the given factor and the rest, where it divides the dimension; where not, it is the most for the smaller one.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    largest = math.isqrt(dimension) if factor == -1 else min(factor, math.isqrt(dimension))
    small = max(n for n in range(1, largest + 1) if dimension % n == 0)
    return small, dimension // small
