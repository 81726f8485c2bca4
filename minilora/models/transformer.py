"""One decoder-only Transformer for Llama, SmolLM, Mistral, Qwen2 and Qwen3, in pure PyTorch.

    tokens -> embed_tokens -> [ x + self_attn(input_layernorm(x)) ; x + mlp(post_attention_layernorm(x)) ] * N
           -> norm -> lm_head -> logits

Module names and state_dict keys are Hugging Face's, so a checkpoint's tensors fit by name.
B is the batch, T the new tokens, S = past + T, H the query heads, K the key-value heads, D the size of a head.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minilora.errors import InputError
from minilora.models.attention import Visible, attend, visible_keys
from minilora.models.config import ModelConfig
from minilora.models.offload import ActivationOffload
from minilora.models.shared_input import project, project_swiglu
from minilora.torch_helpers import as_output, checkpointed

__all__ = ["KVCache", "ModelConfig", "Transformer"]


class RMSNorm(nn.Module):
    """Root-mean-square normalization over the last dimension (Zhang & Sennrich, arXiv 1910.07467, equation 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
        return y


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number a row for the way back; autograd's own steps keep three copies, two of them in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # y = w · x r, with r = 1 / sqrt(mean(x²) + eps); all in float32 up to the product with w
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        r = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, r)
        return as_output((x32 * r).to(x.dtype).mul_(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, r = ctx.saved_tensors
        normalized = x.to(r.dtype) * r
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normalized).flatten(0, -2).sum(0).to(weight.dtype)
        # ∂L/∂x = r (g - x r · mean(g · x r)), with g = w · ∂L/∂y
        g = (grad * weight).to(r.dtype)
        projection = (g * normalized).mean(-1, keepdim=True)
        return g.addcmul_(normalized, projection, value=-1).mul_(r).to(x.dtype), grad_weight, None


class KVCache:
    """Keys and values of the tokens already seen, for at most `max_length` tokens a row; `length` are there.

    `keys[layer]` and `values[layer]` are (B, K, max_length, D). With `shared`, the cache of one row, every row begins
    with its tokens: they count in `length` and `max_length`, and lie there alone.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        shared: "KVCache | None" = None,
    ) -> None:
        self.shared = shared
        self.begins_at: int = 0 if shared is None else shared.length
        self.length: int = self.begins_at
        shape = (batch_size, config.num_key_value_heads, max_length - self.begins_at, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.max_length = max_length

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append the (B, K, T, D) keys and values of new tokens to a layer; all of the rows' own come back."""
        if self.length + key.shape[2] > self.max_length:
            tokens = self.length + key.shape[2]
            raise ValueError(f"KVCache: {tokens} tokens do not fit its max_length of {self.max_length}")
        start = self.length - self.begins_at
        end = start + key.shape[2]
        self.keys[layer][:, :, start:end] = key
        self.values[layer][:, :, start:end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def prefix(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values (1, K, P, D) of what all rows begin with, where that lies apart."""
        if self.shared is None or self.begins_at == 0:
            return None
        return self.shared.keys[layer][:, :, : self.begins_at], self.shared.values[layer][:, :, : self.begins_at]


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
        prefix = None
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
            prefix = cache.prefix(self.layer)
        y = attend(q, k, v, visible, prefix)
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
    """A causal language model; `gradient_checkpointing = True` trades a second forward of each block for its memory.

    `offload_activations = True` beside it keeps what is then left of each block, its input, in CPU memory.

    forward: `input_ids` (B, T) int64; `attention_mask` (B, S) of 0 and 1 as in transformers, padded left or right,
    None where nothing is padding; `position_ids` (B, T), by default counted over the mask's ones, as
    transformers' generate does; `cache` a KVCache that already holds past = S - T tokens and receives the new ones;
    `lengths` those of several rows laid end to end in one sequence (B = 1, without mask and cache): each is then read
    by itself, from position 0 on.
    Returns the logits (B, T, V), or with a bool mask `logits_at` (B, T) only the chosen positions' (n, V), in row-major
    order: the head, a fifth of a small model's work, then runs only there. Logits at padded positions mean nothing.
    With head=False, what lm_head would multiply, (B, T, hidden) or (n, hidden).
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
        T = input_ids.shape[1]
        past = cache.length if cache is not None else 0
        if lengths is not None:
            _check_end_to_end(input_ids, lengths, attention_mask, cache)
        x = self.model.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = default_positions(attention_mask, lengths, past, T, x.device)
        self.inverse_frequencies = self.inverse_frequencies.to(x.device)
        rope = rotary_tables(position_ids, self.inverse_frequencies, x.dtype)
        visible = {
            window: visible_keys(attention_mask, lengths, past, T, window, x.dtype, x.device)
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


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """The D/2 rotary frequencies in radians a position, float32 (Su et al., arXiv 2104.09864, section 3.2.2).

    "linear" divides all of them by `factor`; "llama3" divides only the slow ones (wavelengths beyond the original
    context) and blends in between, as Llama 3.1's reference code does.
    """
    D = config.head_dim
    # θ_i = base^(-2i/D); computed on the CPU even when the model is built on the meta device
    theta = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, dtype=torch.float32, device="cpu") / D)
    scaling = config.rope_scaling
    if scaling is None:
        return theta
    if scaling["rope_type"] == "linear":
        return theta / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * theta / (2 * math.pi)  # over the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * theta / scaling["factor"] + smooth * theta


def rotary_tables(position_ids: Tensor, theta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * θ, each (B, T, 1, D): computed in float32, then rounded to the activations' dtype."""
    angles = position_ids[:, :, None, None].float() * theta
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i+D/2}) of x (B, T, heads, D) by the angles of their position.

    x_i cos - x_{i+D/2} sin and x_{i+D/2} cos + x_i sin; the first half of the table of sines carries the minus.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def default_positions(
    attention_mask: Tensor | None, lengths: Sequence[int] | None, past: int, T: int, device: torch.device
) -> Tensor:
    """Positions (B or 1, T): a token's count among the real tokens of its row, as transformers' generate has it."""
    if lengths is not None:
        return row_positions(lengths).to(device)
    if attention_mask is None:
        return torch.arange(past, past + T, device=device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]


def _check_end_to_end(
    input_ids: Tensor, lengths: Sequence[int], attention_mask: Tensor | None, cache: KVCache | None
) -> None:
    if attention_mask is not None or cache is not None:
        raise ValueError("rows laid end to end take neither an attention_mask nor a cache")
    if input_ids.shape != (1, sum(lengths)):
        raise ValueError(f"rows of {sum(lengths)} tokens in all do not fill input_ids {tuple(input_ids.shape)}")


def row_positions(lengths: Sequence[int]) -> Tensor:
    """Positions (1, T) of rows laid end to end: each counts from 0."""
    return torch.cat([torch.arange(length) for length in lengths])[None]
