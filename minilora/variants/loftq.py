"""LoftQ: quantize W to NF4, and start A and B at what the quantization lost.

    A₀B₀ = 0;  for t = 1 … T
        Q_t = NF4(W − s·B_{t−1}A_{t−1})                  quantize what the update does not hold
        s·B_tA_t = SVD_r(W − Q_t)                        the best rank-r fit of what Q_t does not hold
    W ≈ Q_T + s·B_TA_T, nearer than NF4(W) alone; a few iterations are enough, and many need not be better

This initialisation changes the base too: an NF4Linear that holds Q_T takes the place of the dense layer, whose W is
given up. Adapters switched off, or taken off with `unload`, leave Q_T. The adapter belongs on this Q_T and no other.

Li et al. 2023, arXiv 2310.08659, section 3, algorithm 1. The update is meant with its scaling s here; PEFT 0.21
leaves s out, so that its s·BA makes up for the loss only where lora_alpha = r.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minilora.adapters import LoRA, NF4Kind, register_initialization, weight_to_decompose
from minilora.errors import InputError
from minilora.nf4 import NF4Linear, dequantize, quantize
from minilora.variants.pissa import halves


@dataclass(frozen=True)
class LoftQOptions:
    """loftq_config of LoRAConfig."""

    loftq_bits: int = 4
    """4, for NF4; PEFT has 8 too"""
    loftq_iter: int = 1
    """how often Q and BA are fitted in turn: T"""

    def __post_init__(self) -> None:
        if self.loftq_bits != 4:
            raise InputError(f"loftq_bits={self.loftq_bits!r}: only 4 bits, NF4, are supported")
        if not isinstance(self.loftq_iter, int) or self.loftq_iter < 1:
            raise InputError(f"loftq_iter must be a whole number of at least 1, not {self.loftq_iter!r}")


@register_initialization("loftq", options=LoftQOptions)
def loftq(adapter: LoRA, layer: nn.Module) -> None:
    """A, B, and an NF4Linear with Q for the layer's place. The absmax are not quantized again, as in PEFT."""
    if isinstance(layer, NF4Linear):
        raise InputError(
            "needs the full weights, and the layer is in 4 bits already: load the model without quantize="
            " (LoftQ quantizes the layers itself), or initialize with True"
        )
    W = weight_to_decompose(adapter, layer)
    s, BA = adapter.scaling, torch.zeros_like(W)
    for _ in range(adapter.config.init_options.loftq_iter):
        packed = quantize(W - s * BA, double_quant=False)
        U, S, Vh = torch.linalg.svd(W - dequantize(packed, torch.float32), full_matrices=False)
        A, B = halves(U, S, Vh, adapter.r, s)
        BA = B @ A
    adapter.lora_A.copy_(A)
    adapter.lora_B.copy_(B)
    weight, bias = layer.weight, layer._parameters.get("bias")
    assert isinstance(weight, Tensor)
    quantized = NF4Linear.from_quantized(packed, bias, compute_dtype=weight.dtype).train(layer.training)
    adapter.new_base, adapter.kind = (quantized,), NF4Kind(quantized)
