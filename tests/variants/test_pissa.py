"""PiSSA: PEFT's numbers without touching W, the fast SVD, and where it cannot be."""

from typing import Any

import peft
import pytest
import torch
from helpers.start import ALPHA, IN, KINDS, OUT, R, Start, adapter, assert_trains_as, base, rel, seeded, train
from torch import nn

from minilora.adapters.attach import add_adapter, disable_adapters, set_adapter
from minilora.adapters.lora_config import LoRAConfig
from minilora.errors import InputError
from minilora.nf4.linear import NF4Linear
from minilora.torch_helpers import randomized_svd

PISSA = Start("pissa")


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_output_gradients_and_trained_parameters_equal_peft(kind: str, config: dict[str, Any]) -> None:
    PISSA.check_trains_as_peft(kind, **config)


def test_dropout_falls_on_the_same_terms_as_in_peft() -> None:
    found, expected = (make(lora_dropout=0.5) for make in (PISSA.ours, PISSA.theirs))
    assert_trains_as(found.train(), expected.train())
    assert rel(train(found)["y"], train(found.eval())["y"]) > 0.01, "or dropout did nothing"


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_start_is_the_best_part_of_rank_r_and_the_scaling_is_taken_in(use_rslora: bool) -> None:
    model = PISSA.ours(use_rslora=use_rslora)
    lora, W = adapter(model), model[0].base_layer.weight
    U, S, Vh = torch.linalg.svd(W.double())
    assert rel(lora.scaling * lora.lora_B @ lora.lora_A, U[:, :R] * S[:R] @ Vh[:R]) < 1e-5  # a float32 SVD
    assert lora.scaling == ALPHA / (R**0.5 if use_rslora else R)


def test_w_stays_and_the_start_changes_nothing() -> None:
    PISSA.check_starts_at_the_base()
    plain, model, x = base(), PISSA.ours(), torch.randn(7, IN)
    train(model)
    with disable_adapters(model):
        assert torch.equal(model(x), plain(x))


def falling(model: nn.Sequential, factor: float = 0.6) -> nn.Sequential:
    """Give the layer singular values 1, factor, factor², …"""
    U, S, Vh = torch.linalg.svd(model[0].weight.data, full_matrices=False)
    model[0].weight.data = U * factor ** torch.arange(len(S)) @ Vh
    return model


@pytest.mark.parametrize("niter", [0, 1, 4, 16])
def test_the_fast_svd_is_as_near_to_the_exact_one_as_theory_says_and_so_is_peft_s(niter: int) -> None:
    """After n iterations the wanted subspace is off by (σ_{r+1} / σ_r)^(2n + 1), times what Ω misses: not much over
    √(in · r), 10 here (Halko et al., arXiv 0909.4061, theorem 9.2 and section 10)."""
    U, S, Vh = torch.linalg.svd(falling(base())[0].weight.double())
    best = U[:, :R] * S[:R] @ Vh[:R]
    bound = 10 * 0.6 ** (2 * niter + 1) + 1e-6  # and float32
    options = {"r": R, "lora_alpha": ALPHA, "target_modules": ["0"], "init_lora_weights": f"pissa_niter_{niter}"}
    model = falling(base())
    add_adapter(model, LoRAConfig(**options))
    found = adapter(model).scaling * adapter(model).lora_B @ adapter(model).lora_A
    assert rel(found, best) < bound
    layer = peft.get_peft_model(falling(base()), peft.LoraConfig(**options)).base_model.model[0]
    expected = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert rel(expected, best) < bound
    if niter == 16:
        assert rel(found, expected) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_same_random_numbers_the_fast_svd_is_peft_s(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.tuners.lora.layer, "svd_lowrank", seeded(torch.svd_lowrank))
    Start("pissa_niter_2").check_trains_as_peft(kind)


def test_the_fast_svd_draws_its_own_random_numbers() -> None:
    torch.manual_seed(5)
    one = Start("pissa_niter_1").ours()
    torch.manual_seed(6)
    two = base()
    state = torch.get_rng_state()
    randomized_svd(two[0].weight, R, 1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    add_adapter(two, one[0].adapters["default"].config)
    assert torch.equal(adapter(one).lora_A, adapter(two).lora_A)


def test_an_nf4_base_stays_in_4_bits_and_starts_as_it_was() -> None:
    assert isinstance(PISSA.ours("nf4")[0].base_layer, NF4Linear)
    PISSA.check_starts_at_the_base("nf4")


def test_several_adapters_on_one_base_add_up() -> None:
    model, x = PISSA.ours(), torch.randn(7, IN)
    add_adapter(model, LoRAConfig(r=2, target_modules=["0"], init_lora_weights="olora"), "other")
    set_adapter(model, ["default", "other"])
    torch.testing.assert_close(model(x), base()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_what_it_cannot_start_is_refused(init: str) -> None:
    Start(init).check_takes_linear_layers_only()
    Start(init).check_refuses(base(), f"at most {OUT}", r=OUT + 1)
    Start(init).check_refuses(base(), "lora_alpha above 0", lora_alpha=0)
    damaged = base()
    with torch.no_grad():
        damaged[0].weight[1, 2] = torch.inf
    Start(init).check_refuses(damaged, "starts from the layer's weight, which has NaN or infinity")


def test_foreign_4_bit_weights_are_refused() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4").to("cpu"))
    with pytest.raises(InputError, match="0: init_lora_weights='pissa' its weight is not floating-point"):
        add_adapter(model, LoRAConfig(target_modules=["0"], init_lora_weights="pissa"))


@pytest.mark.parametrize("name", ["pissa_niter_", "pissa_niter_x", "pissa_4", "PISSA"])
def test_misspelled_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="is not one of"):
        LoRAConfig(init_lora_weights=name)
