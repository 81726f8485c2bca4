"""DoRA: the weight split into its magnitude, which is learnt freely, and its direction, which LoRA changes.

    V  = W + s·BA                     (out, in)
    W' = m · V / ‖V‖                  ‖V‖ (out,): the norm of each output's weights; m starts as ‖W‖
    y  = (m / ‖V‖) · (W x + s·BA x) + b

‖V‖ follows V but takes no gradient: the gradient of y flows through m, A and B alone, which costs no extra memory.

Liu et al. 2024, arXiv 2402.09353: equation 5, and section 4.3 for the norm held constant.
"""

import torch
from torch import Tensor, nn

from minilora.adapters import AdapterConfig, Below, ConvKind, LoRA, LoRAConfig, register
from minilora.torch_helpers import without_autocast


@register
class DoRA(LoRA):
    """LoRA with a learnt magnitude: lora_magnitude_vector (out_features,), for a convolution (1, out, 1, …)."""

    additive = False
    held_constant = ("_norm",)

    def __init__(self, layer: nn.Module, config: LoRAConfig, path: str = "") -> None:
        super().__init__(layer, config, path)
        with torch.no_grad():
            W = self.kind.weight(self.base_for(layer))
            V = W + self.delta().to(W.device)  # A and B are drawn on the CPU, and follow later
            self.lora_magnitude_vector = nn.Parameter(self._norm(V))

    @classmethod
    def handles(cls, config: AdapterConfig) -> bool:
        return super().handles(config) and isinstance(config, LoRAConfig) and config.use_dora

    def _direction(self, W: Tensor) -> Tensor:
        """V = W + s·BA."""
        return super().merged_weight(W)

    def _norm(self, V: Tensor) -> Tensor:
        """‖V‖ over all that feeds one output, in the shape in which it multiplies y."""
        norm = torch.linalg.vector_norm(V.flatten(1), dim=1)
        return norm.view(1, -1, *[1] * (V.dim() - 2)) if isinstance(self.kind, ConvKind) else norm

    def transform(self, x: Tensor, below: Below, add: Tensor | None = None) -> Tensor:
        """(m / ‖V‖) (W x + s·BA x) + b (+ add)."""
        with torch.no_grad(), without_autocast(x.device):
            norm = self._norm(self._direction(below.weight()))
        y = below(x, self(x))
        scale = self.lora_magnitude_vector / _divisor(norm)  # float32, as is all until y is rounded once, in its dtype
        scaled = scale * y
        bias = below.bias()  # y holds it, and it is not to be scaled
        if bias is not None:
            bias = bias.view(1, -1, *[1] * (y.dim() - 2)) if isinstance(self.kind, ConvKind) else bias
            scaled = scaled + (1 - scale) * bias
        y = scaled.to(y.dtype)
        return y if add is None else y + add

    def merged_weight(self, W: Tensor) -> Tensor:
        V = self._direction(W)
        scale = (self.lora_magnitude_vector / _divisor(self._norm(V))).flatten()
        return V * scale.view(-1, *[1] * (V.dim() - 1))


def _divisor(norm: Tensor) -> Tensor:
    """The norm, or 1 for an output whose weights are all zero, pruned ones: m is 0 too, and 0/0 would be NaN."""
    return torch.where(norm == 0, 1, norm)
