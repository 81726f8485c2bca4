"""Causal attention with grouped queries: which keys a query sees, and softmax(q kᵀ / √D) v of those, device by device.

B is the batch, T the new tokens, S = past + T, H the query heads, K the key-value heads, G = H / K, D a head's size.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.models.tiled_attention import tiled_causal_attention

# On a CPU the written-out product with a mask is the faster one up to here (a prompt's 8 x 100 tokens in bfloat16, 9
# heads on one core: 3 ms a layer against 4); beyond, its T x S scores cost too much memory.
LONGEST_WRITTEN_OUT = 1024


@dataclass(frozen=True)
class CausalRows:
    """No mask is needed: packed sequences of these lengths, in each of which a token sees those up to itself.

    `window` is how many tokens it sees at most, itself included; None where that is all of them.
    """

    lengths: tuple[int, ...]
    window: int | None


# What a query sees: a mask to add to its scores, or the rule above, or (None) everything.
Visible = Tensor | CausalRows | None


def visible_keys(
    attention_mask: Tensor | None, lengths: Sequence[int] | None, past: int, T: int, window: int | None, like: Tensor
) -> Visible:
    """Which of the S keys T new tokens see; where it must be, as a mask (B or 1, 1, T, S) of 0 and -inf.

    `attention_mask` (B, S) is 1 for real tokens and 0 for padding; `lengths` are those of packed sequences; `window` is
    how many positions a token sees, itself included; `like` has the dtype and device of a mask. Padding on the right
    needs none: no real token looks at what comes after it, and what the padded positions compute is never used.
    """
    S = past + T
    if attention_mask is not None and attention_mask.shape[-1] != S:
        raise ValueError(f"attention_mask has {attention_mask.shape[-1]} columns for {past} cached and {T} new tokens")
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    if past == 0 and (attention_mask is None or bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())):
        lengths = tuple(lengths or (T,))
        return CausalRows(lengths, None if window is None or window >= max(lengths) else window)
    if T == 1 and attention_mask is None and (window is None or window >= S):
        return None
    query = torch.arange(past, S, device=like.device)[:, None]
    key = torch.arange(S, device=like.device)
    visible = key <= query
    if window is not None:
        visible &= key > query - window
    if attention_mask is not None:
        # A padded query still sees itself, so that no row of the softmax is empty and NaN.
        visible = visible & attention_mask.bool()[:, None, None, :] | (key == query)
    return torch.zeros((), dtype=like.dtype, device=like.device).masked_fill(~visible, -math.inf).view(-1, 1, T, S)


@torch.compiler.disable  # a graph that knew the lengths would be compiled anew for every batch
def attend(q: Tensor, k: Tensor, v: Tensor, visible: Visible, prefix: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """softmax(q kᵀ / √D) v over the visible keys; query head h looks at key head h // G.

    q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D); `visible` is what `visible_keys` gives. `prefix`: k and v
    (1, K, P, D) of what every row begins with, S counting from there. Under torch.compile it stays outside the graph.
    """
    # On MPS never PyTorch's own: up to 2.6 it crashes for grouped queries, up to 2.10 it can be wrong for single ones
    # (pytorch/pytorch#149132, #163597, #169222, #174861).
    on_cpu, on_mps = q.device.type == "cpu", q.device.type == "mps"
    if prefix is not None:
        assert not isinstance(visible, CausalRows)  # which is for tokens without a past
        if on_cpu and k.shape[2] + prefix[0].shape[2] <= LONGEST_WRITTEN_OUT:
            return _written_out_with_prefix(q, k, v, visible, *prefix)
        k, v = (
            torch.cat([first.expand(len(own), -1, -1, -1), own], 2) for first, own in zip(prefix, (k, v), strict=True)
        )
    if isinstance(visible, CausalRows):
        if on_cpu or on_mps:
            return tiled_causal_attention(q, k, v, visible.lengths, visible.window)
        if len(visible.lengths) > 1 and _is_for_flash(q):
            return _all_rows(q, k, v, visible.lengths, visible.window)
        return row_by_row(q, k, v, visible.lengths, visible.window)
    if on_mps or (on_cpu and k.shape[2] <= LONGEST_WRITTEN_OUT):
        return _written_out(q, k, v, visible)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)


def _written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The formula step by step; the G query heads of one key head are rows of one matrix, so k is never repeated."""
    (B, H, T, D), (_, K, S, _) = q.shape, k.shape
    G = H // K
    q = q.reshape(B * K, G * T, D)
    v = v.reshape(B * K, S, D)
    scores = torch.bmm(q, _for_scores(k).mT).view(B, K, G, T, S)
    scale = 1 / math.sqrt(D)
    scores = scores * scale if mask is None else torch.add(mask[:, :, None], scores, alpha=scale)
    return torch.bmm(scores.softmax(-1).view(B * K, G * T, S), v).view(B, H, T, D)


def _for_scores(k: Tensor) -> Tensor:
    """k (B, K, S, D), a slice of the cache, as (B K, S, D): a copy where a product with it is faster.

    With a cache of 128 rows it takes, on one core, 2.7 times as long without the copy in bfloat16, in float32 1.7 times
    as long with it.
    """
    B, K, S, D = k.shape
    k = k.reshape(B * K, S, D)
    return k if k.dtype == torch.float32 else k.contiguous()


def _written_out_with_prefix(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, prefix_k: Tensor, prefix_v: Tensor
) -> Tensor:
    """The same with a prefix: there the queries of all rows are one matrix, and its keys are read once.

        S = [q kₚᵀ | q kᵀ] / √D + mask        P = softmax(S)        y = Pₚ vₚ + P v

    (Juravsky et al., arXiv 2402.05099, section 3.1; here the scores of both parts share one softmax.)
    """
    (B, H, T, D), (_, K, S, _), shared = q.shape, k.shape, prefix_k.shape[2]
    G = H // K
    of_all_rows = q.reshape(B, K, G * T, D).transpose(0, 1).reshape(K, B * G * T, D)
    scores = q.new_empty(B, K, G, T, shared + S)
    scores[..., :shared] = torch.bmm(of_all_rows, prefix_k[0].mT).view(K, B, G, T, shared).transpose(0, 1)
    own = torch.bmm(q.reshape(B * K, G * T, D), _for_scores(k).mT)
    scores[..., shared:] = own.view(B, K, G, T, S)
    scores.mul_(1 / math.sqrt(D))
    P = (scores if mask is None else scores.add_(mask[:, :, None])).softmax(-1)
    P_shared = P[..., :shared].transpose(0, 1).reshape(K, B * G * T, shared)
    y = torch.bmm(P_shared, prefix_v[0]).view(K, B, G * T, D).transpose(0, 1)
    own = torch.bmm(P[..., shared:].reshape(B * K, G * T, S), v.reshape(B * K, S, D))
    return (y + own.view(B, K, G * T, D)).reshape(B, H, T, D)


def row_by_row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    window: int | None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """PyTorch's own kernel, which skips the keys after a query, once for each packed sequence; `scale`: 1 / √D."""
    ys = []
    for row in zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True):
        T, mask = row[0].shape[2], None
        if window is not None and window < T:
            mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        y = F.scaled_dot_product_attention(*row, mask, dropout, mask is None, scale=scale, enable_gqa=True)
        ys.append(y)
    return ys[0] if len(ys) == 1 else torch.cat(ys, dim=2)


def _flash_attention() -> Callable[..., Any] | None:
    """PyTorch's attention to packed sequences, where it knows windows and grouped queries; not in 2.6."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys() else None


FLASH = _flash_attention()


def _is_for_flash(q: Tensor) -> bool:
    half = q.dtype in (torch.float16, torch.bfloat16)
    return FLASH is not None and q.device.type == "cuda" and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _all_rows(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int | None) -> Tensor:
    """FlashAttention-2 (Dao, arXiv 2307.08691) over all packed sequences in one launch; B is 1."""
    assert FLASH is not None
    ends, longest, before = _ends(lengths, q.device), max(lengths), -1 if window is None else window - 1
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    y: Tensor = FLASH(q, k, v, ends, ends, longest, longest, window_size=(before, 0), enable_gqa=True)
    return y.transpose(0, 1)[None]


@lru_cache(maxsize=1)  # every layer of a forward pass asks for the same
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor cannot be saved for backward
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
