"""What LoHa and LoKr have in common: a ΔW made of small factors, in full size before it meets x, and their dropouts.

    y = W x + b + s·ΔW x                      s = α/r
    rank dropout      ΔW = diag(k) ΔW         k (out,): 0 with probability p, drawn in every training step
    module dropout    ΔW = 0                  with probability p

Yeh et al. 2023 (LyCORIS), arXiv 2309.14859, section 3.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minilora.adapters import Adapter, AdapterConfig, ConvKind, at_least_float32, first_match
from minilora.errors import InputError


@dataclass(frozen=True, kw_only=True)
class LycorisConfig(AdapterConfig):
    """The settings of LoHa and LoKr, in PEFT's names and defaults."""

    peft_lacks: ClassVar[frozenset[str]] = frozenset({"bias", "lora_bias"})

    r: int = 8
    """rank of each factor's product"""
    alpha: float = 8
    """the update is scaled by alpha / r"""
    rank_dropout: float = 0.0
    """probability with which an output of the update is dropped in training"""
    module_dropout: float = 0.0
    """probability with which the whole update of a layer is dropped in training"""
    use_effective_conv2d: bool = False
    """one more small factor for the kernel of a convolution, instead of a matrix (in·kernel) wide"""
    init_weights: bool | str = True
    """True: one factor is zero, so that the update is. False: all are random, for tests"""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """another r for the layers whose name a pattern ends"""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """another alpha for the layers whose name a pattern ends"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for r in (self.r, *self.rank_pattern.values()):
            if not isinstance(r, int) or r < 1:
                raise InputError(f"{type(self).__name__}: a rank must be a whole number of at least 1, not {r!r}")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if not isinstance(alpha, int | float):
                raise InputError(f"{type(self).__name__}: alpha must be a number, not {alpha!r}")
        for key in ("rank_dropout", "module_dropout"):
            self.require(key, 0 <= getattr(self, key) < 1, "at least 0 and below 1")
        self.check_init_weights()

    def check_init_weights(self) -> None:
        self.require("init_weights", isinstance(self.init_weights, bool), "True or False")


class Lycoris(Adapter):
    """An adapter whose ΔW is `update()`: a subclass implements that alone, in the `shape` (out, in/groups, *kernel)."""

    rescales_rows = True  # rank dropout makes up for what it dropped

    def __init__(self, layer: nn.Module, config: Any, path: str = "") -> None:
        super().__init__(layer, config, path)
        is_conv = isinstance(self.kind, ConvKind) and len(self.kind.shape) in (3, 4)
        if not (self.kind.is_linear or is_conv):
            raise InputError(
                f"{path or 'the layer'} is a {type(layer).__name__}: {config.peft_type} adapts linear layers and"
                " 1d and 2d convolutions"
            )
        out_features, in_features, *kernel = self.kind.shape
        self.shape = (out_features, in_features // getattr(self.kind, "groups", 1), *kernel)
        self.r = first_match(config.rank_pattern, path, config.r)
        self.scaling = first_match(config.alpha_pattern, path, config.alpha) / self.r
        # a kernel of one point is a matrix already
        self.factors_kernel = config.use_effective_conv2d and max(kernel, default=1) > 1

    def reset_parameters(self, zero: Collection[str]) -> None:
        """Kaiming-uniform all factors but those named, in the order in which PEFT draws."""
        for name, factor in self.named_parameters():
            if name in zero:
                nn.init.zeros_(factor)
            else:
                nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    def update(self) -> Tensor:
        """ΔW/s in the order of W's elements, and of as many."""
        raise NotImplementedError

    def float32_factors(self) -> dict[str, Tensor]:
        """The parameters by name, in float32, in which ΔW is made even where the masters were made bfloat16."""
        return {name: at_least_float32(factor) for name, factor in self._parameters.items() if factor is not None}

    def delta(self) -> Tensor:
        return self.scaling * self.update().reshape(self.shape)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """s·ΔW x (+ add), in the dtype of x."""
        dW = self.drop(self.delta()) if self.training else self.delta()
        y = self.kind.apply(x, dW.to(x.dtype))
        return y if add is None else add + y

    def drop(self, dW: Tensor) -> Tensor:
        """The update with module dropout and rank dropout: drawn as PEFT draws, but only where there is a dropout."""
        if self.config.module_dropout > 0:  # a factor, not an `if` on the number drawn: it compiles
            dW = dW * (torch.rand(1, device=dW.device) > self.config.module_dropout)
        if self.config.rank_dropout > 0:
            kept = (torch.rand(len(dW), device=dW.device) > self.config.rank_dropout).to(dW.dtype)
            if self.rescales_rows:
                kept = kept / kept.mean().clamp(min=1 / len(dW))  # the mean, unless nothing is kept
            dW = dW * kept.view(-1, *[1] * (dW.dim() - 1))
        return dW

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}"


def empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32))
