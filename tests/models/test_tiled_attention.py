"""Attention tile by tile against the softmax over whole rows, in float64, and its gradients against autograd's."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minilora.models import tiled_attention
from minilora.models.tiled_attention import tiled_causal_attention

ROUNDING = 1e-11  # float64 sums of some dozens of terms of size one, in another order


def by_hand(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int | None) -> Tensor:
    """With one mask over all pairs of tokens: same row, not later, and in the window."""
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    i = torch.arange(len(row))
    sees = (row[:, None] == row) & (i <= i[:, None])
    if window is not None:
        sees &= i[:, None] - i < window
    G = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1)
    return (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~sees, -math.inf).softmax(-1) @ v


def heads(B: int, T: int, *numbers: int, D: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random activations (B, heads, T, D), laid out as the model's: (B, T, heads, D)."""
    random = torch.Generator().manual_seed(0)
    return [
        torch.randn(B, T, n, D, dtype=torch.float64, generator=random).to(dtype).transpose(1, 2).requires_grad_()
        for n in numbers
    ]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=4),
    window=st.none() | st.integers(1, 16),
    B=st.integers(1, 2),
    number=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    tile=st.integers(1, 6),
    saved_keys=st.sampled_from([0, 5, 99]),
)
def test_values_and_gradients(
    lengths: list[int], window: int | None, B: int, number: tuple[int, int], tile: int, saved_keys: int
) -> None:
    (H, K), T = number, sum(lengths)
    q, k, v, g = heads(B, T, H, K, K, H)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled_attention, "TILE", tile)
        patch.setattr(tiled_attention, "SAVED_KEYS", saved_keys)
        y = tiled_causal_attention(q, k, v, lengths, window)
        gradients = torch.autograd.grad(y, (q, k, v), g)
    expected = by_hand(q, k, v, lengths, window)
    torch.testing.assert_close(y, expected, rtol=0, atol=ROUNDING)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, (q, k, v), g), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("window", [None, 150])
def test_rows_longer_than_a_tile_as_it_is(window: int | None) -> None:
    lengths = [300, 1, 128, 70]
    q, k, v, g = heads(1, sum(lengths), 2, 1, 1, 2)
    y, expected = tiled_causal_attention(q, k, v, lengths, window), by_hand(q, k, v, lengths, window)
    torch.testing.assert_close(y, expected, rtol=0, atol=ROUNDING)
    gradients = zip(*(torch.autograd.grad(result, (q, k, v), g) for result in (y, expected)), strict=True)
    for ours, theirs in gradients:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)


def test_gradients_by_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_attention, "TILE", 2)
    q, k, v = heads(1, 5, 2, 1, 1, D=2)
    assert torch.autograd.gradcheck(lambda *qkv: tiled_causal_attention(*qkv, [3, 2], None), (q, k, v))


def test_bfloat16_is_as_exact_as_pytorchs_kernel() -> None:
    """Both round q kᵀ or its softmax to bfloat16 somewhere; a key's gradient is summed over its tiles in float32."""
    exact = heads(1, 700, 4, 2, 2, 4, D=64)
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    kernel = torch.nn.functional.scaled_dot_product_attention

    def results(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> list[Tensor]:
        y = attention(q, k, v)
        return [y.detach(), *torch.autograd.grad(y, (q, k, v), g)]

    true = results(
        lambda q, k, v: by_hand(q, k, v, [700], None), *(x.detach().double().requires_grad_() for x in rounded)
    )
    ours = results(lambda q, k, v: tiled_causal_attention(q, k, v, [700], None), *rounded)
    theirs = results(lambda q, k, v: kernel(q, k, v, is_causal=True, enable_gqa=True), *rounded)
    for name, a, b, x in zip(("y", "dq", "dk", "dv"), ours, theirs, true, strict=True):
        error, other = (float((y.double() - x).norm() / x.norm()) for y in (a, b))
        # the scores are one more rounding to 8 bits than the kernel has, of numbers that reach 3: 3 x 2^-9 relative
        assert error < 2 * other + 3 * 2**-9, (name, error, other)


def test_under_autocast_it_is_that_of_rounded_inputs() -> None:
    q, k, v, g = heads(1, 9, 2, 1, 1, 2, dtype=torch.float32)
    rounded = [x.bfloat16() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        y = tiled_causal_attention(q, k, v, [6, 3], None)
    expected = tiled_causal_attention(*rounded, [6, 3], None)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    for ours, theirs in zip(*(torch.autograd.grad(z, (q, k, v), g.bfloat16()) for z in (y, expected)), strict=True):
        assert torch.equal(ours, theirs)
