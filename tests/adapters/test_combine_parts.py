"""Copies of modules and rows of embeddings, combined: the sum by hand, and PEFT's functions of the differences."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.adapters import FLOAT32, logits, tiny_llama
from helpers.peft import shake
from peft.utils import merge_utils
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import minilora as ml
from minilora.adapters.attach import adapters_named

WEIGHTS = [0.7, -0.4]
COPIED = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]}
LORA = {"target_modules": ["q_proj", "v_proj"]}


def with_adapters(base: nn.Module, *configs: dict[str, Any]) -> Any:
    model = copy.deepcopy(base)
    for seed, (name, config) in enumerate(zip(("a", "b"), configs, strict=False)):
        ml.add_adapter(model, ml.LoRAConfig(r=4, **config), name)
        shake(model, name, seed=seed)
    return model.eval()


@torch.no_grad()
def by_hand(base: nn.Module, model: nn.Module, method: str = "cat") -> Any:
    """The base model with W + Σ w (W′ − W) for each of its weights: what a merge of each adapter makes of it, mixed."""
    merged = []
    for name in ml.adapter_names(model):
        one = copy.deepcopy(model)
        ml.set_adapter(one, name)
        ml.unload(one, merge=True)
        merged.append(dict(one.named_parameters(remove_duplicate=False)))
    result = copy.deepcopy(base)
    if result.lm_head.weight is result.model.embed_tokens.weight:
        result.lm_head.weight = nn.Parameter(result.lm_head.weight.clone())
    for key, own in result.named_parameters():
        own += sum(w * (each[key] - own) for w, each in zip(WEIGHTS, merged, strict=True))
    return result


CASES: dict[str, list[dict[str, Any]]] = {
    "copies": [COPIED, COPIED],
    "a copy of one": [COPIED, LORA],
    "other copies": [COPIED, {**LORA, "modules_to_save": ["model.norm", "embed_tokens"]}],
    "rows": [{**LORA, "trainable_token_indices": [3, 9]}, {**LORA, "trainable_token_indices": [9, 3]}],
    "other rows": [{**LORA, "trainable_token_indices": [21, 9]}, {**LORA, "trainable_token_indices": [9, 14, 7]}],
    "rows of one": [LORA, {**LORA, "trainable_token_indices": [9, 14]}],
    "rows of the head": [
        {**LORA, "trainable_token_indices": {"embed_tokens": [9], "lm_head": [14, 9]}},
        {**LORA, "trainable_token_indices": {"embed_tokens": [9]}},
    ],
    "rows and copies": [{**LORA, "trainable_token_indices": {"embed_tokens": [9], "lm_head": [14]}}, {
        **LORA, "modules_to_save": ["model.norm"]
    }],
    "one copy for both": [
        {**LORA, "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        {**LORA, "modules_to_save": ["lm_head", "embed_tokens"]},
    ],
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", CASES)
def test_the_weighted_sum_of_the_differences_from_the_base(case: str, tied: bool, tmp_path: Path) -> None:
    if case == "one copy for both" and not tied:
        pytest.skip("nothing to tie")
    base = tiny_llama(tied=tied)
    model = with_adapters(base, *CASES[case])
    expected = logits(by_hand(base, model))
    for method in ("cat", "svd"):
        options = {"svd_rank": 8} if method == "svd" else {}
        ml.combine_adapters(model, ["a", "b"], WEIGHTS, method, method, **options)
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)  # an SVD's roundings more
    assert [name for name in ml.trainable_parameters(model) if ".svd." not in name] == []
    ml.save_adapter(model, tmp_path, "svd")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), **FLOAT32)
    again = copy.deepcopy(base)
    ml.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("method", ["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"])
@pytest.mark.parametrize("config", [COPIED, {**LORA, "trainable_token_indices": [3, 9, 11]}], ids=["copies", "rows"])
def test_every_method_does_to_the_differences_what_pefts_function_does(method: str, config: dict[str, Any]) -> None:
    base = tiny_llama()
    model = with_adapters(base, config, config)
    # DARE at a density below 1 drops others than there: the layers before have drawn random numbers
    options = {} if method == "linear" else {"density": 1.0 if "dare" in method else 0.5}
    ml.combine_adapters(model, ["a", "b"], WEIGHTS, "new", method, **options)
    function = merge_utils.task_arithmetic if method == "linear" else getattr(merge_utils, method)
    if "trainable_token_indices" in config:
        path, start = "model.embed_tokens", base.model.embed_tokens.weight[[3, 9, 11]]
        found = [adapters_named(model, name)[path].rows for name in ("a", "b", "new")]
    else:
        path, start = "lm_head", base.lm_head.weight
        found = [adapters_named(model, name)[path].module.weight for name in ("a", "b", "new")]
    differences = [(each - start).detach() for each in found]
    torch.testing.assert_close(differences[2], function(differences[:2], torch.tensor(WEIGHTS), **options), **FLOAT32)


def test_statistics_in_a_copy_are_combined_and_counts_are_the_base_s() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = copy.deepcopy(base)
    for name in ("a", "b"):
        ml.add_adapter(model, ml.LoRAConfig(target_modules=["0"], modules_to_save=["1"]), name)
        model(torch.randn(8, 4) + 3)
    ml.combine_adapters(model, ["a", "b"], [0.5, 0.5], "new", "linear")
    a, b, new = (adapters_named(model, name)["1"].module for name in ("a", "b", "new"))
    torch.testing.assert_close(new.running_mean, (a.running_mean + b.running_mean) / 2)
    assert new.num_batches_tracked == 0


def test_rows_of_t5_go_through_all_that_is_tied() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    base: Any = T5ForConditionalGeneration(config).eval()
    tokens = [{"target_modules": ["q"], "trainable_token_indices": each} for each in ([5, 6], [7, 6])]
    model = with_adapters(base, *tokens)
    ml.combine_adapters(model, ["a", "b"], WEIGHTS, "new", "cat")
    new = adapters_named(model, "new")
    assert new["encoder.embed_tokens"].rows is new["lm_head"].rows is new["shared"].rows
    own, (a, b) = base.shared.weight, (adapters_named(model, name)["shared"].rows for name in ("a", "b"))
    middle = own[6] + 0.7 * (a[1] - own[6]) - 0.4 * (b[1] - own[6])
    rows = torch.stack([own[5] + 0.7 * (a[0] - own[5]), middle, own[7] - 0.4 * (b[0] - own[7])])
    torch.testing.assert_close(new["shared"].rows, rows, **FLOAT32)


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([COPIED, {"target_modules": ["lm_head"]}], r"lm_head: .*'a' has a TrainedCopy, 'b' has a LoRA"),
        (
            [COPIED, {**LORA, "trainable_token_indices": {"lm_head": [3]}}],
            "lm_head: .*'a' has a TrainedCopy, 'b' has a TrainedRows",
        ),
        (
            [
                {**LORA, "trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}},
                {**LORA, "trainable_token_indices": {"embed_tokens": [4], "lm_head": [3]}},
            ],
            "lm_head: one of the adapters has rows of its own",
        ),
    ],
)
def test_what_has_no_sum_is_refused_by_name(configs: list[dict[str, Any]], message: str) -> None:
    model = with_adapters(tiny_llama(tied=True), *configs)
    before = logits(model)
    with pytest.raises(ml.InputError, match=message):
        ml.combine_adapters(model, ["a", "b"], WEIGHTS, "new", "cat")
    assert ml.adapter_names(model) == ["a", "b"] and torch.equal(logits(model), before)
