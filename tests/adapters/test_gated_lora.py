"""minilora/adapters/gated_lora.py against finite differences, PyTorch's own autograd, and the steps one by one."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import lora_layer, saved_for_backward
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minilora.adapters.gated_lora import gated_lora
from minilora.models.shared_input import project_swiglu
from minilora.nf4.linear import NF4Linear

IN, OUT, TOKENS, R = 48, 40, 20, 8


@given(
    rows=st.integers(0, 3),
    in_features=st.integers(1, 4),
    out_features=st.integers(1, 4),
    r=st.integers(1, 3),
    bias=st.booleans(),
    trains=st.lists(st.booleans(), min_size=4, max_size=4),
)
@settings(deadline=None, max_examples=40)
def test_outputs_and_gradients_equal_the_formula_and_finite_differences(
    rows: int, in_features: int, out_features: int, r: int, bias: bool, trains: list[bool]
) -> None:
    torch.manual_seed(0)
    shapes = (rows, in_features), (rows, in_features), (r, in_features), (out_features, r)
    inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=trained)
        for shape, trained in zip(shapes, trains, strict=True)
    ]
    gate, up, A, B = inputs
    b = torch.randn(out_features, dtype=torch.float64) if bias else None
    x, y = gated_lora(gate, up, b, A, B, 0.7)
    exact_x = F.silu(gate) * up
    exact_y = F.linear(exact_x, 0.7 * B @ A, b)
    for a, exact in ((x, exact_x), (y, exact_y)):
        torch.testing.assert_close(a, exact, rtol=1e-12, atol=1e-12)  # float64 roundings of sums of at most 8 terms
    trained = [t for t in inputs if t.requires_grad]
    if not trained:
        assert not y.requires_grad
        return
    p, g = torch.randn_like(x), torch.randn_like(y)
    gradients = torch.autograd.grad((x * p).sum() + (y * g).sum(), trained)
    expected = torch.autograd.grad((exact_x * p).sum() + (exact_y * g).sum(), trained)
    for a, exact in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, exact, rtol=1e-11, atol=1e-11)  # sums of products of the above
    if rows:
        assert torch.autograd.gradcheck(lambda *_: gated_lora(gate, up, b, A, B, 0.7), trained)


random_lora = partial(lora_layer, seed=1, r=R, init_lora_weights=False)


def one_by_one(gate: Tensor, up: Tensor, layer: nn.Module) -> Tensor:
    return layer(F.silu(gate) * up)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_gives_the_same_as_one_by_one(dtype: torch.dtype, nf4: bool, bias: bool, hooked: bool) -> None:
    base = nn.Linear(IN, OUT, bias=bias).to(dtype)
    layer = random_lora(NF4Linear.from_linear(base, compute_dtype=dtype) if nf4 else base)
    if hooked:  # of what is adapted: it is called
        calls: list[Any] = []
        layer.base_layer.register_forward_hook(lambda *args: calls.append(args))
    gate, up = (torch.randn(2, TOKENS, IN).to(dtype).requires_grad_() for _ in range(2))
    assert layer.after_swiglu(gate, up) is not None
    inputs, upstream = (gate, up, *layer.adapters.parameters()), torch.randn(2, TOKENS, OUT).to(dtype)
    results = []
    for function in (project_swiglu, one_by_one):
        y = function(gate, up, layer)
        results.append((y, *torch.autograd.grad(y, inputs, upstream)))
    assert torch.equal(results[0][0], results[1][0])
    # the sums are the same; of ∂L/∂x one rounding is saved, and sums may be blocked differently
    tolerance = 4 * torch.finfo(dtype).eps
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max()
    if hooked:
        assert [args[1][0].shape for args in calls] == [gate.shape] * 3


@pytest.mark.parametrize("nf4", [False, True])
def test_only_gate_up_and_xa_are_saved(nf4: bool) -> None:
    base = nn.Linear(IN, OUT).bfloat16()
    layer = random_lora(NF4Linear.from_linear(base, compute_dtype=torch.bfloat16) if nf4 else base)
    gate, up = (torch.randn(2, TOKENS, IN).bfloat16().requires_grad_() for _ in range(2))
    rows = 2 * TOKENS
    assert saved_for_backward(lambda: project_swiglu(gate, up, layer), layer) == rows * (2 * IN + R)
    assert saved_for_backward(lambda: one_by_one(gate, up, layer), layer) > rows * 4 * IN
    layer.adapters["default"].lora_A.requires_grad_(False)
    assert saved_for_backward(lambda: project_swiglu(gate, up, layer), layer) == rows * (2 * IN + R)


def test_what_it_is_not_for_is_called() -> None:
    gate, up = (torch.randn(TOKENS, IN, requires_grad=True) for _ in range(2))
    dropout = random_lora(nn.Linear(IN, OUT), lora_dropout=0.5).train()
    own_bias = random_lora(nn.Linear(IN, OUT))
    own_bias.adapters["default"].train_bias(own_bias.base_layer)
    bias_trains = random_lora(nn.Linear(IN, OUT))
    bias_trains.base_layer.bias.requires_grad_()
    off = random_lora(nn.Linear(IN, OUT))
    off.enabled = False
    for layer in (dropout, own_bias, bias_trains, off):
        assert layer.after_swiglu(gate, up) is None
        torch.manual_seed(2)
        y = project_swiglu(gate, up, layer)
        torch.manual_seed(2)
        torch.testing.assert_close(y, one_by_one(gate, up, layer))
    project_swiglu(gate, up, bias_trains).sum().backward()
    torch.testing.assert_close(bias_trains.base_layer.bias.grad, torch.full((OUT,), float(TOKENS)))
    with torch.autocast("cpu", torch.bfloat16):
        assert random_lora(nn.Linear(IN, OUT)).after_swiglu(gate, up) is None


@pytest.mark.parametrize("nf4", [False, True])
def test_compiles_forward_and_backward_in_one_graph(nf4: bool) -> None:
    base = nn.Linear(IN, OUT)
    layer = random_lora(NF4Linear.from_linear(base) if nf4 else base)
    gate, up = (torch.randn(TOKENS, IN, requires_grad=True) for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(lambda gate, up: project_swiglu(gate, up, layer), backend="aot_eager", fullgraph=True)
    inputs = (gate, up, *layer.adapters.parameters())
    results = [
        (y, *torch.autograd.grad(y.square().sum(), inputs))
        for y in (compiled(gate, up), project_swiglu(gate, up, layer))
    ]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
