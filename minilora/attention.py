"""Causal attention with grouped queries: which keys a query sees, and softmax(q kᵀ / √D + mask) v in two ways.

B is the batch, T the new tokens, S = past + T, H the query heads, K the key-value heads, G = H / K, D a head's size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# On a CPU the written-out product is the faster one up to here (training, bfloat16, 8 x 100 tokens, 9 heads on one
# core: 4.5 ms a layer against 23 for scaled_dot_product_attention); beyond, its T x S scores cost too much memory.
LONGEST_WRITTEN_OUT = 1024


def attention_mask_to_add(
    attention_mask: Tensor | None, past: int, T: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """What to add to the scores of T new tokens: 0 or -inf, (B or 1, 1, T, S) in `dtype`; None where plain causal.

    `attention_mask` (B, S) is 1 for real tokens and 0 for padding; `window` is how many positions a token sees, itself
    included. None is the fast path; it is right without padding, and with padding on the right: no real token
    looks at what comes after it, and what the padded positions compute is never used.
    """
    S = past + T
    if attention_mask is not None and attention_mask.shape[-1] != S:
        raise ValueError(f"attention_mask has {attention_mask.shape[-1]} columns for {past} cached and {T} new tokens")
    padded = attention_mask is not None and not bool(attention_mask.all())
    sees_all = window is None or window >= S
    if sees_all and (past == 0 or T == 1) and (not padded or (past == 0 and _on_the_right(attention_mask))):
        return None
    query = torch.arange(past, S, device=device)[:, None]
    key = torch.arange(S, device=device)
    visible = key <= query
    if window is not None:
        visible &= key > query - window
    if attention_mask is not None and padded:
        # A padded query still sees itself, so that no row of the softmax is empty and NaN.
        visible = visible & attention_mask.bool()[:, None, None, :] | (key == query)
    return torch.zeros((), dtype=dtype, device=device).masked_fill(~visible, -math.inf).view(-1, 1, T, S)


def _on_the_right(attention_mask: Tensor | None) -> bool:
    return attention_mask is not None and bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √D + mask) v: q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D), query head h on h // G.

    `mask` is what `attention_mask_to_add` gives; None means causal (and everything, for a single query).
    """
    if q.device.type != "cpu" or k.shape[2] > LONGEST_WRITTEN_OUT:
        causal = mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
    return _attend_written_out(q, k, v, mask)


def _attend_written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The same, step by step; the G query heads of one key head are rows of one matrix, so k is never repeated."""
    (B, H, T, D), (_, K, S, _) = q.shape, k.shape
    G = H // K
    q = q.reshape(B * K, G * T, D)
    k = k.reshape(B * K, S, D).contiguous()  # a slice of the cache is not, and the product is then 3 times slower
    v = v.reshape(B * K, S, D)
    if mask is None:
        mask = torch.full((T, S), -math.inf, dtype=q.dtype).triu(S - T + 1).view(1, 1, T, S)
    scores = torch.bmm(q, k.mT).view(B, K, G, T, S)
    probabilities = torch.add(mask[:, :, None], scores, alpha=1 / math.sqrt(D)).softmax(-1)
    return torch.bmm(probabilities.view(B * K, G * T, S), v).view(B, H, T, D)
