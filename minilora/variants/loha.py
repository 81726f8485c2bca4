"""LoHa: the elementwise product of two low-rank matrices, whose rank can be r² for the parameters of rank 2r.

    ΔW = (A₁ B₁) ⊙ (A₂ B₂)                           A (out, r), B (r, in·kernel)
    ΔW = (T₁ ×₁ A₁ᵀ ×₂ B₁ᵀ) ⊙ (T₂ ×₁ A₂ᵀ ×₂ B₂ᵀ)     use_effective_conv2d: T (r, r, *kernel), A (r, out), B (r, in)

Hyeon-Woo et al. 2022 (FedPara), arXiv 2108.06098: propositions 1 and 3; for fine-tuning: Yeh et al. 2023 (LyCORIS),
arXiv 2309.14859, section 3.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from minilora.adapters import register
from minilora.variants.lycoris import Lycoris, LycorisConfig, empty


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(LycorisConfig):
    """The settings of LoHa, in the names and defaults of PEFT's `LoHaConfig`.

    Raises:
        InputError: where a value is out of range.
    """

    peft_type: ClassVar[str] = "LOHA"


@register
class LoHa(Lycoris):
    """hada_w1_a, hada_w2_a (out, r) and hada_w1_b, hada_w2_b (r, in·kernel), which starts at zero in the second pair.

    With use_effective_conv2d: (r, out), (r, in), and hada_t1, hada_t2 (r, r, *kernel), as PEFT stores them: a 1d kernel
    as (kernel, 1).
    """

    config_class = LoHaConfig

    def __init__(self, layer: nn.Module, config: LoHaConfig, path: str = "") -> None:
        super().__init__(layer, config, path)
        r, (out_features, in_features, *kernel) = self.r, self.shape
        if self.factors_kernel:
            self.hada_w1_a, self.hada_w1_b = empty(r, out_features), empty(r, in_features)
            self.hada_w2_a, self.hada_w2_b = empty(r, out_features), empty(r, in_features)
            self.hada_t1 = empty(r, r, *kernel, *[1] * (2 - len(kernel)))
            self.hada_t2 = empty(*self.hada_t1.shape)
        else:
            self.hada_w1_a, self.hada_w1_b = empty(out_features, r), empty(r, in_features * math.prod(kernel))
            self.hada_w2_a, self.hada_w2_b = empty(out_features, r), empty(r, in_features * math.prod(kernel))
        self.reset_parameters(zero=["hada_w2_b"] if config.init_weights else [])

    def update(self) -> Tensor:
        p = self.float32_factors()
        A1, B1, A2, B2 = p["hada_w1_a"], p["hada_w1_b"], p["hada_w2_a"], p["hada_w2_b"]
        if self.factors_kernel:
            return tucker(p["hada_t1"], A1, B1) * tucker(p["hada_t2"], A2, B2)
        return (A1 @ B1) * (A2 @ B2)


def tucker(T: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """T ×₁ Aᵀ ×₂ Bᵀ (out, in, k, l) for T (r, r, k, l), A (r, out), B (r, in)."""
    return torch.einsum("ijkl,io,jn->onkl", T, A, B)
