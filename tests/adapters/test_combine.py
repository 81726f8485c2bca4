"""Weighted combinations: PEFT's results for every method, and what the equations of the papers say."""

import copy
from typing import Any

import peft
import pytest
import torch
from helpers.adapters import ALL, logits, tiny_llama
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from minilora.adapters import merge
from minilora.adapters.attach import adapter_names, adapters_named, add_adapter, set_adapter
from minilora.adapters.combine import METHODS, combine_adapters
from minilora.adapters.for_training import adapter_parameters
from minilora.adapters.lora_config import LoRAConfig
from minilora.adapters.mixtures import drop_at_random, keep_largest, mean_of_majority
from minilora.errors import InputError
from minilora.formats.peft import load_adapter, save_adapter
from minilora.nf4.linear import NF4Linear
from minilora.variants.ia3 import IA3Config
from minilora.variants.loha import LoHaConfig

SAME_RANK: dict[str, dict[str, Any]] = {
    "fr": {"r": 4, "lora_alpha": 8, "target_modules": ALL},
    "de": {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj", "up_proj"]},
    "pl": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]},
}
OTHER_RANKS: dict[str, dict[str, Any]] = {
    "fr": {"r": 4, "lora_alpha": 8, "target_modules": ALL},
    "de": {"r": 2, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 6}},
    "pl": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]},
}
# Sums of up to three products of numbers near 1, in another order than PEFT's; an SVD adds a few roundings more.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}


def both(base: nn.Module, configs: dict[str, dict[str, Any]]) -> tuple[nn.Module, Any]:
    """minilora's and PEFT's model with the same random adapters."""
    ours, theirs = copy.deepcopy(base), None
    for seed, (name, config) in enumerate(configs.items()):
        if theirs is None:
            theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config), name)
        else:
            theirs.add_adapter(name, peft.LoraConfig(**config))
        add_adapter(ours, LoRAConfig(**config), name)
        generator = torch.Generator().manual_seed(seed)
        for path, adapter in adapters_named(ours, name).items():
            layer = theirs.get_submodule(f"base_model.model.{path}")
            for key, parameter in adapter.named_parameters():
                embedding = key.replace("lora_", "lora_embedding_")
                held = (
                    getattr(layer, key)[name].weight if name in getattr(layer, key) else getattr(layer, embedding)[name]
                )
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
                held.data.copy_(parameter.data)
    return ours.eval(), theirs.eval()


def updates(ours: nn.Module, theirs: Any, name: str) -> list[tuple[str, Tensor, Tensor]]:
    """(path, our ΔW, PEFT's ΔW) of every layer with the adapter."""
    found = []
    for path, adapter in adapters_named(ours, name).items():
        delta = theirs.get_submodule(f"base_model.model.{path}").get_delta_weight(name)
        found.append((path, adapter.kind.stored(adapter.delta().detach()), delta.detach()))
    return found


def assert_equal_updates(ours: nn.Module, theirs: Any, name: str = "new") -> None:
    compared = updates(ours, theirs, name)
    in_peft = [path for path, layer in theirs.named_modules() if name in getattr(layer, "r", {})]
    assert len(compared) == len(in_peft) > 0
    for path, a, b in compared:
        assert b.any() and torch.allclose(a, b, **FLOAT32), path


# --- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weights", [[0.7, 0.5, 1.2], [1.0, -0.4, 2.0]])
def test_every_method_gives_pefts_update(method: str, weights: list[float]) -> None:
    ours, theirs = both(tiny_llama(), SAME_RANK)
    options = {} if method in ("cat", "linear", "svd") else {"density": 0.6}
    torch.manual_seed(11)  # dare drops the same numbers: we too draw the start of the new adapter first
    combine_adapters(ours, list(SAME_RANK), weights, "new", method, **options)
    torch.manual_seed(11)
    theirs.base_model.add_weighted_adapter(list(SAME_RANK), weights, "new", combination_type=method, **options)
    assert_equal_updates(ours, theirs)
    theirs.base_model.set_adapter(["new"])
    assert torch.allclose(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4), "the new adapter is the active one"


@pytest.mark.parametrize("method", ["ties", "ties_svd", "dare_ties"])
def test_the_majority_by_frequency_is_pefts(method: str) -> None:
    results = []
    for majority in ("total", "frequency"):
        ours, theirs = both(tiny_llama(), SAME_RANK)
        options = {"density": 0.8, "majority_sign_method": majority}
        torch.manual_seed(3)
        combine_adapters(ours, list(SAME_RANK), [1, 1, 1], "new", method, **options)
        torch.manual_seed(3)
        theirs.base_model.add_weighted_adapter(list(SAME_RANK), [1, 1, 1], "new", method, **options)
        assert_equal_updates(ours, theirs)
        results.append(updates(ours, theirs, "new")[0][1])
    assert not torch.allclose(*results)


@pytest.mark.parametrize("method", ["cat", "svd", "magnitude_prune_svd"])
def test_other_ranks_and_scalings_are_combined_as_peft_does(method: str) -> None:
    ours, theirs = both(tiny_llama(), OTHER_RANKS)
    options = {"density": 0.5} if "prune" in method else {}
    combine_adapters(ours, list(OTHER_RANKS), [0.7, -0.5, 1.2], "new", method, **options)
    theirs.base_model.add_weighted_adapter(list(OTHER_RANKS), [0.7, -0.5, 1.2], "new", method, **options)
    assert_equal_updates(ours, theirs)


@pytest.mark.parametrize("options", [{"svd_rank": 2}, {"svd_rank": 7}, {"svd_rank": 13}, {"svd_clamp": 0.9}])
def test_rank_and_clamp_of_the_svd_are_pefts(options: dict[str, Any]) -> None:
    ours, theirs = both(tiny_llama(), OTHER_RANKS)
    combine_adapters(ours, list(OTHER_RANKS), [0.7, 0.5, 1.2], "new", "svd", **options)
    theirs.base_model.add_weighted_adapter(list(OTHER_RANKS), [0.7, 0.5, 1.2], "new", "svd", **options)
    assert_equal_updates(ours, theirs)


class Sees(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.conv = nn.Conv2d(1, 6, 3)
        self.pointwise = nn.Conv2d(6, 5, 1)


@pytest.mark.parametrize("method", ["cat", "svd", "linear", "ties", "ties_svd"])
def test_embeddings_convolutions_and_conv1d_equal_peft(method: str) -> None:
    torch.manual_seed(0)
    gpt2 = GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=11, n_positions=16, bos_token_id=1, eos_token_id=1)
    configs = {"fr": {"r": 4, "lora_alpha": 8}, "de": {"r": 4, "lora_alpha": 2}}
    cases = [(Sees(), ["tokens", "conv", "pointwise"]), (GPT2LMHeadModel(gpt2), ["wte", "c_attn", "c_fc"])]
    for base, targets in cases:
        ours, theirs = both(base, {name: config | {"target_modules": targets} for name, config in configs.items()})
        options = {"density": 0.7} if "ties" in method else {}
        combine_adapters(ours, ["fr", "de"], [0.7, -0.5], "new", method, **options)
        theirs.base_model.add_weighted_adapter(["fr", "de"], [0.7, -0.5], "new", method, **options)
        assert_equal_updates(ours, theirs)


def test_with_rslora_the_sum_is_right_where_pefts_is_root_r_times_too_large() -> None:
    rslora = {name: config | {"use_rslora": True} for name, config in SAME_RANK.items()}
    ours, theirs = both(tiny_llama(), rslora)
    expected = weighted_updates(ours, {"fr": 0.7, "de": -0.5})
    combine_adapters(ours, ["fr", "de"], [0.7, -0.5], "new", "cat")
    theirs.base_model.add_weighted_adapter(["fr", "de"], [0.7, -0.5], "new", "cat")
    for path, a, b in updates(ours, theirs, "new"):
        assert torch.allclose(a, expected[path], **FLOAT32), path
        assert torch.allclose(b, 8**0.5 * expected[path], **FLOAT32), path  # its rank is 4 + 4 on every layer


@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
def test_peft_loads_what_was_combined(method: str, tmp_path: Any) -> None:
    ours, _ = both(tiny_llama(), SAME_RANK if method == "linear" else OTHER_RANKS)
    combine_adapters(ours, ["fr", "de", "pl"], [0.7, -0.5, 1.2], "new", method)
    save_adapter(ours, tmp_path, "new")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    again = tiny_llama()
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(ours))
    assert torch.allclose(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)  # the project's bound for PEFT
    if method == "cat":
        assert {adapter.r for adapter in adapters_named(ours, "new").values()} == {4, 4 + 2 + 3, 4 + 6, 4 + 3}


# --- the equations ---------------------------------------------------------------------------------------------------


def weighted_updates(model: nn.Module, weights: dict[str, float]) -> dict[str, Tensor]:
    """Σ wᵢΔWᵢ by path."""
    total: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for path, adapter in adapters_named(model, name).items():
            total[path] = total.get(path, 0) + weight * adapter.delta().detach()
    return total


@pytest.mark.parametrize("weights", [{"fr": 0.7, "de": 0.5}, {"fr": 1.0, "pl": -1.0, "de": 0.3}, {"de": -2.0}])
def test_cat_and_svd_of_full_rank_are_the_weighted_sum(weights: dict[str, float]) -> None:
    for method, options in (("cat", {}), ("svd", {"svd_rank": 13}), ("svd", {"svd_rank": 99})):
        ours, _ = both(tiny_llama(), OTHER_RANKS)
        expected = weighted_updates(ours, weights)
        combine_adapters(ours, list(weights), list(weights.values()), "new", method, **options)
        for path, adapter in adapters_named(ours, "new").items():
            assert torch.allclose(adapter.delta(), expected[path], **FLOAT32), (method, path)
            assert adapter.scaling == 1
            assert adapter.r <= min(adapter.kind.shape)


def test_svd_is_the_nearest_of_its_rank() -> None:
    ours, _ = both(tiny_llama(), OTHER_RANKS)
    weights = {"fr": 0.7, "de": 0.5, "pl": -1.2}
    expected = weighted_updates(ours, weights)
    combine_adapters(ours, list(weights), list(weights.values()), "new", "svd", svd_rank=3)
    for path, adapter in adapters_named(ours, "new").items():
        missed = torch.linalg.matrix_norm((adapter.delta() - expected[path]).double())
        rest = torch.linalg.svdvals(expected[path].double())[3:].norm()  # Eckart and Young: the smallest possible
        assert torch.isclose(missed, rest, rtol=1e-4, atol=1e-4), path


def test_negation_takes_an_adapter_back() -> None:
    for method in ("linear", "cat", "svd"):
        ours, _ = both(tiny_llama(), SAME_RANK)
        combine_adapters(ours, ["fr"], [-1.0], "taken", method)
        set_adapter(ours, ["fr", "taken"])
        assert torch.allclose(logits(ours), logits(tiny_llama()), rtol=1e-4, atol=1e-4)


def test_linear_is_the_sum_of_factors_and_has_cross_terms() -> None:
    ours, _ = both(tiny_llama(), SAME_RANK)
    combine_adapters(ours, ["fr", "pl"], [0.5, -2.0], "new", "linear")
    path = "model.layers.0.mlp.down_proj"
    fr, pl, new = (adapters_named(ours, name)[path] for name in ("fr", "pl", "new"))
    a, b = (0.5 * fr.scaling) ** 0.5, (2.0 * pl.scaling) ** 0.5
    product = (a * fr.lora_B + b * pl.lora_B) @ (a * fr.lora_A - b * pl.lora_A)
    assert torch.allclose(new.delta(), product, **FLOAT32)
    assert not torch.allclose(new.delta(), weighted_updates(ours, {"fr": 0.5, "pl": -2.0})[path], **FLOAT32)


def test_keep_largest_keeps_the_share_that_is_largest() -> None:
    x = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    kept = keep_largest(x, 0.4)
    assert int((kept != 0).sum()) == 30  # of 77
    assert torch.equal(kept[kept != 0], x[kept != 0])
    assert x[kept == 0].abs().max() < x[kept != 0].abs().min()


def test_drop_at_random_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    x = torch.linspace(-2, 2, 9)
    drawn = torch.stack([drop_at_random(x, 0.3) for _ in range(4000)])
    assert set((drawn / x)[:, x != 0].unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.3)}
    # The mean of n draws of m/p has the standard deviation √((1 − p)/(p n)) ≈ 0.024; five of them.
    assert ((drawn.mean(0) - x).abs() <= 5 * (0.7 / 0.3 / 4000) ** 0.5 * x.abs()).all()


@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_mean_of_majority_number_by_number(majority: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(5, 6, generator=generator).round(decimals=1) for _ in range(3)]  # with zeros among them
    weights = [0.5, -1.0, 2.0]
    y = mean_of_majority(tensors, weights, majority)
    for i in range(5):
        for j in range(6):
            values = [float(x[i, j]) for x in tensors]
            votes = values if majority == "total" else [(v > 0) - (v < 0) for v in values]
            positive = float(torch.tensor(votes, dtype=torch.float32).sum()) >= 0
            agreeing = [w * v for w, v in zip(weights, values, strict=True) if v != 0 and (v > 0) == positive]
            expected = sum(agreeing) / max(len(agreeing), 1)
            assert float(y[i, j]) == pytest.approx(expected, abs=1e-6)


# --- other variants --------------------------------------------------------------------------------------------------


def test_adapters_that_start_elsewhere_are_combined_by_what_they_change() -> None:
    ours, _ = both(tiny_llama(), OTHER_RANKS)
    for adapter in adapters_named(ours, "fr").values():
        A, B = adapter.lora_A.data.clone(), adapter.lora_B.data.clone()
        adapter.start_from(torch.randn_like(A), torch.randn_like(B))
        adapter.lora_A.data, adapter.lora_B.data = A, B
    expected = weighted_updates(ours, {"fr": 0.5, "de": -1.0})
    for method in ("cat", "svd"):
        combine_adapters(
            ours, ["fr", "de"], [0.5, -1.0], method, method, **({"svd_rank": 14} if method == "svd" else {})
        )
        for path, adapter in adapters_named(ours, method).items():
            assert torch.allclose(adapter.delta(), expected[path], **FLOAT32), (method, path)
    with pytest.raises(InputError, match=r"q_proj: 'fr'.*BA − B₀A₀.*'cat' or 'svd'"):
        combine_adapters(ours, ["fr"], [0.5], "new", "linear")


@pytest.mark.parametrize("quantized", [False, True])
def test_dora_is_combined_by_what_it_makes_of_the_weight(quantized: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 16)
    model = nn.Sequential(NF4Linear.from_linear(linear) if quantized else linear)
    add_adapter(model, LoRAConfig(r=4, target_modules=["0"], use_dora=True), "dora")
    add_adapter(model, LoRAConfig(r=2, target_modules=["0"]), "lora")
    for name in ("dora", "lora"):
        for parameter in adapter_parameters(model, name).values():
            nn.init.normal_(parameter, std=0.3)
    x = torch.randn(5, 12)
    changes = []
    with torch.no_grad():
        for name in ("dora", "lora"):
            set_adapter(model, name)
            changes.append(model(x) - model[0].base_layer(x))
        combine_adapters(model, ["dora", "lora"], [0.5, -1.0], "new", "svd", svd_rank=12)
        assert torch.allclose(model(x) - model[0].base_layer(x), 0.5 * changes[0] - changes[1], **FLOAT32)
    with pytest.raises(InputError, match=r"0: 'dora' \(DoRA\) has no rank of its own: give svd_rank"):
        combine_adapters(model, ["dora", "lora"], [0.5, -1.0], "other", "svd")
    for method in ("cat", "linear"):
        with pytest.raises(InputError, match=r"'dora' \(DoRA\) has no factors B and A"):
            combine_adapters(model, ["lora", "dora"], [0.5, -1.0], "other", method)


def test_any_additive_variant_goes_through_its_update() -> None:
    model = tiny_llama()
    add_adapter(model, LoHaConfig(r=3, target_modules=["q_proj", "v_proj"]), "loha")
    for parameter in adapter_parameters(model, "loha").values():
        nn.init.normal_(parameter, std=0.5)
    expected = weighted_updates(model, {"loha": 0.7})
    combine_adapters(model, ["loha"], [0.7], "new", "svd", svd_rank=9)  # a product of two of rank 3 has rank 9
    for path, adapter in adapters_named(model, "new").items():
        assert torch.allclose(adapter.delta(), expected[path], **FLOAT32), path


def test_what_is_no_change_of_a_weight_is_refused() -> None:
    biased = nn.Sequential(nn.Linear(8, 8))
    add_adapter(biased, IA3Config(target_modules=["0"], feedforward_modules=[]), "ia3")
    with pytest.raises(InputError, match=r"0: 'ia3' \(IA3\) changes the bias too"):
        combine_adapters(biased, ["ia3"], [1.0], "new", "svd", svd_rank=2)
    model = nn.Sequential(nn.Linear(8, 8))
    add_adapter(model, LoRAConfig(target_modules=["0"], bias="lora_only"), "fr")
    with pytest.raises(InputError, match=r"'fr' trains more than updates of weights.*\['bias'\]"):
        combine_adapters(model, ["fr"], [1.0], "new", "svd")


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "slerp"}, "'slerp' is not one of cat, svd, linear"),
        ({"names": ["fr"]}, "a weight for each adapter, not 2 for 1"),
        ({"names": [], "weights": []}, "a weight for each adapter"),
        ({"names": ["fr", "it"]}, "no adapter named 'it'"),
        ({"new_name": "de"}, "already has an adapter named 'de'"),
        (
            {"method": "linear"},
            r"layers\.0\.self_attn\.q_proj: 'de' \(LoRA\) has another rank than 'fr'.*'cat' or 'svd'",
        ),
        ({"method": "ties"}, "needs density"),
        ({"method": "dare_linear_svd", "density": 0.0}, r"in \(0, 1\], not 0.0"),
        ({"method": "magnitude_prune", "density": 1.5}, "not 1.5"),
        ({"method": "cat", "density": 0.5}, "leave density=0.5 out"),
        ({"method": "svd", "density": 0.5}, "leave density=0.5 out"),
        ({"method": "cat", "svd_rank": 4}, "makes no SVD: leave svd_rank=4 out"),
        ({"svd_rank": 0}, "whole number of at least 1, not 0"),
        ({"svd_clamp": 2.0}, "a quantile, above 0 and at most 1, not 2.0"),
        ({"method": "ties", "density": 0.5, "majority_sign_method": "mean"}, "'mean' is not 'total' or 'frequency'"),
    ],
)
def test_what_cannot_be_is_explained_and_leaves_the_model_alone(arguments: dict[str, Any], message: str) -> None:
    model, _ = both(tiny_llama(), OTHER_RANKS)
    set_adapter(model, ["fr", "pl"])
    before, structure = logits(model), [type(module) for module in model.modules()]
    with pytest.raises(InputError, match=message):
        combine_adapters(model, **({"names": ["fr", "de"], "weights": [1.0, 0.5], "new_name": "new"} | arguments))
    assert torch.equal(logits(model), before)
    assert [type(module) for module in model.modules()] == structure


def test_a_merged_model_is_refused() -> None:
    model, _ = both(tiny_llama(), SAME_RANK)
    merge(model)
    with pytest.raises(InputError, match=r"unmerge\(model\) first"):
        combine_adapters(model, ["fr", "de"], [1.0, 0.5], "new")
    assert adapter_names(model) == ["de", "fr", "pl"]


def test_a_convolution_with_groups_is_combined_factor_by_factor_only() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    for name in ("fr", "de"):
        add_adapter(model, LoRAConfig(r=2, target_modules=["0"]), name)
    for method in ("cat", "svd"):
        with pytest.raises(InputError, match="convolution with groups: combine it by linear"):
            combine_adapters(model, ["fr", "de"], [1.0, 0.5], "new", method)
    combine_adapters(model, ["fr", "de"], [1.0, 0.5], "new", "linear")
    assert adapter_names(model) == ["de", "fr", "new"]
