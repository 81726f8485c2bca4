"""Small random models of every architecture in transformers, and minilora's copy of them."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from minilora.model import ModelConfig, Transformer

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # short, so that some frequencies fall in each of the three bands
}
LINEAR = {"rope_type": "linear", "factor": 4.0}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama-one-kv-head": LlamaConfig(**SHAPE | {"num_key_value_heads": 1}),
    "llama-no-gqa": LlamaConfig(**SHAPE | {"num_key_value_heads": 4}),
    "llama-bias": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, head_dim=24),
    "llama3-rope": LlamaConfig(**SHAPE, rope_parameters={"rope_theta": 5e5, **LLAMA3}),
    "linear-rope": LlamaConfig(**SHAPE, rope_parameters={"rope_theta": 1e4, **LINEAR}),
    "smollm": LlamaConfig(**SHAPE, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "mistral": MistralConfig(**SHAPE, sliding_window=None, head_dim=24),
    "mistral-window": MistralConfig(**SHAPE, sliding_window=5),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen2-window": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": Qwen3Config(**SHAPE, head_dim=20, tie_word_embeddings=True),
    "qwen3-window": Qwen3Config(
        **SHAPE,
        head_dim=16,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}


def transformers_model(config: PreTrainedConfig, seed: int = 0) -> Any:
    """Weights large enough that the softmaxes are far from uniform; norms, biases too are random."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()  # a model writes its dtype into it
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def our_model(theirs: Any) -> Transformer:
    model = Transformer(ModelConfig.from_hf(theirs.config.to_dict())).eval().to(theirs.dtype)
    model.load_state_dict(theirs.state_dict())
    return model


def relative_error(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())
