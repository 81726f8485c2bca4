"""The Transformer, and what the library knows of other libraries' models.

Read transformer.py first: Llama, SmolLM, Mistral and Qwen in one file, of rotary.py, rms_norm.py and swiglu.py.
attention.py says which keys a query sees, and tiled_attention.py computes it on a CPU; config.py reads config.json.
transformers_attention.py, deferred_logits.py and packed_sequences.py are for models of the transformers library.
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
