"""Causal attention by matrix products, tile by tile, which on a CPU are faster than scaled_dot_product_attention.

    packed sequences of             keys →
    3 and 2 tiles                   ◣               ◣  up to the query's own position: a small mask is added
                        queries ↓   ■ ◣             ■  seen whole: nothing is added
                                    ■ ■ ◣              the rest comes later, or in another sequence: not computed
                                          ◣
                                          ■ ◣

B is the batch, T the tokens, H the query heads, K the key-value heads, G = H / K, D a head's size. The G query heads of
one key head are rows of one matrix, token by token, so that k is never repeated.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Queries in a tile. Forward and backward on one core, 9 heads of 64, ms with 64 / 128 / 256 / all queries in a tile:
# bfloat16, 4 rows of 512: 29 / 28 / 31 / 47, one of 2048: 91 / 89 / 87 / 315 (scaled_dot_product_attention: 183);
# float32, 65 / 69 / 84 / 135 and 224 / 237 / 323 / 747 (236).
TILE = 128
# A tile of at most so many keys saves its probabilities for backward. Those of a long sequence are recomputed: that is
# a quarter of its attention's time, and saved they would take more memory than all else that a block saves.
SAVED_KEYS = 256


def tiled_causal_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int | None) -> Tensor:
    """softmax(q kᵀ / √D) v, where a token sees the last `window` tokens of its sequence (None: all), up to itself.

    q (B, H, T, D), k and v (B, K, T, D) -> (B, H, T, D), query head h on key head h // G. Each of the B rows holds
    packed sequences of these `lengths`, T in sum.
    """
    tiles = tuple(_tiles(lengths, window))
    device = q.device.type
    if not torch.is_autocast_enabled(device):
        y: Tensor = _TiledCausalAttention.apply(q, k, v, tiles, window)
        return y
    # Autocast would give the products another dtype than the steps between them, and not in backward.
    q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    with torch.autocast(device, enabled=False):
        return _TiledCausalAttention.apply(q, k, v, tiles, window)


class _Tile(NamedTuple):
    """The queries of positions start to stop, and the first key that one of them sees."""

    start: int
    stop: int
    first_key: int


def _tiles(lengths: Sequence[int], window: int | None) -> Iterator[_Tile]:
    for length, end in zip(lengths, accumulate(lengths), strict=True):
        first = end - length
        for start in range(first, end, TILE):
            first_key = first if window is None else max(first, start - window + 1)
            yield _Tile(start, min(start + TILE, end), first_key)


class _TiledCausalAttention(torch.autograd.Function):
    """In every tile S = q kᵀ / √D + mask, P = softmax(S) and y = P v. From g = ∂L/∂y it follows that

        ∂L/∂P = g vᵀ                              ∂L/∂S = P ∘ (∂L/∂P − rowsum(∂L/∂P ∘ P))
        ∂L/∂q = ∂L/∂S k / √D                      ∂L/∂k = Σ (∂L/∂S)ᵀ q / √D,   ∂L/∂v = Σ Pᵀ g

    with the sums over the tiles that see the key (Dao et al., arXiv 2205.14135, appendix B.2).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: tuple[_Tile, ...], window: int | None) -> Tensor:
        K = k.shape[1]
        scores = _Scores(q, k, window)
        values, y, saved = _by_key_head(v, K), torch.empty_like(scores.queries), []
        for tile in tiles:
            P = scores.softmax(tile)
            y[:, scores.rows(tile)] = torch.bmm(P, values[:, tile.first_key : tile.stop])
            saved.append(P if P.shape[-1] <= SAVED_KEYS else None)
        ctx.save_for_backward(q, k, v, *saved)
        ctx.tiles, ctx.window = tiles, window
        return _by_head(y, q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, *saved = ctx.saved_tensors
        K = k.shape[1]
        scores = _Scores(q, k, ctx.window)
        values, g = _by_key_head(v, K), _by_key_head(grad, K)
        dq = torch.empty_like(scores.queries)
        dk, dv = (torch.zeros_like(values, dtype=torch.promote_types(v.dtype, torch.float32)) for _ in range(2))
        for tile, P in zip(ctx.tiles, saved, strict=True):
            rows, keys = scores.rows(tile), slice(tile.first_key, tile.stop)
            P = scores.softmax(tile) if P is None else P
            dP = torch.bmm(g[:, rows], values[:, keys].mT)
            dS = torch._softmax_backward_data(dP, P, -1, P.dtype)  # in one pass over both
            dq[:, rows] = torch.bmm(dS, scores.keys[:, keys])
            dk[:, keys] += torch.bmm(dS.mT, scores.queries[:, rows])  # these queries are divided by √D already
            dv[:, keys] += torch.bmm(P.mT, g[:, rows])
        dq = _by_head(dq.mul_(scores.scale), q.shape)
        return dq, _by_head(dk.to(k.dtype), k.shape), _by_head(dv.to(v.dtype), v.shape), None, None


class _Scores:
    """q / √D (B K, T G, D) and k (B K, T, D), and the probabilities of one tile of them."""

    def __init__(self, q: Tensor, k: Tensor, window: int | None) -> None:
        K = k.shape[1]
        self.G = q.shape[1] // K
        self.scale = 1 / math.sqrt(q.shape[-1])
        self.queries = _by_key_head(q, K).mul_(self.scale)
        self.keys = _by_key_head(k, K)
        # band[i, reach + j] goes to query i of a tile and key j, counted from the tile's first query: 0 if it is seen
        self.reach = 0 if window is None else window - 1
        band = q.new_full((TILE, self.reach + TILE), -math.inf)
        self.band = band.triu(self.reach + 1)
        if window is not None:
            self.band += band.tril(-1)

    def rows(self, tile: _Tile) -> slice:
        """Where the tile's queries are, all heads of a token together."""
        return slice(tile.start * self.G, tile.stop * self.G)

    def softmax(self, tile: _Tile) -> Tensor:
        """P of a tile (B K, queries G, keys)."""
        queries, before = tile.stop - tile.start, tile.start - tile.first_key
        S = torch.bmm(self.queries[:, self.rows(tile)], self.keys[:, tile.first_key : tile.stop].mT)
        # Without a window, all keys before the tile are seen, and nothing is added to their scores.
        masked = min(before, self.reach)
        band = self.band[:queries, self.reach - masked : self.reach + queries]
        S.unflatten(1, (queries, self.G))[..., before - masked :].add_(band[:, None])
        return S.softmax(-1)


def _by_key_head(x: Tensor, K: int) -> Tensor:
    """(B, heads, T, D) -> (B K, T heads/K, D), a copy: products of contiguous matrices are up to three times faster."""
    B, heads, T, D = x.shape
    copy = x.new_empty(B, K, T, heads // K, D)
    copy.copy_(x.unflatten(1, (K, heads // K)).transpose(2, 3))
    return copy.view(B * K, T * (heads // K), D)


def _by_head(x: Tensor, shape: torch.Size) -> Tensor:
    """(B K, T heads/K, D) -> (B, heads, T, D), in memory as (B, T, heads, D), as the model goes on with it."""
    B, heads, T, D = shape
    K = x.shape[0] // B
    return x.view(B, K, T, heads // K, D).transpose(1, 2).reshape(B, T, heads, D).transpose(1, 2)
