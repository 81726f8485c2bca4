"""Small random models of every architecture in transformers, and minilora's copy of them."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from minilora.models.config import ModelConfig
from minilora.models.transformer import Transformer

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

SMALL = SHAPE | {"num_hidden_layers": 2, "pad_token_id": 0}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
HEADS_4 = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4}

# Of more architectures: what they do between body and head, after the head, with positions and in attention differs.
OTHER_CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4, output_router_logits=True),
    "phi": PhiConfig(**SMALL),  # a head with a bias
    "phi3": Phi3Config(**SMALL, sliding_window=5),
    "gpt2": GPT2Config(**HEADS_4, **NO_DROPOUT),
    "gpt-neox": GPTNeoXConfig(**SMALL),
    "gemma3": Gemma3TextConfig(
        **SMALL,
        head_dim=16,
        query_pre_attn_scalar=30,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "cohere": CohereConfig(**SMALL, logit_scale=0.3),
    "cohere2": Cohere2Config(**SMALL, sliding_window=5),
    "granite": GraniteConfig(**SMALL, logits_scaling=3.0, attention_multiplier=0.3, embedding_multiplier=2.0),
    "gemma2": Gemma2Config(**SMALL, head_dim=16, sliding_window=5, final_logit_softcapping=2.0),
    "opt": OPTConfig(**SMALL, ffn_dim=112, word_embed_proj_dim=32, dropout=0.0),
    "falcon": FalconConfig(**SMALL, alibi=True),
    "bloom": BloomConfig(vocab_size=97, hidden_size=64, n_layer=2, n_head=4),
    "bert": BertConfig(**SMALL, is_decoder=True),  # a layer between body and head
    "bart": BartConfig(vocab_size=97, d_model=64, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=112),
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
