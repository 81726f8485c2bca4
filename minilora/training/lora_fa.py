"""LoRA-FA: A stays as it was drawn, and only B learns; the layer saves A x (r numbers a token) for backward, not x.

    g_W = ∂L/∂W (out, in)             what training W itself would follow
    g_B = s · g_W Aᵀ                  what B gets; it moves W by s·g_B A = s² g_W Aᵀ A
    ĝ_B = 1/s² · g_B (A Aᵀ)⁻¹         the ĝ_B whose s·ĝ_B A comes nearest to g_W: least squares

AdamW then takes ĝ_B in the place of g_B.

Zhang et al. 2023, arXiv 2308.03303, section 3; the projection as in PEFT's `create_lorafa_optimizer`, which computes
it in bfloat16 where it can. Here it is float32.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from minilora.adapters import EmbeddingKind, LoRA, Part, adapter_parameters, adapters_named
from minilora.errors import InputError


class LoRAFA(torch.optim.AdamW):
    """AdamW over one adapter of a model whose A it freezes, with the gradient of every B projected before each step.

    Args:
        model: a model with the adapter.
        name: the adapter's name; it must be a LoRA.
        settings: AdamW's other arguments, such as `lr` and `weight_decay`.

    Raises:
        InputError: the model has no such adapter, or it is not a LoRA, or sits on an embedding, whose A starts at zero.

    Source: Zhang et al. 2023, arXiv 2308.03303, section 3.
    """

    def __init__(self, model: nn.Module, name: str = "default", **settings: Any) -> None:
        self.loras = loras_to_freeze(model, name)
        for lora in self.loras:
            lora.lora_A.requires_grad_(False)
        super().__init__([p for p in adapter_parameters(model, name).values() if p.requires_grad], **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Project the gradients of all B, then step as AdamW does."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for lora in self.loras:
            if lora.lora_B.grad is not None:
                lora.lora_B.grad.copy_(projected(lora))
        super().step()
        return loss


def loras_to_freeze(model: nn.Module, name: str = "default") -> list[LoRA]:
    """The LoRAs of an adapter that `LoRAFA` can train; raises InputError where it cannot, and nothing is changed."""
    loras = []
    for path, adapter in adapters_named(model, name).items():
        if isinstance(adapter, Part):  # biases, copies of modules and rows of embeddings follow AdamW
            continue
        if not isinstance(adapter, LoRA) or isinstance(adapter.kind, EmbeddingKind):
            raise InputError(
                f"LoRA-FA needs an A that does not start at zero; {path} carries a {type(adapter).__name__}"
            )
        loras.append(adapter)
    return loras


def projected(lora: LoRA) -> torch.Tensor:
    """ĝ_B = 1/s² · g_B (A Aᵀ + 1e-8)⁻¹ for the gradient that lora_B has; shape of lora_B."""
    A, g_B = lora.lora_A.flatten(1), lora.lora_B.grad
    assert g_B is not None
    groups = len(A) // g_B.shape[1]  # of a convolution: those rows of B have their own rows of A; else 1
    A, g = A.unflatten(0, (groups, -1)), g_B.flatten(1).unflatten(0, (groups, -1))
    A_A = A @ A.mT + 1e-8 * torch.eye(A.shape[1], dtype=A.dtype, device=A.device)  # (groups, r, r); term as in PEFT
    return torch.linalg.solve(A_A, g, left=False).view_as(g_B) / lora.scaling**2
