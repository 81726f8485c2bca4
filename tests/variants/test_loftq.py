"""LoftQ: PEFT's Q, A and B where the scaling is 1, a smaller error than plain NF4's, and what becomes of the base."""

import copy
import importlib.util
from typing import Any

import peft
import pytest
import torch
from helpers.start import IN, OUT, R, Start, adapter, assert_trains_as, base, refused, rel, train
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from minilora.adapters import merge
from minilora.adapters.attach import add_adapter, disable_adapters
from minilora.adapters.layer_kinds import kind_of
from minilora.adapters.lora_config import LoRAConfig
from minilora.adapters.merge import unload, unmerge
from minilora.errors import InputError
from minilora.formats.peft import load_adapter, save_adapter
from minilora.nf4.codec import dequantize, quantize
from minilora.nf4.linear import NF4Linear

LOFTQ = Start("loftq")


bnb = pytest.importorskip("bitsandbytes")


@pytest.fixture
def peft_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT computes LoftQ on "cuda", even where there is none, and wants SciPy installed, which it does not use."""

    def here(to: Any) -> Any:
        def moved(tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
            options |= {"device": "cpu"} if options.get("device") == "cuda" else {}
            return to(tensor, *("cpu" if argument == "cuda" else argument for argument in arguments), **options)

        return moved

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "scipy" or find_spec(name, *rest))
    monkeypatch.setattr(torch.Tensor, "to", here(torch.Tensor.to))
    monkeypatch.setattr(bnb.nn.Params4bit, "to", here(bnb.nn.Params4bit.to))


def loftq(iterations: int, **config: Any) -> dict[str, Any]:
    return {"loftq_config": {"loftq_bits": 4, "loftq_iter": iterations}, **config}


def weight(model: nn.Module) -> Tensor:
    """Q + s·BA."""
    with torch.no_grad():
        return model[0].base_layer.dequantize(torch.float32) + adapter(model).delta()


@pytest.mark.usefixtures("peft_on_the_cpu")
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_q_a_b_and_training_equal_peft(iterations: int, use_dora: bool) -> None:
    config = loftq(iterations, lora_alpha=R, use_dora=use_dora)  # s = 1
    found, expected = LOFTQ.ours(**config), LOFTQ.theirs(**config)
    Q = expected.base_model.model[0].base_layer.weight
    assert torch.equal(found[0].base_layer.dequantize(torch.float32), Q)
    assert_trains_as(found, expected)


@pytest.mark.usefixtures("peft_on_the_cpu")
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_scaling_is_part_of_the_fit_which_peft_leaves_out(use_rslora: bool) -> None:
    config = loftq(3, lora_alpha=3 * R, use_rslora=use_rslora)
    found, one = LOFTQ.ours(**config), LOFTQ.ours(**loftq(3, lora_alpha=R))
    assert adapter(found).scaling != 1
    assert torch.equal(found[0].base_layer.weight, one[0].base_layer.weight), "the same Q"
    torch.testing.assert_close(weight(found), weight(one))
    layer = LOFTQ.theirs(**config).base_model.model[0]
    assert (
        rel(
            adapter(found).scaling * adapter(found).lora_B @ adapter(found).lora_A,
            layer.get_delta_weight("default") / layer.scaling["default"],
        )
        < 1e-5
    )


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_error_falls_against_nf4_and_with_a_few_iterations(kind: str) -> None:
    """It need not with many, or at a high rank: the absmax of NF4 follow the largest weights, not the error."""
    torch.manual_seed(0)
    plain = nn.Linear(128, 128) if kind == "linear" else Conv1D(128, 128)
    W = kind_of(plain).weight(plain).detach()
    errors = [rel(dequantize(quantize(W)), W)]
    for iterations in (1, 2, 4):
        model = nn.Sequential(copy.deepcopy(plain))
        add_adapter(model, LoRAConfig(r=16, target_modules=["0"], init_lora_weights="loftq", **loftq(iterations)))
        errors.append(rel(weight(model), W))
    assert errors == sorted(errors, reverse=True)
    # The largest 16 of 128 singular values of a random residual hold 0.38 of its squares, and √(1 − 0.38) = 0.79
    assert errors[1] < 0.85 * errors[0]


def test_the_base_becomes_4_bits_and_stays_so() -> None:
    model, x = LOFTQ.ours(), torch.randn(5, IN)
    Q = model[0].base_layer
    assert isinstance(Q, NF4Linear)
    assert Q.compute_dtype == torch.float32
    assert torch.equal(Q.bias, base()[0].bias)
    assert "adapters" in "".join(model.state_dict())
    assert not any("new_base" in key for key in model.state_dict())
    off = Q(x)
    with disable_adapters(model):
        assert torch.equal(model(x), off), "switched off, it is Q and not W"
    train(model)
    tuned = model(x)
    merge(model)
    torch.testing.assert_close(model(x), tuned)
    unmerge(model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    assert unload(model)[0] is Q
    dense = unload(twin, merge=True)[0]
    assert type(dense) is nn.Linear
    torch.testing.assert_close(dense(x), tuned)


def test_bfloat16_keeps_its_dtype() -> None:
    model = base().bfloat16()
    add_adapter(model, LoRAConfig(r=R, target_modules=["0"], init_lora_weights="loftq"))
    assert model[0].base_layer.compute_dtype == torch.bfloat16
    assert model(torch.randn(3, IN).bfloat16()).dtype == torch.bfloat16
    merge(model)
    assert model[0].base_layer.weight.dtype == torch.bfloat16


def test_where_it_cannot_be_is_refused() -> None:
    LOFTQ.check_refuses(base("nf4"), "full weights.*without quantize=")
    LOFTQ.check_takes_linear_layers_only()
    LOFTQ.check_refuses(base(), f"at most {OUT}", r=OUT + 1)
    model = Start("gaussian").ours()
    with refused(model, r"0 has an adapter.*unload\(model\) first"):
        add_adapter(model, LoRAConfig(r=R, target_modules=["0"], init_lora_weights="loftq"), "other")
    assert list(model[0].adapters) == ["default"]


def test_another_adapter_may_follow() -> None:
    model, x = LOFTQ.ours(), torch.randn(3, IN)
    add_adapter(model, LoRAConfig(r=2, target_modules=["0"]), "other")
    torch.testing.assert_close(model(x), model[0].base_layer(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loftq_bits": 8}, "loftq_bits=8: only 4 bits"),
        ({"loftq_iter": 0}, "loftq_iter must be a whole number"),
        ({"loftq_iter": "two"}, "loftq_iter must be a whole number"),
        ({"iter": 1}, "keys among loftq_bits, loftq_iter"),
        ([1], "must be a dict"),
    ],
)
def test_options_out_of_range_are_named(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"LoRAConfig: loftq_config.*{message}"):
        LoRAConfig(init_lora_weights="loftq", loftq_config=options)


def test_defaults_are_those_of_peft() -> None:
    assert LoRAConfig(init_lora_weights="loftq").loftq_config == vars(peft.LoftQConfig())


@pytest.mark.usefixtures("peft_on_the_cpu")
def test_a_folder_goes_both_ways(tmp_path: Any) -> None:
    """Who loads it has the full weights, and quantizes them again to the same Q, which does not depend on s."""
    x = torch.randn(5, IN)
    model = LOFTQ.ours(**loftq(2, lora_alpha=3 * R))
    train(model)
    save_adapter(model, tmp_path / "ours")
    expected = peft.PeftModel.from_pretrained(base(), tmp_path / "ours", is_trainable=True)
    torch.testing.assert_close(expected(x), model(x), rtol=1e-5, atol=1e-5)
    train(expected)
    expected.save_pretrained(tmp_path / "theirs")
    again = base()
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(again(x), expected(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"adapter_config\.json.*0: init_lora_weights='loftq' needs the full weights"):
        load_adapter(base("nf4"), tmp_path / "theirs")
    with pytest.raises(InputError, match="unload"):
        save_adapter(model, tmp_path / "lora", as_lora=True)
