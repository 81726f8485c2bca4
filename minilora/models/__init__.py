"""The Transformer, and what the library knows of other libraries' models.

Read transformer.py first: Llama, SmolLM, Mistral and Qwen, built from rotary.py, rms_norm.py, swiglu.py and
attention.py, which says what keys a query sees (tiled_attention.py computes it on a CPU). config.py reads config.json,
kv_cache.py is for generation, offload.py and shared_input.py save memory. packed_sequences.py says which models can
pack; transformers_attention.py and deferred_logits.py are for models of the transformers library.
"""

from minilora.models.config import ModelConfig
from minilora.models.deferred_logits import DeferredLogits, deferring_logits
from minilora.models.kv_cache import KVCache
from minilora.models.packed_sequences import can_pack
from minilora.models.rotary import inverse_frequencies, row_positions
from minilora.models.transformer import Transformer, require_own_model
from minilora.models.transformers_attention import attention_row_by_row

__all__ = [
    "DeferredLogits",
    "KVCache",
    "ModelConfig",
    "Transformer",
    "attention_row_by_row",
    "can_pack",
    "deferring_logits",
    "inverse_frequencies",
    "require_own_model",
    "row_positions",
]
