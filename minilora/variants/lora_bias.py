"""LoRA with a bias of B: y = W x + b + s·(B A x + b_B).

b_B (out,) starts at zero and trains. Merged, it is part of the layer's bias: b' = b + s·b_B.

PEFT's `lora_bias=True`, which is for adapters that were taken out of models trained in full (peft 0.21.2, LoraConfig).
"""

import math

import torch
from torch import Tensor, nn

from minilora.adapters import AdapterConfig, EmbeddingKind, LoRA, LoRAConfig, register
from minilora.errors import InputError


@register
class LoRAWithBias(LoRA):
    """LoRA with lora_B_bias (out_features,)."""

    def __init__(self, layer: nn.Module, config: LoRAConfig, path: str = "") -> None:
        super().__init__(layer, config, path)
        if isinstance(self.kind, EmbeddingKind):
            raise InputError(f"{path}: lora_bias=True is not for an embedding")
        if config.init_lora_weights is True:
            nn.init.zeros_(self.lora_B_bias)

    @classmethod
    def handles(cls, config: AdapterConfig) -> bool:
        return super().handles(config) and isinstance(config, LoRAConfig) and config.lora_bias

    def draw(self) -> None:
        """After A and B, as PEFT's layers draw them."""
        super().draw()
        bound = 1 / math.sqrt(self.lora_B[0].numel())
        self.lora_B_bias = nn.Parameter(
            torch.empty(self.kind.out_features, dtype=torch.float32).uniform_(-bound, bound)
        )

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """s·(B A dropout(x) + b_B) (+ add)."""
        y = super().forward(x, add)
        along_channels = [1] * (len(self.kind.shape) - 2)
        return y + (self.scaling * self.lora_B_bias).to(y.dtype).view(-1, *along_channels)

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        update = self.scaling * self.lora_B_bias
        return update if bias is None else bias + update

    def as_plain(self) -> LoRA:
        raise InputError("lora_bias=True has no plain LoRA that is equal to it")

    def peft_name(self, name: str) -> str:
        return "lora_B.bias" if name == "lora_B_bias" else super().peft_name(name)
