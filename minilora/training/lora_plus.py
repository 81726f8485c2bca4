"""LoRA+: B learns faster than A.

    A ← A − η_A g_A        B ← B − λ η_A g_B        λ = η_B / η_A, of the order of 16

B starts at zero and A does not, so at one learning rate for both, wide layers learn their features too slowly.

Hayou, Ghosh & Yu 2024, arXiv 2402.12354, section 4; the groups are those of PEFT's `create_loraplus_optimizer`.
"""

from typing import Any

from torch import nn

from minilora.adapters import EmbeddingKind, adapter_parameters, adapters_named


def parameter_groups(
    model: nn.Module,
    name: str = "default",
    *,
    lr: float,
    lr_ratio: float,
    lr_embedding: float = 1e-6,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """The adapter's trainable parameters in groups for any torch optimizer: `AdamW(parameter_groups(model, …))`.

    lr is that of A; lora_B and vectors (magnitudes, biases) get lr · lr_ratio, and the matrices of embeddings
    lr_embedding; biases do not decay. Raises InputError where the model has no such adapter.
    """
    embeddings = tuple(f"{p}." for p, a in adapters_named(model, name).items() if isinstance(a.kind, EmbeddingKind))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for path, parameter in adapter_parameters(model, name).items():
        if not parameter.requires_grad:
            continue
        if path.startswith(embeddings) and parameter.ndim > 1:
            rate = lr_embedding
        else:
            rate = lr * lr_ratio if parameter.ndim == 1 or path.endswith(".lora_B") else lr
        key = (rate, 0.0 if path.endswith("bias") else weight_decay)
        groups.setdefault(key, []).append(parameter)
    return [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()]
