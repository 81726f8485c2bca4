"""One decoder-only Transformer for Llama, SmolLM, Mistral, Qwen2 and Qwen3, in pure PyTorch.

    tokens -> embed_tokens -> [ x + self_attn(input_layernorm(x)) ; x + mlp(post_attention_layernorm(x)) ] * N
           -> norm -> lm_head -> logits

Module names and state_dict keys are Hugging Face's, so a checkpoint's tensors fit by name.
B is the batch, T the new tokens, S = past + T, H the query heads, K the key-value heads, D the size of a head.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from minilora.errors import InputError
from minilora.gradient_checkpointing import checkpointed
from minilora.models.attention import Visible, attend, visible_keys
from minilora.models.config import ModelConfig
from minilora.models.kv_cache import KVCache
from minilora.models.offload import ActivationOffload
from minilora.models.rms_norm import RMSNorm
from minilora.models.rotary import default_positions, inverse_frequencies, rotary_tables, rotate
from minilora.models.shared_input import project, project_swiglu


class Attention(nn.Module):
    """Causal self-attention with grouped queries (Ainslie et al., arXiv 2305.13245) and rotary positions."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], visible: Visible, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        projected = project(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (each.view(B, T, -1, self.head_dim) for each in projected)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = rotate(q, *rope).transpose(1, 2), rotate(k, *rope).transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        y = attend(q, k, v, visible, None if cache is None else cache.prefix(self.layer))
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202, equation 6)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate_proj, self.up_proj)
        return project_swiglu(gate, up, self.down_proj)


class Block(nn.Module):
    """Attention, then feed-forward, each on a normalized copy of the residual stream that it adds to."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], visible: Visible, cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, visible, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything but the head; a module of its own because that is where Hugging Face's names have a `model.`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


def require_own_model(model: nn.Module, otherwise: str) -> None:
    """Raises InputError for a model that is not minilora's own, saying what to do otherwise."""
    if not isinstance(getattr(model, "config", None), ModelConfig):
        raise InputError(f"a {type(model).__name__} is not minilora's own model: {otherwise}")


class Transformer(nn.Module):
    """A causal language model.

    `gradient_checkpointing = True` saves each block's input alone for backward, which computes the block once more;
    `offload_activations = True` beside it keeps those inputs in CPU memory.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.offload_activations = False
        self.checkpoint_dtype: torch.dtype | None = None  # of the file that the weights came from
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        # A plain tensor, not a buffer: model.to(bfloat16) must not round the frequencies.
        self.inverse_frequencies = inverse_frequencies(config)

    def tie_weights(self) -> None:
        """Make the head share the embedding's weight, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        logits_at: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        head: bool = True,
    ) -> Tensor:
        """The logits (B, T, V), or (n, V) of n chosen positions. Logits at padded positions mean nothing.

        Args:
            input_ids: int64 (B, T).
            attention_mask: (B, S) of 0 and 1 as in transformers, padded left or right; None where nothing is padding.
            position_ids: (B, T); by default counted over the mask's ones, as transformers' generate does.
            cache: already holds past = S - T tokens, and receives the new ones.
            logits_at: bool (B, T), the positions whose logits are computed, in row-major order; None for all.
            lengths: those of the packed sequences in the one row of input_ids, each read by itself from position 0 on.
            head: False returns what lm_head would multiply, (B, T, hidden) or (n, hidden).
        """
        T = input_ids.shape[1]
        past = cache.length if cache is not None else 0
        if lengths is not None and (attention_mask is not None or cache is not None):
            raise ValueError("packed sequences take neither an attention_mask nor a cache")
        if lengths is not None and input_ids.shape != (1, sum(lengths)):
            raise ValueError(f"rows of {sum(lengths)} tokens in all do not fill input_ids {tuple(input_ids.shape)}")
        x = self.model.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = default_positions(attention_mask, lengths, past, T, x.device)
        self.inverse_frequencies = self.inverse_frequencies.to(x.device)
        rope = rotary_tables(position_ids, self.inverse_frequencies, x.dtype)
        visible = {
            window: visible_keys(attention_mask, lengths, past, T, window, like=x)
            for window in set(self.config.sliding_windows)
        }

        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled() and cache is None
        offload = ActivationOffload(x.device) if recompute and self.offload_activations else None
        for window, block in zip(self.config.sliding_windows, self.model.layers, strict=True):
            if recompute:
                with offload.keeping(x) if offload else nullcontext():
                    x = checkpointed(block, x, rope, visible[window], None)
            else:
                x = block(x, rope, visible[window], cache)
        if cache is not None:
            cache.length += T
        if logits_at is not None:
            x = x[logits_at]
        x = self.model.norm(x)
        return self.lm_head(x) if head else x
