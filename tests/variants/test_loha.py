"""LoHa against PEFT, and what LoHa and LoKr share: their dropouts and their configuration."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.adapters import tiny_llama
from helpers.methods import Method, assert_near, assert_same, output, parameters, randomize, train_steps
from peft.tuners.loha.layer import HadaWeightCP
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from minilora.adapters import merge
from minilora.adapters.attach import adapters_named, add_adapter, set_adapter
from minilora.errors import InputError
from minilora.nf4.linear import NF4Linear
from minilora.variants.loha import LoHa, LoHaConfig
from minilora.variants.lokr import LoKrConfig

LOHA, LOKR = Method(LoHaConfig, peft.LoHaConfig), Method(LoKrConfig, peft.LoKrConfig)
both_methods = pytest.mark.parametrize("method", [LOHA, LOKR], ids=["LoHa", "LoKr"])


def test_equals_peft_on_a_llama() -> None:
    LOHA.check_equals_peft(r=4, alpha=16, target_modules=["q_proj", "down_proj"])
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 3}}
    LOHA.check_equals_peft(target_modules=["v_proj", "up_proj"], init_weights=False, **patterns)


CONVOLUTIONS = [
    (nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 9)),
    (nn.Conv1d(6, 8, 1), (2, 6, 9)),
    (nn.Conv2d(4, 6, (3, 2), dilation=2), (2, 4, 7, 7)),
    (nn.Conv2d(4, 6, 1, bias=False), (2, 4, 5, 5)),
]


@pytest.mark.parametrize("effective", [False, True])
def test_equals_peft_on_convolutions(effective: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def their_weight(
        t1: Tensor, w1a: Tensor, w1b: Tensor, t2: Tensor, w2a: Tensor, w2b: Tensor, scale: Tensor
    ) -> Tensor:
        first, second = (torch.einsum("ijkl,jr,ip->prkl", *ts) for ts in ((t1, w1b, w1a), (t2, w2b, w2a)))
        return first * second * scale

    # PEFT's forward with autograd's gradient, since that of PEFT is wrong: see the next test
    monkeypatch.setattr(peft.tuners.loha.layer, "make_weight_cp", their_weight)
    torch.manual_seed(0)
    for layer, shape in CONVOLUTIONS:
        values = {"r": 3, "alpha": 6, "target_modules": ["0"], "use_effective_conv2d": effective}
        LOHA.check_equals_peft(nn.Sequential(layer), torch.randn(shape), scale=1.0, **values)


def test_gradients_of_the_effective_convolution_are_right_where_those_of_peft_are_not() -> None:
    torch.manual_seed(0)
    config = LoHaConfig(r=2, target_modules=["0"], use_effective_conv2d=True, init_weights=False)
    adapter = LoHa(nn.Conv2d(4, 5, (3, 2)), config).double()
    names, values = zip(*adapter.named_parameters(), strict=True)

    def ours(*values: Tensor) -> Tensor:
        return torch.func.functional_call(
            Delta(adapter), {f"adapter.{n}": v for n, v in zip(names, values, strict=True)}
        )

    assert torch.autograd.gradcheck(ours, values)
    w1a, w1b, w2a, w2b, t1, t2 = values
    scale = torch.tensor(adapter.scaling)
    theirs = HadaWeightCP.apply(t1, w1a, w1b, t2, w2a, w2b, scale)
    torch.testing.assert_close(theirs, adapter.delta())
    right, wrong = (torch.autograd.grad(y.sum(), values) for y in (adapter.delta(), theirs))
    differing = [n for n, a, b in zip(names, right, wrong, strict=True) if not torch.allclose(a, b)]
    assert differing == ["hada_w1_a", "hada_w2_a"], "PEFT 0.21.2; where this is mended, compare with it above"


class Delta(nn.Module):
    def __init__(self, adapter: LoHa) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self) -> Tensor:
        return self.adapter.delta()


@pytest.mark.parametrize("values", [{}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 9}}])
@pytest.mark.filterwarnings("error:Unexpected keyword")  # PEFT does not know a key in adapter_config.json
def test_folders_go_both_ways(values: dict[str, Any], tmp_path: Path) -> None:
    values = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **values}
    LOHA.check_folders_both_ways(tmp_path, **values)


@both_methods
def test_a_convolution_in_groups_equals_peft_and_merges(method: Method) -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Conv2d(8, 12, 3, groups=2)), torch.randn(2, 8, 5, 5)
    ours, theirs = method.both(base, r=2, target_modules=["0"])
    assert_same(parameters(ours), parameters(theirs))
    randomize(ours, theirs, scale=1.0)
    assert_near(output(ours, x), output(theirs, x))
    assert_near(torch.tensor(train_steps(ours, 10, x)), torch.tensor(train_steps(theirs, 10, x)))
    before = output(ours, x)
    merge(ours)
    assert_near(output(ours, x), before)


def peft_draws_one_more(model: nn.Module, x: Tensor, seed: int) -> Tensor:
    """PEFT draws a number for module dropout even where there is none; minilora does not."""
    torch.manual_seed(seed)
    if not isinstance(model, peft.PeftModel):
        torch.rand(1)
    return model(x)


def the_same_draws(model: nn.Module, x: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return model(x)


@pytest.mark.parametrize(
    ("dropouts", "run"),
    [
        ({"rank_dropout": 0.4}, peft_draws_one_more),
        ({"module_dropout": 0.5}, the_same_draws),
        ({"rank_dropout": 0.4, "module_dropout": 0.3}, the_same_draws),
    ],
)
@both_methods
def test_dropouts_are_those_of_peft(method: Method, dropouts: dict[str, float], run: Callable[..., Tensor]) -> None:
    settings: list[dict[str, Any]] = [{}] if method is LOHA else [{}, {"rank_dropout_scale": True}]
    torch.manual_seed(0)
    for values in settings:
        base, x = nn.Sequential(nn.Linear(12, 16)), torch.randn(5, 12)
        ours, theirs = method.both(base, r=2, target_modules=["0"], **dropouts, **values)
        randomize(ours, theirs, scale=1.0)
        ours.train(), theirs.train()
        results = set()
        for seed in range(6):
            y = run(ours, x, seed)
            torch.testing.assert_close(y, run(theirs, x, seed))
            results.add(float(y.detach().sum()))
        assert len(results) > 1, "it draws anew each time"
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@both_methods
def test_rank_dropout_that_drops_every_row_gives_the_base_layer(method: Method) -> None:
    model = nn.Sequential(nn.Linear(4, 1))
    add_adapter(model, method.config(r=1, target_modules=["0"], rank_dropout=0.99))
    randomize(model)
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    torch.testing.assert_close(model.train()(x), model[0].base_layer(x))


@both_methods
@pytest.mark.parametrize("kind", ["nf4", "Conv1D"])
def test_layers_that_peft_does_not_know(method: Method, kind: str) -> None:
    torch.manual_seed(0)
    layer = NF4Linear.from_linear(nn.Linear(64, 16)) if kind == "nf4" else Conv1D(16, 64)
    method.check_adds_delta(layer, r=2)


@both_methods
def test_bfloat16_masters_are_multiplied_in_float32(method: Method) -> None:
    model = nn.Sequential(nn.Linear(12, 16))
    add_adapter(model, method.config(r=1, target_modules=["0"]))
    randomize(model)
    adapter = adapters_named(model, "default")["0"].to(torch.bfloat16)
    delta = adapter.delta()
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta, adapter.double().delta().float())


@both_methods
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "a rank must be a whole number of at least 1, not 0"),
        ({"rank_pattern": {"q_proj": 1.5}}, "not 1.5"),
        ({"alpha": "16"}, "alpha"),
        ({"rank_dropout": 1.0}, "rank_dropout"),
        ({"module_dropout": -0.1}, "module_dropout"),
        ({"init_weights": "pizza"}, "init_weights"),
    ],
)
def test_a_value_out_of_range_is_named(method: Method, values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"{method.ours.__name__}: .*{message}"):
        method.config(**values)


@both_methods
def test_layers_that_it_cannot_adapt_are_refused(method: Method) -> None:
    method.check_refuses(nn.Embedding(4, 4), nn.Conv3d(4, 4, 1))


@both_methods
def test_names_and_defaults_are_those_of_peft(method: Method) -> None:
    method.check_names_and_defaults()


def test_several_adapters_add_up() -> None:
    torch.manual_seed(0)
    ours = tiny_llama()
    add_adapter(ours, LoHaConfig(r=2, target_modules=["q_proj"]), "default")
    randomize(ours)
    alone = output(ours)
    add_adapter(ours, LoKrConfig(r=2, target_modules=["q_proj"]), "other")
    set_adapter(ours, ["default", "other"])
    torch.testing.assert_close(output(ours), alone)  # the other is zero at its start
