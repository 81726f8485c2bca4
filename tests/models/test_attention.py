"""The implementations of attention against the formula in float64, position by position; which keys a query sees."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minilora.models import attention
from minilora.models.attention import CausalRows, attend, visible_keys
from minilora.models.tiled_attention import tiled_causal_attention


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
    keys = visible_keys(padding, None, past, T, window, q)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "LONGEST_WRITTEN_OUT", 1024 if written_out else 0)
        result = attend(q, k, v, keys)
    expected = by_hand(q, k, v, torch.stack([visible(row, past, T, window) for row in rows or [None, None]]))
    real = torch.ones(B, T, dtype=torch.bool) if padding is None else padding[:, past:].bool()
    assert result.isfinite().all()
    # float64 rounding of sums of eight terms
    assert torch.allclose(result.transpose(1, 2)[real], expected.transpose(1, 2)[real], rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    own=st.integers(0, 3),
    shared=st.integers(1, 5),
    T=st.integers(1, 4),
    window=st.none() | st.integers(1, 12),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    written_out=st.booleans(),
)
def test_a_prefix_that_lies_apart_is_attended_to_as_if_every_row_had_it(
    own: int, shared: int, T: int, window: int | None, heads: tuple[int, int], written_out: bool
) -> None:
    """Its keys lie in one row for all three; a row's own are a slice of a longer cache, the second row's padded."""
    (H, K), B, D, S = heads, 3, 8, own + T
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, H, T, D, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, B, K, S + 2, D, dtype=torch.float64, generator=generator)[:, :, :, :S]
    prefix = torch.randn(2, 1, K, shared, D, dtype=torch.float64, generator=generator)
    rows = [[1] * (shared + S), [1] * shared + [0] * own + [1] * T, [1] * (shared + S)]
    keys = visible_keys(torch.tensor(rows), None, shared + own, T, window, q)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "LONGEST_WRITTEN_OUT", 1024 if written_out else 0)
        result = attend(q, k, v, keys, (prefix[0], prefix[1]))
    k, v = (torch.cat([first.expand(B, -1, -1, -1), own], 2) for first, own in zip(prefix, (k, v), strict=True))
    expected = by_hand(q, k, v, torch.stack([visible(row, shared + own, T, window) for row in rows]))
    # float64 rounding of sums of some ten terms
    assert torch.allclose(result, expected, rtol=1e-12, atol=1e-12)


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
    keys = visible_keys(padding, None, past, T, window, torch.empty(0))
    assert (keys is None or isinstance(keys, CausalRows)) == fast


def test_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="attention_mask has 3 columns for 2 cached and 4 new tokens"):
        visible_keys(torch.ones(1, 3), None, 2, 4, None, torch.empty(0))


ROWS = (7, 1, 12, 4)


def rows_of_heads(dtype: torch.dtype = torch.float64, device: str = "cpu", D: int = 8) -> list[Tensor]:
    """q, k, v and a gradient for them, of packed sequences."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, sum(ROWS), heads, D) for heads in (4, 2, 2, 4)]
    tensors = [torch.randn(shape, generator=generator).to(device, dtype).transpose(1, 2) for shape in shapes]
    return [tensor.requires_grad_() for tensor in tensors]


def values_and_gradients(attention_of_rows: Any, window: int | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Any:
    y = attention_of_rows(q, k, v, ROWS, window)
    return [y, *torch.autograd.grad(y, (q, k, v), g)]


@pytest.mark.parametrize("window", [None, 1, 5])
def test_row_by_row_is_tile_by_tile(window: int | None) -> None:
    """What runs on other devices than a CPU, and what runs there."""
    tensors = rows_of_heads()
    ours = values_and_gradients(attention.row_by_row, window, *tensors)
    for a, b in zip(ours, values_and_gradients(tiled_causal_attention, window, *tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)  # float64 rounding of sums of a dozen terms


@pytest.mark.parametrize("window", [None, 1, 5])
def test_all_rows_are_described_as_pytorchs_varlen_attn_wants_them(window: int | None, monkeypatch: Any) -> None:
    """Its documentation in Python: tokens, heads, D; where rows begin; how far left and right a token sees."""

    def varlen_attn(q: Tensor, k: Tensor, v: Tensor, *arguments: Any, window_size: Any, enable_gqa: bool) -> Tensor:
        begins_q, begins_k, longest_q, longest_k = arguments
        assert (longest_q, longest_k, enable_gqa, begins_q.dtype) == (max(ROWS), max(ROWS), True, torch.int32)
        assert torch.equal(begins_q, begins_k)
        y = torch.empty_like(q)
        for start, stop in pairwise(begins_q.tolist()):
            i = torch.arange(stop - start)
            ahead = i - i[:, None]
            left, right = window_size
            sees = (ahead <= right) & ((ahead >= -left) if left >= 0 else torch.tensor(True))
            row = (x[None, start:stop].transpose(1, 2) for x in (q, k, v))
            y[start:stop] = F.scaled_dot_product_attention(*row, attn_mask=sees, enable_gqa=True)[0].transpose(0, 1)
        return y

    monkeypatch.setattr(attention, "FLASH", varlen_attn)
    q, k, v, _ = (x.detach() for x in rows_of_heads())
    ours = attention._all_rows(q, k, v, ROWS, window)
    torch.testing.assert_close(ours, tiled_causal_attention(q, k, v, ROWS, window), rtol=0, atol=1e-12)


def test_where_rows_end_may_be_saved_for_backward_after_an_evaluation() -> None:
    attention._ends.cache_clear()
    with torch.inference_mode():
        attention._ends((2, 3), torch.device("cpu"))
    ends = attention._ends((2, 3), torch.device("cpu"))
    assert ends.tolist() == [0, 2, 5]
    (ends * torch.ones((), requires_grad=True)).sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_on_a_gpu(dtype: torch.dtype, window: int | None) -> None:
    on_gpu = rows_of_heads(dtype, "cuda", D=64)
    exact = [x.detach().double().cpu().requires_grad_() for x in on_gpu]

    def attend_rows(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int | None) -> Tensor:
        return attend(q, k, v, CausalRows(lengths, window))

    expected = values_and_gradients(tiled_causal_attention, window, *exact)
    # a few roundings of numbers of size one to `dtype`: float32's products may be in TF32, with 10 bits
    tolerance = 2e-3 if dtype == torch.float32 else 3e-2
    for ours, theirs in zip(values_and_gradients(attend_rows, window, *on_gpu), expected, strict=True):
        torch.testing.assert_close(ours.double().cpu(), theirs, rtol=tolerance, atol=tolerance)
    separately = values_and_gradients(attention.row_by_row, window, *on_gpu)
    for ours, theirs in zip(values_and_gradients(attend_rows, window, *on_gpu), separately, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
