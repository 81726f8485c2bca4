"""VeRA: one frozen random pair A, B for all layers, and two learnt vectors for each.

    y = W x + b + Λ_b B Λ_d A x      A (r, in), B (out, r): cut from the shared pair; Λ = diag(λ), λ_b (out,), λ_d (r,)

λ_b = 0 at the start, so that the update is zero; λ_d is a small constant.

Kopiczko, Blankevoort and Asano 2024, arXiv 2310.11454, equation 2 and section 3.3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from minilora.adapters import Adapter, AdapterConfig, at_least_float32, kind_of, register
from minilora.errors import InputError


@dataclass(frozen=True, kw_only=True)
class VeRAConfig(AdapterConfig):
    """The settings of VeRA, in the names and defaults of PEFT's `VeraConfig`.

    Raises:
        InputError: where a value is out of range.
    """

    peft_type: ClassVar[str] = "VERA"
    peft_lacks: ClassVar[frozenset[str]] = frozenset({"exclude_modules", "lora_bias"})

    r: int = 256
    """rank of the update, at a cost of one number for each: larger than LoRA's"""
    projection_prng_key: int = 0
    """seed from which A and B are drawn"""
    save_projection: bool = True
    """write A and B into the adapter's file; False draws them again on loading"""
    vera_dropout: float = 0.0
    """probability with which an input of A is dropped in training"""
    d_initial: float = 0.1
    """where λ_d starts"""
    init_weights: bool = True
    """False starts at λ_b = 1 and a random λ_d, for tests"""
    bias: str = "none"
    """biases that train, each adapter's own: "none", "vera_only" (of the layers with VeRA) or "all" (of the model)"""
    fan_in_fan_out: bool = False
    """kept for PEFT's adapter_config.json: whether W is stored as (in, out) shows in the layer itself"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("r", isinstance(self.r, int) and self.r >= 1, "a whole number of at least 1")
        self.require("vera_dropout", 0 <= self.vera_dropout < 1, "at least 0 and below 1")
        if self.bias not in ("none", "vera_only", "all"):
            raise InputError(f"VeRAConfig: bias={self.bias!r} is not one of 'none', 'vera_only', 'all'")


class Projections(nn.Module):
    """The frozen A (r, largest in_features) and B (largest out_features, r), drawn as PEFT draws them."""

    A: Tensor
    B: Tensor

    def __init__(self, config: VeRAConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
        for name, shape in (("A", (config.r, in_features)), ("B", (out_features, config.r))):
            matrix = torch.empty(shape, dtype=torch.float32, device="cpu")
            self.register_buffer(name, nn.init.kaiming_uniform_(matrix, generator=generator), config.save_projection)


@register
class VeRA(Adapter):
    """vera_lambda_b (out_features,) and vera_lambda_d (r,) of one linear layer, and the pair that all layers share."""

    config_class = VeRAConfig

    def __init__(self, layer: nn.Module, config: VeRAConfig, path: str, shared: Projections) -> None:
        super().__init__(layer, config, path)
        self.shared = shared
        self.dropout = nn.Dropout(config.vera_dropout)
        self.vera_lambda_b = nn.Parameter(torch.ones(self.kind.out_features, dtype=torch.float32))
        self.vera_lambda_d = nn.Parameter(torch.randn(config.r, dtype=torch.float32))
        if config.init_weights:
            nn.init.zeros_(self.vera_lambda_b)
            nn.init.constant_(self.vera_lambda_d, config.d_initial)

    @classmethod
    def share(cls, config: VeRAConfig, layers: Mapping[str, nn.Module]) -> Projections:
        kinds = {path: kind_of(layer) for path, layer in layers.items()}
        linear = [kind for kind in kinds.values() if kind is not None and kind.is_linear]
        if len(linear) < len(kinds):
            path = next(path for path, kind in kinds.items() if kind is None or not kind.is_linear)
            raise InputError(f"{path} is a {type(layers[path]).__name__}: VeRA adapts linear layers only")
        return Projections(config, max(k.in_features for k in linear), max(k.out_features for k in linear))

    def projections(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of this layer: the first columns and rows of the shared ones, in its own dtype."""
        A, B = self.shared.A[:, : self.kind.in_features], self.shared.B[: self.kind.out_features]
        return A.to(self.vera_lambda_b), B.to(self.vera_lambda_b)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Λ_b B Λ_d A dropout(x) (+ add), the products in the dtype of x."""
        A, B = self.projections()
        h = self.kind.apply(self.dropout(x), A.to(x.dtype))
        h = (self.vera_lambda_d * h).to(x.dtype)
        return self.kind.pointwise(h, (self.vera_lambda_b[:, None] * B).to(x.dtype), add)

    def delta(self) -> Tensor:
        """Λ_b B Λ_d A (out, in)."""
        A, B = (at_least_float32(projection) for projection in self.projections())
        return (self.vera_lambda_b[:, None] * B) @ (self.vera_lambda_d[:, None] * A)

    def shared_tensors(self) -> dict[str, Tensor]:
        return {"vera_A": self.shared.A, "vera_B": self.shared.B} if self.config.save_projection else {}

    def extra_repr(self) -> str:
        return f"r={self.config.r}"
