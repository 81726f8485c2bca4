"""(IA)³: one learnt factor for each activation, so few numbers that the whole adapter is some kilobytes.

    y = l · (W x + b)          l (out,) scales what keys and values give
    y = W (l · x) + b          l (in,) scales what a feed-forward block's last layer takes

l = 1 at the start. Merged: the rows of W and b, or the columns of W, times l.

Liu et al. 2022, arXiv 2205.05638, section 3.3: softmax(q (l_k · k)ᵀ/√d) (l_v · v), and W₂ (l_ff · γ(W₁ x)).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minilora.adapters import Adapter, AdapterConfig, Below, ConvKind, EmbeddingKind, register
from minilora.errors import InputError


@dataclass(frozen=True, kw_only=True)
class IA3Config(AdapterConfig):
    """Which layers to scale, in the names of PEFT's `IA3Config`.

    Raises:
        InputError: where feedforward_modules is not given.
    """

    peft_type: ClassVar[str] = "IA3"
    peft_lacks: ClassVar[frozenset[str]] = frozenset({"bias", "lora_bias", "layers_to_transform", "layers_pattern"})

    feedforward_modules: str | list[str] | None = None
    """the target layers whose inputs are scaled, not their outputs: ends of names, or one regular expression for a
    whole name; [] for none"""
    init_ia3_weights: bool = True
    """start at l = 1; False draws l from N(0, 1), for tests"""
    fan_in_fan_out: bool = False
    """kept for PEFT's adapter_config.json: whether W is stored as (in, out) shows in the layer itself"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feedforward_modules is None:
            raise InputError(
                'IA3Config: name the layers whose inputs are scaled in feedforward_modules, such as ["down_proj"],'
                " or give [] to scale every layer's output"
            )

    def is_feedforward(self, path: str) -> bool:
        """True if the layer at `path` has its input scaled."""
        if isinstance(self.feedforward_modules, str):
            return re.fullmatch(self.feedforward_modules, path) is not None
        return path.endswith(tuple(self.feedforward_modules or []))


@register
class IA3(Adapter):
    """ia3_l: (out, 1), or (1, in) in a feed-forward layer; for a convolution (1, channels, 1, …)."""

    config_class = IA3Config
    additive = False

    def __init__(self, layer: nn.Module, config: IA3Config, path: str = "") -> None:
        super().__init__(layer, config, path)
        if isinstance(self.kind, EmbeddingKind):
            raise InputError(f"{path or 'the layer'} is an embedding: (IA)³ scales linear layers and convolutions")
        self.is_feedforward = config.is_feedforward(path)
        channels = self.kind.in_features if self.is_feedforward else self.kind.out_features
        shape: tuple[int, ...] = (1, channels) if self.is_feedforward else (channels, 1)
        if isinstance(self.kind, ConvKind):
            shape = (1, channels, *[1] * (len(self.kind.shape) - 2))
        self.ia3_l = nn.Parameter(torch.randn(shape, dtype=torch.float32))
        if config.init_ia3_weights:
            nn.init.ones_(self.ia3_l)

    @classmethod
    def share(cls, config: IA3Config, layers: Mapping[str, nn.Module]) -> None:
        """Nothing; but here is where a misspelled name would go unnoticed."""
        names = config.feedforward_modules
        for name in names if isinstance(names, list) else []:
            if not any(path.endswith(name) for path in layers):
                raise InputError(f"feedforward_modules: {name!r} is the end of no target layer's name")

    def _scale(self, activations: Tensor) -> Tensor:
        """l · activations, in their dtype; l stands along the channels."""
        scale = self.ia3_l if isinstance(self.kind, ConvKind) else self.ia3_l.flatten()
        return (activations * scale).to(activations.dtype)

    def transform(self, x: Tensor, below: Below, add: Tensor | None = None) -> Tensor:
        if self.is_feedforward:
            return below(self._scale(x), add)  # W (l · x) + b (+ add)
        y = self._scale(below(x))  # l · (W x + b)
        return y if add is None else y + add

    def merged_weight(self, W: Tensor) -> Tensor:
        kernel = [1] * (W.dim() - 2)
        if not self.is_feedforward:
            return W * self.ia3_l.view(-1, 1, *kernel)  # the rows of W (out, in / groups, *kernel)
        groups = self.kind.in_features // W.shape[1]  # in each of which the columns are other inputs
        return (W.unflatten(0, (groups, -1)) * self.ia3_l.view(groups, 1, -1, *kernel)).flatten(0, 1)

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        if bias is None or self.is_feedforward:
            return bias
        return (bias * self.ia3_l.flatten()).to(bias.dtype)

    @classmethod
    def peft_values(cls, values: dict[str, Any], adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        # PEFT wants feedforward_modules to be a part of target_modules, where both are lists. An expression for the
        # same ends of names need not be.
        names, targets = values["feedforward_modules"], values["target_modules"]
        if isinstance(names, list) and names and not set(names) <= set(targets):
            return values | {"feedforward_modules": "|".join(f".*{re.escape(name)}" for name in names)}
        return values
