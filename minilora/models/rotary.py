"""The positions of tokens, and rotary position embeddings (Su et al., arXiv 2104.09864, section 3.2.2).

(x_i, x_{i+D/2}) is rotated by the angle position · θ_i,  θ_i = base^(−2i/D),  i < D/2
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minilora.models.config import ModelConfig


def default_positions(
    attention_mask: Tensor | None, lengths: Sequence[int] | None, past: int, T: int, device: torch.device
) -> Tensor:
    """Positions (B or 1, T): a token's count among the real tokens of its row, as in transformers' generate."""
    if lengths is not None:
        return row_positions(lengths).to(device)
    if attention_mask is None:
        return torch.arange(past, past + T, device=device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]


def row_positions(lengths: Sequence[int]) -> Tensor:
    """Positions (1, T) of packed sequences: each counts from 0."""
    return torch.cat([torch.arange(length) for length in lengths])[None]


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """The D/2 frequencies θ in radians a position, float32.

    "linear" divides all of them by `factor`; "llama3" divides only the slow ones (wavelengths beyond the original
    context) and blends in between, as Llama 3.1's reference code does.
    """
    D = config.head_dim
    # computed on the CPU even when the model is built on the meta device
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
    """cos and sin of position · θ, each (B, T, 1, D): computed in float32, then rounded to the activations' dtype."""
    angles = position_ids[:, :, None, None].float() * theta
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, heads, D) rotated: x_i cos − x_{i+D/2} sin and x_{i+D/2} cos + x_i sin.

    The first half of the table of sines carries the minus.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
