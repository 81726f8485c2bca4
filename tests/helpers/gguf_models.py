"""Tiny models of the architectures that GGUF files are written of."""

from typing import Any

import torch
from helpers.models import CONFIGS, SHAPE, our_model, transformers_model
from torch import nn
from transformers import LlamaConfig

from minilora.adapters.attach import add_adapter
from minilora.adapters.lora_config import LoRAConfig
from minilora.models.transformer import Transformer
from minilora.nf4.linear import NF4Linear

VOCABULARY = 320  # tiny() has 307 tokens
WIDE = {**SHAPE, "vocab_size": VOCABULARY, "intermediate_size": 128}  # rows of whole blocks of 32
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS = {
    **{name: CONFIGS[name] for name in ("llama", "llama-bias", "linear-rope", "smollm", "mistral", "qwen2", "qwen3")},
    "llama3-rope": LlamaConfig(**WIDE, head_dim=64, max_position_embeddings=131072, rope_parameters=LLAMA3_ROPE),
}
IDS = [int(i) for i in torch.arange(12) * 5 % 97 + 20]
# Both compute in float32 and add in another order: 3e-6 was seen, of log-probabilities down to -8.
FLOAT32 = 2e-5


def model_of(config: Any) -> Transformer:
    return our_model(transformers_model(type(config)(**{**config.to_dict(), "vocab_size": VOCABULARY})))


def adapted(config: Any, nf4: bool = False, **lora: Any) -> Transformer:
    """A model, perhaps in NF4, with a LoRA on every linear layer that is not zero."""
    model = model_of(config)
    if nf4:
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and path != "lm_head":
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, NF4Linear.from_linear(module))
    add_adapter(model, LoRAConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **lora}))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model
