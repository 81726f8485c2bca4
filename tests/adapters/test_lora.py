"""LoRA on one layer, against the installed PEFT on the same weights and against float64."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import lora_layer, rel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minilora.adapters.layer import LoRALinear
from minilora.adapters.lora import LoRA
from minilora.adapters.lora_config import LoRAConfig
from minilora.errors import InputError
from minilora.nf4.linear import NF4Linear

peft = pytest.importorskip("peft")

IN, OUT, TOKENS = 48, 40, 20


def peft_layer(base: nn.Module, autocast_adapter_dtype: bool = True, **config: Any) -> nn.Module:
    model = nn.Sequential(copy.deepcopy(base))
    config = peft.LoraConfig(target_modules=["0"], **config)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype).base_model.model[0]


def parameters_of(layer: nn.Module, name: str = "default") -> tuple[nn.Parameter, nn.Parameter]:
    if isinstance(layer, LoRALinear):
        return layer.adapters[name].lora_A, layer.adapters[name].lora_B
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def fill(layers: list[nn.Module], name: str = "default", scale: float = 0.1) -> None:
    """The same random A and B in every layer, so that the update is not zero."""
    A, B = (parameter.float() for parameter in parameters_of(layers[0], name))
    values = torch.randn_like(A) / math.sqrt(A.shape[1]), torch.randn_like(B) * scale
    for layer in layers:
        for parameter, value in zip(parameters_of(layer, name), values, strict=True):
            parameter.data.copy_(value)


def run(layer: nn.Module, x: Tensor, target: Tensor, name: str = "default") -> dict[str, Tensor]:
    """Output, loss and every gradient of one step."""
    x = x.clone().requires_grad_()
    y = layer(x)
    loss = F.mse_loss(y.float() if y.dtype != torch.float64 else y, target)
    A, B = parameters_of(layer, name)
    gradients = torch.autograd.grad(loss, (x, A, B))
    return {"y": y.detach(), "loss": loss.detach(), **dict(zip(("x", "A", "B"), gradients, strict=True))}


def losses_of_20_steps(layer: nn.Module, x: Tensor, target: Tensor, lr: float = 1e-2) -> list[float]:
    optimizer = torch.optim.AdamW(parameters_of(layer), lr=lr)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(layer(x).to(target.dtype), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


# --- equal to PEFT in float32 ----------------------------------------------------------------------------------------

FLOAT32 = 1e-6  # a few float32 roundings (6e-8 each) in sums over some dozens of terms


@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_same_seed_draws_the_same_adapter_as_peft(init: bool | str) -> None:
    base = nn.Linear(IN, OUT)
    torch.manual_seed(7)
    theirs = peft_layer(base, r=4, init_lora_weights=init)
    torch.manual_seed(7)
    ours = lora_layer(base, r=4, init_lora_weights=init)
    for a, b in zip(parameters_of(ours), parameters_of(theirs), strict=True):
        assert torch.equal(a, b)
    assert (parameters_of(ours)[1].count_nonzero() == 0) == (init is not False)


def test_masters_are_float32_whatever_the_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        layer = lora_layer(nn.Linear(IN, OUT))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(parameter.dtype == torch.float32 for parameter in parameters_of(layer))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("base_kind", ["dense", "nf4"])
def test_forward_gradients_and_20_steps_equal_peft(base_kind: str, bias: bool, use_rslora: bool) -> None:
    base = nn.Linear(IN, OUT, bias=bias)
    if base_kind == "nf4":  # PEFT gets a dense layer that holds what the 4 bits stand for
        quantized = NF4Linear.from_linear(base)
        base.weight.data = quantized.dequantize(torch.float32)
    config = {"r": 6, "lora_alpha": 16, "use_rslora": use_rslora}
    theirs = peft_layer(base, **config)
    ours = lora_layer(quantized if base_kind == "nf4" else base, **config)
    x, target = torch.randn(2, TOKENS, IN), torch.randn(2, TOKENS, OUT)

    fill([ours, theirs])
    for key, value in run(theirs, x, target).items():
        assert rel(run(ours, x, target)[key], value) < FLOAT32, key
    for a, b in zip(losses_of_20_steps(ours, x, target), losses_of_20_steps(theirs, x, target), strict=True):
        assert a == pytest.approx(b, rel=FLOAT32)


def test_equals_peft_over_bitsandbytes_linear4bit() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    dense = nn.Linear(128, 64, bias=True)
    theirs = bnb.nn.Linear4bit(128, 64, bias=True, compute_dtype=torch.float32, quant_type="nf4")
    theirs.load_state_dict(dense.state_dict())
    theirs = peft_layer(theirs.to("cpu"), r=4, lora_alpha=8)  # .to() quantizes
    ours = lora_layer(NF4Linear.from_linear(dense), r=4, lora_alpha=8)
    fill([ours, theirs])
    x, target = torch.randn(TOKENS, 128), torch.randn(TOKENS, 64)
    for key, value in run(theirs, x, target).items():
        assert rel(run(ours, x, target)[key], value) < FLOAT32, key


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_draws_the_same_masks_as_peft(p: float) -> None:
    base = nn.Linear(IN, OUT)
    ours, theirs = lora_layer(base, lora_dropout=p), peft_layer(base, lora_dropout=p)
    fill([ours, theirs])
    x, target = torch.randn(TOKENS, IN), torch.randn(TOKENS, OUT)
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(3)
        results.append(run(layer.train(), x, target))
    for key in results[0]:
        assert rel(results[0][key], results[1][key]) < FLOAT32, key
    assert torch.equal(ours.eval()(x), ours(x)), "eval drops nothing"
    assert not torch.equal(ours.train()(x), ours(x)), "training drops something else each time"


def test_several_active_adapters_add_up_as_in_peft() -> None:
    base = nn.Linear(IN, OUT)
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), peft.LoraConfig(r=4, target_modules=["0"]), "one")
    model.add_adapter("two", peft.LoraConfig(r=4, target_modules=["0"]))
    model.base_model.set_adapter(["one", "two"])
    theirs, ours = model.base_model.model[0], lora_layer(base, "one", "two", r=4)
    # PEFT's config default lora_alpha=8 is lora_layer's
    x, target = torch.randn(TOKENS, IN), torch.randn(TOKENS, OUT)
    for name in ("one", "two"):
        fill([ours, theirs], name)
    for name in ("one", "two"):
        for key, value in run(theirs, x, target, name).items():
            assert rel(run(ours, x, target, name)[key], value) < FLOAT32, key


# --- the mathematics itself ------------------------------------------------------------------------------------------


@given(
    shape=st.lists(st.integers(0, 4), min_size=0, max_size=3),
    r=st.integers(1, 9),
    alpha=st.floats(0.25, 64),
    use_rslora=st.booleans(),
    bias=st.booleans(),
    nf4=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_forward_is_the_formula(
    shape: list[int], r: int, alpha: float, use_rslora: bool, bias: bool, nf4: bool
) -> None:
    base = nn.Linear(16, 12, bias=bias)
    layer = lora_layer(NF4Linear.from_linear(base) if nf4 else base, r=r, lora_alpha=alpha, use_rslora=use_rslora)
    fill([layer])
    W = layer.base_layer.dequantize(torch.float32) if nf4 else base.weight
    A, B = (p.double() for p in parameters_of(layer))
    s = alpha / math.sqrt(r) if use_rslora else alpha / r
    x = torch.randn(*shape, 16)
    expected = x.double() @ (W.double() + s * B @ A).T + (base.bias.double() if bias else 0)
    assert layer(x).shape == expected.shape
    # float32: 30 additions of terms no larger than the sum of their magnitudes
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5 * (1 + s))


@pytest.mark.parametrize("kind", [nn.Linear, NF4Linear])
def test_gradients_equal_finite_differences(kind: type) -> None:
    base = nn.Linear(6, 5)
    if kind is NF4Linear:
        base = NF4Linear.from_linear(base, compute_dtype=torch.float64)
    layer = lora_layer(base, "one", "two", r=3).double()
    for name in ("one", "two"):
        fill([layer], name)
    parameters = [p for name in ("one", "two") for p in parameters_of(layer, name)]
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters))


def test_a_new_adapter_changes_nothing() -> None:
    for base in (nn.Linear(IN, OUT), NF4Linear.from_linear(nn.Linear(IN, OUT))):
        x = torch.randn(TOKENS, IN)
        assert rel(lora_layer(base)(x), base(x)) < FLOAT32  # b + 0 + Wx against Wx + b: another order of summation


# --- bfloat16 --------------------------------------------------------------------------------------------------------


def test_scale_and_b_are_rounded_together() -> None:
    adapter = LoRA(nn.Linear(8, 8), LoRAConfig(r=8, lora_alpha=7))  # s = 7/8
    nn.init.normal_(adapter.lora_B)
    nn.init.eye_(adapter.lora_A)
    exact = (adapter.scaling * adapter.lora_B.double()).bfloat16()
    assert torch.equal(adapter(torch.eye(8).bfloat16()).T, exact)


def oracle_and_bfloat16_layers(
    seed: int, scale: float, kind: str, bias: bool
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A float64 layer, and with the same weights ours, PEFT with float32 adapters, PEFT with bfloat16 adapters."""
    torch.manual_seed(seed)
    base = nn.Linear(256, 192, bias=bias).bfloat16()
    ours = base
    if kind == "nf4":
        ours = NF4Linear.from_linear(base, compute_dtype=torch.bfloat16)
        base.weight.data = ours.dequantize(torch.bfloat16)
    layers = {
        "ours": lora_layer(ours, r=16, lora_alpha=32),
        "peft": peft_layer(base, r=16, lora_alpha=32),
        "peft, bfloat16 adapters": peft_layer(base, autocast_adapter_dtype=False, r=16, lora_alpha=32),
    }
    oracle = lora_layer(copy.deepcopy(base), r=16, lora_alpha=32).double()
    fill([oracle, *layers.values()], scale=scale)
    return oracle, layers


def errors_in_bfloat16(seed: int, scale: float, kind: str, bias: bool) -> dict[str, dict[str, float]]:
    """Distance to float64 of the output and of each gradient."""
    oracle, layers = oracle_and_bfloat16_layers(seed, scale, kind, bias)
    x, upstream = torch.randn(200, 256).bfloat16(), torch.randn(200, 192).bfloat16()

    def outputs(layer: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        leaf = x.to(dtype).requires_grad_()
        y = layer(leaf)
        gradients = torch.autograd.grad(y, (leaf, *parameters_of(layer)), upstream.to(dtype))
        return {"y": y.detach(), **dict(zip(("x", "A", "B"), gradients, strict=True))}

    exact = outputs(oracle, torch.float64)
    return {
        name: {key: rel(value, exact[key]) for key, value in outputs(layer, torch.bfloat16).items()}
        for name, layer in layers.items()
    }


# |s·BAx| / |Wx| is about 0.03, 0.14 and 0.4 at these scales: what adapters reach in training, and beyond.
@pytest.mark.parametrize("scale", [0.0025, 0.01, 0.03])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("bias", [False, True])
def test_bfloat16_is_no_further_from_float64_than_peft(bias: bool, kind: str, scale: float) -> None:
    for seed in range(3):
        errors = errors_in_bfloat16(seed, scale, kind, bias)
        ours, theirs, theirs_16 = errors["ours"], errors["peft"], errors["peft, bfloat16 adapters"]
        assert ours["y"] < min(theirs["y"], theirs_16["y"]), "one rounding of y instead of two"
        for key in ("x", "A", "B"):  # the same products in the same dtype; sums of 200 may be blocked differently
            assert ours[key] < theirs_16[key] * 1.02, key


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_bfloat16_losses_of_20_steps_are_no_further_from_float64_than_peft(kind: str) -> None:
    errors = {"ours": 0.0, "peft": 0.0, "peft, bfloat16 adapters": 0.0}
    for seed in range(8):
        oracle, layers = oracle_and_bfloat16_layers(seed, 0.0, kind, bias=True)
        x = torch.randn(200, 256).bfloat16()
        target = (layers["ours"].base_layer(x).float() + 0.3 * torch.randn(200, 192)).detach()
        exact = losses_of_20_steps(oracle, x.double(), target.double(), lr=1e-3)
        for name, layer in layers.items():
            losses = losses_of_20_steps(layer, x, target, lr=1e-3)
            errors[name] += sum(abs(a - b) for a, b in zip(losses, exact, strict=True))
    assert errors["ours"] < errors["peft"] < errors["peft, bfloat16 adapters"]


def test_training_in_bfloat16_keeps_no_float32_activation() -> None:
    base = nn.Linear(IN, OUT).bfloat16()
    x = torch.randn(TOKENS, IN).bfloat16().requires_grad_()

    def saved_activations(layer: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.shape[0] == TOKENS:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layer(x)
        del y
        return sum(sizes.values())

    # x and A x, both in bfloat16; PEFT keeps both in float32 (and x in bfloat16 belongs to the caller)
    assert saved_activations(lora_layer(base)) == 2 * TOKENS * (IN + 8)
    assert saved_activations(peft_layer(base)) >= 4 * TOKENS * (IN + 8)


# --- dtypes, autocast, compile, other base layers --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_masters_and_their_gradients_are_float32(dtype: torch.dtype) -> None:
    layer = lora_layer(nn.Linear(IN, OUT).to(dtype))
    fill([layer])
    y = layer(torch.randn(TOKENS, IN, dtype=dtype))
    y.float().sum().backward()
    assert y.dtype == dtype
    for parameter in parameters_of(layer):
        assert parameter.dtype == parameter.grad.dtype == torch.float32


def test_input_wider_than_the_compute_dtype() -> None:
    quantized = NF4Linear.from_linear(nn.Linear(IN, OUT), compute_dtype=torch.bfloat16)
    layer = lora_layer(quantized)
    fill([layer])
    x = torch.randn(TOKENS, IN)
    expected = x @ quantized.dequantize(torch.float32).T + quantized.bias + x @ layer.adapters["default"].delta().T
    assert layer(x).dtype == torch.float32
    assert rel(layer(x), expected) < 2**-7  # bfloat16 keeps 8 bits: x, W and the sum are each within 2^-9


@pytest.mark.parametrize("nf4", [False, True])
def test_autocast_runs_in_bfloat16_and_trains_float32_masters(nf4: bool) -> None:
    base = nn.Linear(IN, OUT)
    layer = lora_layer(NF4Linear.from_linear(base, compute_dtype=torch.bfloat16) if nf4 else base)
    fill([layer])
    x = torch.randn(TOKENS, IN)
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = layer(x), layer.base_layer(x)
    assert y.dtype == plain.dtype, "an adapter does not change what a layer returns under autocast"
    assert 0 < rel(y, layer(x)) < 2**-7 or nf4  # as above
    y.float().pow(2).sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in parameters_of(layer))


def test_a_subclass_or_a_hooked_layer_is_called_and_not_bypassed() -> None:
    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = torch.randn(TOKENS, IN)
    layer = lora_layer(Twice(IN, OUT))
    fill([layer])
    update = x @ layer.adapters["default"].delta().T
    torch.testing.assert_close(layer(x), layer.base_layer(x) + update)

    hooked = lora_layer(nn.Linear(IN, OUT))
    fill([hooked])
    before, seen = hooked(x), []
    hooked.base_layer.register_forward_hook(lambda module, args, y: seen.append(y))
    torch.testing.assert_close(hooked(x), before)
    assert len(seen) == 1

    hooked = lora_layer(nn.Linear(IN, OUT))
    hooked.base_layer.register_full_backward_hook(lambda module, grad_x, grad_y: seen.append(grad_y))
    hooked(x.requires_grad_()).sum().backward()
    assert len(seen) == 2

    replaced = lora_layer(nn.Linear(IN, OUT))
    fill([replaced])
    update, own = x @ replaced.adapters["default"].delta().T, replaced.base_layer.forward
    replaced.base_layer.forward = lambda x: 2 * own(x)  # as accelerate replaces it, to fetch the weight first
    torch.testing.assert_close(replaced(x), 2 * own(x) + update)


def test_compiles_without_a_graph_break() -> None:
    layer = lora_layer(nn.Linear(IN, OUT), "one", "two", lora_dropout=0.1).eval()
    fill([layer], "one")
    x = torch.randn(TOKENS, IN)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


# --- merge -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_merge_rounds_the_exact_sum_once(dtype: torch.dtype, masters: torch.dtype) -> None:
    layer = lora_layer(nn.Linear(IN, OUT).to(dtype), "one", "two")
    for name in ("one", "two"):
        fill([layer], name)
    layer.adapters.to(masters)
    exact = layer.base_layer.weight.double() + sum(a.double().delta() for a in copy.deepcopy(layer).adapters.values())
    layer.merge()
    merged = layer.base_layer.weight
    assert merged.dtype == dtype
    if dtype in (torch.bfloat16, torch.float16):
        assert (merged != exact.to(dtype)).float().mean() < 5e-3  # float32 differs from float64 only near a midpoint
    else:
        assert rel(merged, exact) < FLOAT32


def test_merged_equals_unmerged_and_unmerge_restores_the_bits() -> None:
    for base in (nn.Linear(IN, OUT), NF4Linear.from_linear(nn.Linear(IN, OUT))):
        layer = lora_layer(base)
        fill([layer])
        bits = {key: value.clone() for key, value in base.state_dict().items()}
        x = torch.randn(TOKENS, IN)
        before = layer(x)
        layer.merge()
        assert layer.merged == ["default"]
        assert type(layer.base_layer) is nn.Linear, "never back into 4 bits"
        assert rel(layer(x), before) < FLOAT32
        layer.merge()  # merging twice adds nothing
        assert rel(layer(x), before) < FLOAT32
        layer.unmerge()
        assert layer.base_layer is base
        assert all(torch.equal(value, bits[key]) for key, value in base.state_dict().items())
        assert torch.equal(layer(x), before)


def test_merge_equals_peft() -> None:
    base = nn.Linear(IN, OUT)
    ours, theirs = lora_layer(base, r=4, lora_alpha=16), peft_layer(base, r=4, lora_alpha=16)
    fill([ours, theirs])
    ours.merge()
    theirs.merge()
    assert rel(ours.base_layer.weight, theirs.base_layer.weight) < FLOAT32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_merging_what_is_not_finite_is_an_error_that_names_the_layer(value: float) -> None:
    layer = lora_layer(nn.Linear(IN, OUT))
    fill([layer])
    parameters_of(layer)[1].data[3, 2] = value
    with pytest.raises(InputError, match=r"model\.layers\.3\.q_proj.*NaN"):
        layer.merge("model.layers.3.q_proj")
    assert not layer.merged

    layer = lora_layer(nn.Linear(IN, OUT))
    layer.adapters["default"].train_bias(layer.base_layer)
    layer.adapters["default"].bias.data[2] = value
    with pytest.raises(InputError, match=r"q_proj.*NaN"):
        layer.merge("q_proj")


def test_autocast_does_not_round_what_is_merged() -> None:
    layer = lora_layer(nn.Linear(IN, OUT))
    fill([layer])
    layer.merge()
    W = layer.base_layer.weight
    layer.unmerge()
    with torch.autocast("cpu", torch.bfloat16):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, W)


@pytest.mark.parametrize("normed", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_merging_into_a_weight_that_is_computed_is_refused(normed: Callable[[nn.Module], nn.Module]) -> None:
    layer, x = lora_layer(normed(nn.Linear(IN, OUT))), torch.randn(TOKENS, IN)
    fill([layer])
    before = layer(x)
    with pytest.raises(InputError, match=r"q_proj: its weight is computed"):
        layer.merge("q_proj")
    assert torch.equal(layer(x), before)


def test_merging_into_a_foreign_4_bit_layer_is_refused() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    base = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    layer = lora_layer(base)
    with pytest.raises(InputError, match="cannot merge into a Linear4bit"):
        layer.merge()


def test_merged_layer_leaves_tied_weights_alone_and_saves_like_a_linear() -> None:
    embedding, head = nn.Embedding(OUT, IN), nn.Linear(IN, OUT, bias=False)
    head.weight = embedding.weight
    layer = lora_layer(head)
    fill([layer])
    before = embedding.weight.clone()
    layer.merge()
    assert torch.equal(embedding.weight, before)
    assert {key for key in layer.state_dict() if "adapters" not in key} == {"base_layer.weight"}
    layer.unmerge()
    assert layer.base_layer.weight is embedding.weight


def test_a_merged_layer_that_moves_or_is_copied_still_unmerges() -> None:
    layer = lora_layer(nn.Linear(IN, OUT))
    fill([layer])
    layer.merge()
    twin = copy.deepcopy(layer).to(torch.float64)
    twin.unmerge()
    assert twin.base_layer.weight.dtype == torch.float64
    layer.unmerge()
    assert torch.equal(twin.base_layer.weight, layer.base_layer.weight.double())
    assert twin.base_layer.weight.data_ptr() != layer.base_layer.weight.data_ptr()


def test_no_adapter_arithmetic_when_disabled_or_merged() -> None:
    layer = lora_layer(nn.Linear(IN, OUT))
    fill([layer])
    x = torch.randn(TOKENS, IN)
    plain = layer.base_layer(x)
    calls: list[object] = []
    layer.adapters["default"].register_forward_pre_hook(lambda *args: calls.append(args))
    layer.enabled = False
    assert torch.equal(layer(x), plain)
    layer.merge()
    assert torch.equal(layer(x), plain), "disabled, even when merged, is the base layer"
    layer.enabled = True
    layer(x)
    assert not calls
    layer.unmerge()
    layer(x)
    assert calls


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "rank"),
        ({"r": 2.5}, "rank"),
        ({"rank_pattern": {"q_proj": 0}}, "rank"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"lora_dropout": "0.1"}, "lora_dropout"),
        ({"use_dora": "False"}, "use_dora must be True or False, not 'False'"),
        ({"init_lora_weights": "pizza"}, "init_lora_weights"),
        ({"init_lora_weights": None}, "init_lora_weights"),
    ],
)
def test_a_value_out_of_range_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LoRAConfig(**values)


def test_names_and_defaults_are_those_of_peft() -> None:
    ours, theirs = LoRAConfig(), peft.LoraConfig()
    for name in vars(ours):
        if name != "task_type":  # PEFT leaves it open; every model here is a causal language model
            assert getattr(ours, name) == getattr(theirs, name), name
