"""Layer kinds: each must say in the orientation of the equations what the layer itself computes."""

from typing import Any

import pytest
import torch
from helpers.layers import FLOAT32, layers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minilora.adapters.layer_kinds import kind_of
from minilora.nf4.linear import linear_onto


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A convolution of any kind, and an input for it."""
    dims = draw(st.integers(1, 3))
    sides = st.integers(1, 3)
    kernel = [draw(sides) for _ in range(dims)]
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    stride = draw(sides)
    padding: Any = draw(st.integers(0, 2))
    if mode == "zeros" and stride == 1:
        padding = draw(st.sampled_from([padding, "same", "valid"]))
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        draw(sides), draw(sides), tuple(kernel), stride, padding, dilation=draw(st.integers(1, 2)),
        bias=draw(st.booleans()), padding_mode=mode,
    )  # fmt: skip
    return layer, torch.randn(2, layer.in_channels, *[7] * dims)


def check(layer: Any, x: Tensor) -> None:
    kind = kind_of(layer)
    assert kind is not None
    W, bias = kind.weight(layer), getattr(layer, "bias", None)
    assert W.shape == kind.shape
    expected = layer(x)
    y = kind.apply(x, W)
    if bias is not None:
        y = y + (bias.view(-1, *[1] * (y.dim() - 2)) if W.dim() > 2 else bias)
    torch.testing.assert_close(y, expected, **FLOAT32)

    doubled = kind.with_weight(layer, 2 * W.detach(), bias)
    b = kind_of(layer).apply(x, W)
    torch.testing.assert_close(doubled(x), expected + b, **FLOAT32)
    assert torch.equal(layer(x), expected), "and the layer itself is what it was"
    other = kind.with_weight(layer, W.detach(), None if bias is None else torch.zeros_like(bias))
    torch.testing.assert_close(other(x), b, **FLOAT32)
    assert not any(parameter.requires_grad for parameter in [doubled.weight, other.weight])


@pytest.mark.parametrize(("layer", "x"), layers())
def test_weight_apply_and_with_weight_are_the_layer_s(layer: nn.Module, x: Tensor) -> None:
    check(layer, x)


@given(convolutions())
@settings(deadline=None, max_examples=60)
def test_convolutions_of_every_kind(case: tuple[nn.Module, Tensor]) -> None:
    check(*case)


@pytest.mark.parametrize(("layer", "x"), layers())
def test_apply_then_pointwise_is_one_product(layer: nn.Module, x: Tensor) -> None:
    """B (A x) = (B A) x (+ add), for whatever the product of W and x is in this layer."""
    kind = kind_of(layer)
    assert kind is not None
    out, in_, *kernel = kind.shape
    A, B = torch.randn(3, in_, *kernel), torch.randn(out, 3, *[1] * len(kernel))
    BA = (B.flatten(1) @ A.flatten(1)).view(kind.shape)
    expected = kind.apply(x, BA)
    torch.testing.assert_close(kind.pointwise(kind.apply(x, A), B), expected, **FLOAT32)
    add = torch.randn_like(expected)
    torch.testing.assert_close(kind.pointwise(kind.apply(x, A), B, add), expected + add, **FLOAT32)


def test_a_padding_token_trains_nothing() -> None:
    layer = nn.Embedding(5, 8, padding_idx=0)
    W = torch.randn(8, 5, requires_grad=True)
    kind_of(layer).apply(torch.tensor([0, 1, 0]), W).sum().backward()
    assert W.grad is not None
    assert W.grad[:, 0].count_nonzero() == 0
    assert W.grad[:, 1].count_nonzero() == 8


def test_layers_that_cannot_take_an_adapter_have_no_kind() -> None:
    for layer in (nn.LayerNorm(4), nn.ConvTranspose1d(2, 2, 3), nn.Embedding(4, 4, max_norm=1.0), nn.ReLU()):
        assert kind_of(layer) is None


def test_linear_onto_rounds_once_in_bfloat16() -> None:
    torch.manual_seed(0)
    x, W, add = (torch.randn(shape).bfloat16() for shape in [(64, 256), (96, 256), (64, 96)])
    W = W / 16
    exact = (add.double() + x.double() @ W.double().T).bfloat16()
    wrong = (linear_onto(add, x, W) != exact).float().mean()
    wrong_two_steps = (add + x @ W.T != exact).float().mean()
    assert wrong < 1e-3, "float32 accumulation may turn a rounding only where the sum is almost at a midpoint"
    assert wrong_two_steps > 0.1, "or this test cannot tell one rounding from two"
