"""The keys and values of the tokens already seen, so that generation computes those of new tokens alone."""

import torch
from torch import Tensor

from minilora.models.config import ModelConfig


class KVCache:
    """Keys and values for at most `max_length` tokens a row, of which `length` are there.

    `keys[layer]` and `values[layer]` are (B, K, max_length, D). With `shared`, the cache of one row, every row begins
    with its tokens: they count in `length` and `max_length`, and are stored there alone.
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
        self.max_length = max_length
        shape = (batch_size, config.num_key_value_heads, max_length - self.begins_at, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append the (B, K, T, D) keys and values of new tokens to a layer; returns all of the rows' own."""
        tokens = self.length + key.shape[2]
        if tokens > self.max_length:
            raise ValueError(f"KVCache: {tokens} tokens do not fit its max_length of {self.max_length}")
        start, end = self.length - self.begins_at, tokens - self.begins_at
        self.keys[layer][:, :, start:end] = key
        self.values[layer][:, :, start:end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def prefix(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values (1, K, P, D) of the tokens in `shared`, None without any."""
        if self.shared is None or self.begins_at == 0:
            return None
        return self.shared.keys[layer][:, :, : self.begins_at], self.shared.values[layer][:, :, : self.begins_at]
