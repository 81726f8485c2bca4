"""Both ways to compute attention against the formula in float64, position by position; which keys a query sees."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minilora import attention
from minilora.attention import CausalRows, attend, visible_keys


def visible(mask: list[int] | None, past: int, T: int, window: int | None) -> Tensor:
    """Which keys each new token sees, said in words: real, not later, and inside the window; a pad sees itself."""
    S = past + T
    sees = torch.zeros(T, S, dtype=torch.bool)
    for query in range(past, S):
        for key in range(S):
            inside = key <= query and (window is None or query - key < window)
            sees[query - past, key] = inside and (mask is None or mask[key] == 1 or key == query)
    return sees


def by_hand(q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
    """softmax over the visible keys, one query and one head at a time; sees (B, T, S)."""
    (B, H, T, D), K = q.shape, k.shape[1]
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                keys = sees[b, t]
                weights = (k[b, h * K // H, keys] @ q[b, h, t] / math.sqrt(D)).softmax(0)
                out[b, h, t] = weights @ v[b, h * K // H, keys]
    return out


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[int]] | None, int, int, int | None]:
    past, T = draw(st.integers(0, 4)), draw(st.integers(1, 6))
    rows = st.lists(st.integers(0, 1), min_size=past + T, max_size=past + T)
    ordered = rows.map(sorted) | rows.map(lambda row: sorted(row, reverse=True)) | rows
    mask = draw(st.none() | st.lists(ordered, min_size=2, max_size=2))
    return mask, past, T, draw(st.none() | st.integers(1, 12))


@settings(max_examples=60, deadline=None)
@given(case=cases(), heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]), written_out=st.booleans())
def test_attention_is_the_softmax_over_what_is_visible(
    case: tuple[list[list[int]] | None, int, int, int | None], heads: tuple[int, int], written_out: bool
) -> None:
    rows, past, T, window = case
    (H, K), B, D = heads, 2, 8
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, H, T, D, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, B, K, past + T, D, dtype=torch.float64, generator=generator)
    padding = None if rows is None else torch.tensor(rows)
    keys = visible_keys(padding, None, past, T, window, q.dtype, q.device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "LONGEST_WRITTEN_OUT", 1024 if written_out else 0)
        result = attend(q, k, v, keys)
    expected = by_hand(q, k, v, torch.stack([visible(row, past, T, window) for row in rows or [None, None]]))
    real = torch.ones(B, T, dtype=torch.bool) if padding is None else padding[:, past:].bool()
    assert result.isfinite().all()
    # float64 rounding of sums of eight terms
    assert torch.allclose(result.transpose(1, 2)[real], expected.transpose(1, 2)[real], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("rows", "past", "T", "window", "fast"),
    [
        (None, 0, 5, None, True),
        (None, 4, 1, None, True),
        ([[1, 1, 1, 1, 1]], 0, 5, None, True),
        ([[1, 1, 1, 0, 0]], 0, 5, None, True),
        ([[0, 0, 1, 1, 1]], 0, 5, None, False),
        ([[1, 0, 0, 1, 1]], 0, 5, None, False),
        ([[1, 1, 1, 0, 1]], 4, 1, None, False),
        (None, 2, 3, None, False),
        (None, 0, 5, 5, True),
        (None, 0, 5, 4, True),
        ([[1, 1, 1, 0, 0]], 0, 5, 2, True),
        (None, 4, 1, 4, False),
    ],
)
def test_no_mask_is_made_where_a_rule_says_what_is_seen(
    rows: list[list[int]] | None, past: int, T: int, window: int | None, fast: bool
) -> None:
    padding = None if rows is None else torch.tensor(rows)
    keys = visible_keys(padding, None, past, T, window, torch.float32, torch.device("cpu"))
    assert (keys is None or isinstance(keys, CausalRows)) == fast


def test_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="attention_mask has 3 columns for 2 cached and 4 new tokens"):
        visible_keys(torch.ones(1, 3), None, 2, 4, None, torch.float32, torch.device("cpu"))
