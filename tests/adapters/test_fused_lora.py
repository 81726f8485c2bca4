"""fused_lora.py against finite differences, float64, PyTorch's own autograd over the formula, and PEFT."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from helpers.layers import lora_layer, rel, saved_for_backward
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minilora.adapters.fused_lora import LoRAProduct, fused_lora
from minilora.adapters.layer import LoRALinear
from minilora.adapters.lora import LoRA
from minilora.adapters.lora_config import LoRAConfig
from minilora.models.shared_input import project
from minilora.nf4 import linear
from minilora.nf4.codec import quantize
from minilora.nf4.linear import NF4Linear

IN, OUT, TOKENS, R = 48, 40, 20, 8


# one adapter whose update is not zero
random_lora = partial(lora_layer, seed=1, r=R, init_lora_weights=False)


def products(
    outs: list[int], ranks: list[int], in_features: int, bias: bool, nf4: bool, trains: list[bool]
) -> tuple[list[LoRAProduct], list[Tensor]]:
    """Random float64 layers, with `nf4` all but the second in 4 bits; and of their A and B those that train."""
    parts = []
    for i, (out, r) in enumerate(zip(outs, ranks, strict=True)):
        W = torch.randn(out, in_features, dtype=torch.float64)
        A, B = torch.randn(r, in_features, dtype=torch.float64), torch.randn(out, r, dtype=torch.float64)
        A.requires_grad_(trains[2 * i]), B.requires_grad_(trains[2 * i + 1])
        b = torch.randn(out, dtype=torch.float64) if bias else None
        parts.append(LoRAProduct(quantize(W) if nf4 and i != 1 else W, b, A, B, s=0.5 + i))
    return parts, [factor for part in parts for factor in (part.A, part.B) if factor.requires_grad]


def formula(x: Tensor, parts: list[LoRAProduct]) -> tuple[Tensor, ...]:
    """y_i = x W_iᵀ + b_i + s_i (x A_iᵀ) B_iᵀ, step by step."""
    ys = []
    for part in parts:
        W = part.W if isinstance(part.W, Tensor) else linear.dequantize(part.W, x.dtype)
        ys.append(F.linear(x, W, part.bias) + part.s * (x @ part.A.T) @ part.B.T)
    return tuple(ys)


# --- the derivation --------------------------------------------------------------------------------------------------

CASES = {
    "shape": st.lists(st.integers(0, 3), max_size=2),
    "outs": st.lists(st.integers(1, 4), min_size=1, max_size=3),
    "ranks": st.lists(st.integers(1, 3), min_size=3, max_size=3),
    "in_features": st.integers(1, 5),
    "bias": st.booleans(),
    "nf4": st.booleans(),
    "x_trains": st.booleans(),
    "trains": st.lists(st.booleans(), min_size=6, max_size=6),
}


@given(**CASES)
@settings(deadline=None, max_examples=60)
def test_outputs_and_gradients_equal_the_formula_and_finite_differences(
    shape: list[int], outs: list[int], ranks: list[int], in_features: int, bias: bool, nf4: bool, x_trains: bool,
    trains: list[bool],
) -> None:  # fmt: skip
    torch.manual_seed(0)
    parts, factors = products(outs, ranks[: len(outs)], in_features, bias, nf4, trains)
    x = torch.randn(*shape, in_features, dtype=torch.float64, requires_grad=x_trains)
    ys, expected = fused_lora(x, parts), formula(x, parts)
    inputs = [t for t in (x, *factors) if t.requires_grad]
    for y, exact in zip(ys, expected, strict=True):
        assert y.shape == exact.shape
        assert y.requires_grad == bool(inputs)
        torch.testing.assert_close(y, exact, rtol=1e-12, atol=1e-12)  # float64 roundings of sums of at most 9 terms
    if not inputs:
        return
    upstream = [torch.randn_like(y) for y in ys]
    loss, exact_loss = (sum((y * g).sum() for y, g in zip(each, upstream, strict=True)) for each in (ys, expected))
    gradients, exact_gradients = torch.autograd.grad(loss, inputs), torch.autograd.grad(exact_loss, inputs)
    for gradient, exact in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-11, atol=1e-11)  # sums of products of the above
    if x.numel():
        assert torch.autograd.gradcheck(lambda *_: fused_lora(x, parts), inputs)


def test_a_second_derivative_is_refused_and_torch_func_gives_it() -> None:
    layer, x = random_lora(nn.Linear(3, 2)), torch.randn(4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(project(x, layer, layer)[0].pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    W = layer.base_layer.weight + layer.adapters["default"].delta()
    hessian = torch.func.hessian(lambda row: project(row, layer, layer)[0].pow(3).sum())(x[0])
    expected = torch.func.hessian(lambda row: F.linear(row, W, layer.base_layer.bias).pow(3).sum())(x[0])
    torch.testing.assert_close(hessian, expected, rtol=1e-4, atol=1e-5)  # float32 in another order


# --- what it saves ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_only_x_and_xa_are_saved_for_layers_that_share_x(kind: str) -> None:
    bases = [nn.Linear(IN, OUT).bfloat16() for _ in range(3)]
    layers = [random_lora(NF4Linear.from_linear(base) if kind == "nf4" else base) for base in bases]
    x = torch.randn(2, TOKENS, IN).bfloat16().requires_grad_()
    parts = [layer.shared_part(x) for layer in layers]
    rows = 2 * TOKENS
    assert saved_for_backward(lambda: fused_lora(x, parts), *layers) == rows * (IN + 3 * R)
    for part in parts:
        part.A.requires_grad_(False)  # LoRA-FA
    assert saved_for_backward(lambda: fused_lora(x, parts), *layers) == rows * 3 * R
    for part in parts:
        part.B.requires_grad_(False)
    assert saved_for_backward(lambda: fused_lora(x, parts), *layers) == 0


def test_a_4_bit_weight_is_dequantized_for_each_product_and_not_where_x_needs_no_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    true_weight = linear.temporary_weight
    monkeypatch.setattr(linear, "temporary_weight", lambda *args: made.append(args) or true_weight(*args))
    layer = random_lora(NF4Linear.from_linear(nn.Linear(IN, OUT)))
    x = torch.randn(TOKENS, IN)
    torch.cat(project(x, layer, layer)).sum().backward()
    assert len(made) == 2
    torch.cat(project(x.requires_grad_(), layer, layer)).sum().backward()
    assert len(made) == 2 + 4


# --- the same numerics as PEFT, and in bfloat16 nearer to float64 ----------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_layers_together_are_no_further_from_float64_in_bfloat16_than_peft(kind: str) -> None:
    torch.manual_seed(0)
    parts, theirs, exact = [], [], []
    for seed in range(3):
        base = nn.Linear(256, 192).bfloat16()
        ours = random_lora(base, seed=seed)
        if kind == "nf4":
            ours = random_lora(NF4Linear.from_linear(base, compute_dtype=torch.bfloat16), seed=seed)
            base.weight.data = ours.base_layer.dequantize(torch.bfloat16)
        config = peft.LoraConfig(r=R, target_modules=["0"], lora_alpha=8)
        # adapters in bfloat16, so that its products are as ours are: with float32 ones it multiplies in float32
        model = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config, autocast_adapter_dtype=False)
        layer = model.base_model.model[0]
        adapter = ours.adapters["default"]
        for parameter in (adapter.lora_A, adapter.lora_B):
            parameter.data = 0.3 * parameter.data.bfloat16().float()
        layer.lora_A["default"].weight.data = adapter.lora_A.data.bfloat16()
        layer.lora_B["default"].weight.data = adapter.lora_B.data.bfloat16()
        parts.append(ours.shared_part(torch.empty(0, dtype=torch.bfloat16)))
        theirs.append(layer)
        W, b, A, B = (t.detach().double() for t in (base.weight, base.bias, adapter.lora_A, adapter.lora_B))
        exact.append(LoRAProduct(W, b, A.requires_grad_(), B.requires_grad_(), adapter.scaling))

    x0, upstream = torch.randn(200, 256).bfloat16(), [torch.randn(200, 192).bfloat16() for _ in range(3)]

    def results(run: Callable[[Tensor], Any], dtype: torch.dtype, factors: list[Tensor]) -> list[Tensor]:
        x = x0.to(dtype).requires_grad_()
        ys = run(x)
        return [*ys, *torch.autograd.grad(ys, [x, *factors], [g.to(dtype) for g in upstream])]

    our_factors, exact_factors = ([f for p in each for f in (p.A, p.B)] for each in (parts, exact))
    their_factors = [f["default"].weight for layer in theirs for f in (layer.lora_A, layer.lora_B)]
    expected = results(lambda x: formula(x, exact), torch.float64, exact_factors)
    ours = results(lambda x: fused_lora(x, parts), torch.bfloat16, our_factors)
    peft_results = results(lambda x: [layer(x) for layer in theirs], torch.bfloat16, their_factors)
    assert all(gradient.dtype == torch.float32 for gradient in ours[-6:])
    for i, (mine, other, truth) in enumerate(zip(ours, peft_results, expected, strict=True)):
        if i < 4:  # the outputs and ∂L/∂x: fewer roundings
            assert rel(mine, truth) < rel(other, truth), i
        else:  # the same products; sums of 200 may be blocked differently
            assert rel(mine, truth) < 1.02 * rel(other, truth), i


# --- who takes it ----------------------------------------------------------------------------------------------------


def test_only_one_plain_lora_on_a_frozen_plain_layer_takes_it() -> None:
    def takes_it(layer: LoRALinear, x: Tensor | None = None) -> bool:
        return layer.shared_part(torch.randn(TOKENS, IN) if x is None else x) is not None

    def changed(change: Callable[[LoRALinear], Any], base: nn.Module | None = None, **config: Any) -> LoRALinear:
        layer = random_lora(base or nn.Linear(IN, OUT), **config)
        change(layer)
        return layer

    def second(layer: LoRALinear) -> None:
        layer.adapters["second"] = LoRA(layer.base_layer, LoRAConfig())
        layer.active.append("second")

    nothing = lambda layer: None  # noqa: E731
    assert takes_it(changed(nothing)) and takes_it(changed(nothing, NF4Linear.from_linear(nn.Linear(IN, OUT))))
    assert takes_it(changed(lambda layer: layer.adapters["default"].start_from(*layer.adapters["default"].factors())))
    assert takes_it(changed(lambda layer: layer.eval(), lora_dropout=0.5))
    for other in (
        changed(lambda layer: layer.train(), lora_dropout=0.5),
        changed(second),
        changed(lambda layer: layer.merge()),
        changed(lambda layer: setattr(layer, "enabled", False)),
        changed(lambda layer: layer.adapters["default"].train_bias(layer.base_layer)),
        changed(lambda layer: layer.base_layer.weight.requires_grad_()),
        changed(lambda layer: layer.base_layer.bias.requires_grad_()),
        changed(lambda layer: layer.base_layer.register_forward_hook(print)),
        changed(lambda layer: layer.adapters["default"].register_forward_hook(print)),
        changed(nothing, NF4Linear.from_linear(nn.Linear(IN, OUT), compute_dtype=torch.bfloat16)),
        changed(nothing, nn.Linear(IN, OUT).bfloat16()),
    ):
        assert not takes_it(other)


def test_the_start_of_pissa_trains_as_autograd_has_it() -> None:
    layer = random_lora(nn.Linear(IN, OUT))
    adapter = layer.adapters["default"]
    adapter.start_from(torch.randn(R, IN), torch.randn(OUT, R))
    adapter.lora_A.data += 0.1 * torch.randn(R, IN)
    x = torch.randn(TOKENS, IN, requires_grad=True)
    W, s = layer.base_layer.weight, adapter.scaling
    delta = s * (adapter.lora_B @ adapter.lora_A - adapter.start_B @ adapter.start_A)
    expected = F.linear(x, W + delta, layer.base_layer.bias)
    inputs = (x, adapter.lora_A, adapter.lora_B)
    assert layer.shared_part(x) is not None
    y, upstream = project(x, layer, layer)[0], torch.randn(TOKENS, OUT)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)  # float32; terms of about 30 cancel
    for a, b in zip(*(torch.autograd.grad(out, inputs, upstream) for out in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)  # sums of 20 such


def test_an_activation_in_place_may_follow() -> None:
    for base in (nn.Linear(IN, OUT), NF4Linear.from_linear(nn.Linear(IN, OUT))):
        layer, x = random_lora(base), torch.randn(2, TOKENS, IN, requires_grad=True)
        (wanted,) = torch.autograd.grad(project(x, layer, layer)[1].relu().sum(), x)
        assert torch.equal(torch.autograd.grad(project(x, layer, layer)[1].relu_().sum(), x)[0], wanted)


@pytest.mark.parametrize("nf4", [False, True])
def test_compiles_forward_and_backward_in_one_graph(nf4: bool) -> None:
    bases = [nn.Linear(IN, OUT) for _ in range(2)]
    layers = nn.ModuleList([random_lora(NF4Linear.from_linear(base) if nf4 else base) for base in bases])
    x = torch.randn(TOKENS, IN, requires_grad=True)
    torch._dynamo.reset()
    both = lambda x: torch.cat(project(x, *layers))  # noqa: E731
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    inputs = (x, *(parameter for parameter in layers.parameters() if parameter.requires_grad))
    results = [(y, *torch.autograd.grad(y.square().sum(), inputs)) for y in (compiled(x), both(x))]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_torch_func_and_autocast_take_pytorchs_own_steps() -> None:
    layer = random_lora(nn.Linear(IN, OUT))
    x, adapter = torch.randn(TOKENS, IN), layer.adapters["default"]
    W = layer.base_layer.weight + adapter.delta()

    def loss(x: Tensor, W: Tensor) -> Tensor:
        return F.linear(x, W, layer.base_layer.bias).square().sum()

    per_row = torch.func.vmap(torch.func.grad(lambda row: project(row, layer, layer)[0].square().sum()))(x)
    torch.testing.assert_close(per_row, torch.func.vmap(torch.func.grad(loss), (0, None))(x, W), rtol=1e-4, atol=1e-4)
    _, tangent = torch.func.jvp(lambda x: project(x, layer, layer)[1], (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, F.linear(torch.ones_like(x), W), rtol=1e-4, atol=1e-4)  # float32 sums of 48
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.shared_part(x) is None


def test_autocast_around_the_way_back_changes_nothing() -> None:
    layer, x = random_lora(nn.Linear(IN, OUT)), torch.randn(TOKENS, IN, requires_grad=True)
    inputs = (x, *layer.adapters.parameters())
    wanted = torch.autograd.grad(project(x, layer, layer)[0].square().sum(), inputs)
    loss = project(x, layer, layer)[0].square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))
