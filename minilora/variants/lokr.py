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
from minilora.errors import InputError
from minilora.variants.loha import tucker
from minilora.variants.lycoris import Lycoris, LycorisConfig, empty, wide


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(LycorisConfig):
    """PEFT's `LoKrConfig`. Raises InputError for a value out of range."""

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
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            raise InputError(f"LoKrConfig: decompose_factor must be -1 or at least 1, not {self.decompose_factor!r}")

    def check_init_weights(self) -> None:
        if not isinstance(self.init_weights, bool) and self.init_weights != "lycoris":
            raise InputError(f'LoKrConfig: init_weights must be True, False or "lycoris", not {self.init_weights!r}')


NAMES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


@register
class LoKr(Lycoris):
    """lokr_w1 (a, b), or lokr_w1_a and lokr_w1_b; lokr_w2 (c, d, *kernel), or lokr_w2_a, lokr_w2_b and lokr_t2.

    lokr_t2 holds a 1d kernel as (kernel, 1), as in PEFT.
    """

    config_class = LoKrConfig
    lokr_w1: nn.Parameter | None
    lokr_w2: nn.Parameter | None
    lokr_t2: nn.Parameter | None

    def __init__(self, layer: nn.Module, config: LoKrConfig, path: str = "") -> None:
        super().__init__(layer, config, path)
        self.rescales_rows = config.rank_dropout_scale
        r, (out_features, in_features, *kernel) = self.r, self.shape
        a, c = factors(out_features, config.decompose_factor)
        b, d = factors(in_features, config.decompose_factor)
        for name in NAMES:
            self.register_parameter(name, None)
        if config.decompose_both and r < max(a, b) / 2:
            self.lokr_w1_a, self.lokr_w1_b = empty(a, r), empty(r, b)
        else:
            self.lokr_w1 = empty(a, b)
        if r >= max(c, d) / 2:
            self.lokr_w2 = empty(c, d, *kernel)
        elif self.factors_kernel:
            self.lokr_t2 = empty(r, r, *kernel, *[1] * (2 - len(kernel)))
            self.lokr_w2_a, self.lokr_w2_b = empty(r, c), empty(r, d)
        else:
            self.lokr_w2_a, self.lokr_w2_b = empty(c, r), empty(r, d * math.prod(kernel))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-uniform all but one factor, in the order in which PEFT draws."""
        zero = {"lycoris": ("lokr_w2", "lokr_w2_b"), True: ("lokr_w1", "lokr_w1_a"), False: ()}[
            self.config.init_weights
        ]
        for name in NAMES:
            factor = getattr(self, name)
            if factor is not None and name in zero:
                nn.init.zeros_(factor)
            elif factor is not None:
                nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    def update(self) -> Tensor:
        W1 = wide(self.lokr_w1) if self.lokr_w1 is not None else wide(self.lokr_w1_a) @ wide(self.lokr_w1_b)
        if self.lokr_w2 is not None:
            W2 = wide(self.lokr_w2)
        elif self.lokr_t2 is not None:
            W2 = tucker(wide(self.lokr_t2), wide(self.lokr_w2_a), wide(self.lokr_w2_b))
        else:
            W2 = wide(self.lokr_w2_a) @ wide(self.lokr_w2_b)
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
