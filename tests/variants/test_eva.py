"""EVA: PEFT's ranks, scalings and A on a tiny model; plain modules, NF4, masks, and what stops it."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.adapters import ALL, logits, peft_parameters, randomize, tiny_llama
from helpers.start import Start, refused
from helpers.training import tiny_base
from peft import EvaConfig, initialize_lora_eva_weights
from torch import Tensor, nn

from minilora.adapters import merge
from minilora.adapters.attach import adapter_names, adapters_named, add_adapter, set_adapter
from minilora.adapters.for_training import adapter_parameters, trainable_parameters
from minilora.adapters.lora_config import LoRAConfig
from minilora.adapters.targets import adapted_layers
from minilora.data.batches import Batch
from minilora.errors import InputError
from minilora.formats.peft import load_adapter, save_adapter
from minilora.training.loss import language_model_loss
from minilora.variants import eva

pytestmark = pytest.mark.filterwarnings("ignore:lora with eva initialization used")  # PEFT's

APART = ["o_proj", "down_proj"]  # layers whose inputs no other layer has


def batches(n: int = 3, labels: bool = True) -> list[dict[str, Tensor]]:
    """Random tokens, one row of each batch padded, a few tokens of each row without a label."""
    random = torch.Generator().manual_seed(0)
    found = []
    for _ in range(n):
        ids = torch.randint(0, 64, (4, 20), generator=random)
        mask = torch.ones_like(ids)
        mask[0, 15:] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        found.append(
            batch | {"labels": ids.masked_fill(mask == 0, -100).index_fill(1, torch.arange(5), -100)}
            if labels
            else batch
        )
    return found


def ours(model: nn.Module | None = None, targets: Any = ALL, **config: Any) -> nn.Module:
    model = tiny_llama() if model is None else model
    add_adapter(
        model, LoRAConfig(**({"r": 4, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": "eva"} | config))
    )
    return model


def theirs(options: dict[str, Any], targets: Any = ALL, **config: Any) -> peft.PeftModel:
    config = {"r": 4, "lora_alpha": 6, "target_modules": targets, "task_type": "CAUSAL_LM"} | config
    config |= {"init_lora_weights": "eva", "eva_config": EvaConfig(**options)}
    return peft.get_peft_model(tiny_llama(), peft.LoraConfig(**config)).eval()


def config_of(model: nn.Module) -> LoRAConfig:
    return next(iter(adapters_named(model, "default").values())).config


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({}, {}),
        ({"rho": 1.0}, {"use_rslora": True}),
        ({"rho": 3.0, "tau": 0.9, "adjust_scaling_factors": False}, {}),
        ({"use_label_mask": False}, {"use_dora": True}),
        ({"whiten": True}, {"target_modules": APART}),  # PEFT whitens what layers with one input share once for each
        ({}, {"rank_pattern": {"down_proj": 2, "k_proj": 6}, "alpha_pattern": {"o_proj": 9}}),
    ],
)
def test_ranks_scalings_and_a_equal_peft(options: dict[str, Any], config: dict[str, Any]) -> None:
    model, expected = ours(eva_config=options, **config), theirs(options, **config)
    eva.initialize(model, batches(), forward=language_model_loss)
    initialize_lora_eva_weights(expected, batches(), show_progress_bar=False)
    wanted = expected.peft_config["default"]
    assert config_of(model).rank_pattern == wanted.rank_pattern
    assert config_of(model).alpha_pattern == wanted.alpha_pattern
    scalings = {path: adapter.scaling for path, adapter in adapters_named(model, "default").items()}
    assert scalings == {
        path.removeprefix("base_model.model."): module.scaling["default"]
        for path, module in expected.named_modules()
        if hasattr(module, "lora_A")
    }
    parameters, wanted_parameters = adapter_parameters(model), peft_parameters(expected)
    for key, value in wanted_parameters.items():
        # Float32 activations of two blocks, seen through components whose singular values are near one another
        torch.testing.assert_close(parameters[key], value, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits(model), logits(tiny_llama()), rtol=1e-5, atol=1e-5)
    assert list(trainable_parameters(model)) == [key for key, _ in model.named_parameters() if ".adapters." in key]


def mean_output(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).mean()


def isotropic(features: int, n: int = 8) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(64, features, generator=random) for _ in range(n)]


def ranks(model: nn.Module) -> dict[str, int]:
    return {path: adapter.r for path, adapter in adapters_named(model, "default").items()}


def test_the_budget_goes_where_the_inputs_vary() -> None:
    """The second layer's inputs have one direction: one component is all that it can use."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[0].weight.data[1:], model[0].bias.data[:] = 0, 0
    ours(model, ["0", "1"], r=4, lora_alpha=4, task_type=None)
    eva.initialize(model, isotropic(16), forward=mean_output)
    assert ranks(model) == {"0": 7, "1": 1}
    torch.testing.assert_close(model[1].adapters["default"].lora_A.abs(), torch.eye(16)[:1])
    A = model[0].adapters["default"].lora_A
    torch.testing.assert_close(A @ A.T, torch.eye(7))
    assert model[0].adapters["default"].scaling == 1  # lora_alpha goes with the rank


def test_a_layer_of_rank_0_is_plain_again(tmp_path: Path) -> None:
    """Of 16 equal directions each explains less than each of 4."""
    model = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 8))
    model[0].weight.data[:] = torch.linalg.qr(model[0].weight.data.T).Q.T
    plain = copy.deepcopy(model)
    ours(model, ["0", "1"], r=2, task_type=None)
    eva.initialize(model, isotropic(16), forward=mean_output)
    assert ranks(model) == {"1": 4}
    assert type(model[0]) is nn.Linear
    nn.init.normal_(adapter_parameters(model)["1.lora_B"])
    save_adapter(model, tmp_path)
    x = torch.randn(3, 16)
    twin = copy.deepcopy(plain)
    load_adapter(twin, tmp_path)
    assert torch.equal(twin(x), model(x))
    expected = peft.PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(expected(x), model(x))


def test_folders_go_both_ways(tmp_path: Path) -> None:
    model, expected = ours(), theirs({})
    eva.initialize(model, batches(), forward=language_model_loss)
    initialize_lora_eva_weights(expected, batches(), show_progress_bar=False)
    for each in (model, expected):
        randomize(each)
    save_adapter(model, tmp_path / "ours")
    expected.save_pretrained(tmp_path / "theirs")
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    again = tiny_llama()
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(logits(again), logits(expected), rtol=1e-5, atol=1e-5)


def test_minilora_s_own_model_in_4_bits_and_all_forms_of_a_batch() -> None:
    """Token ids, the same as a mapping, and as a Batch of `collate` are one thing."""
    ids = torch.randint(3, 64, (3, 4, 20), generator=torch.Generator().manual_seed(0))
    found = []
    for data in (
        list(ids),
        [{"input_ids": each} for each in ids],
        iter(ids),
        [Batch(i, i, torch.ones_like(i))._asdict() for i in ids],
    ):
        model = ours(tiny_base(nf4=True), "all-linear")
        eva.initialize(model, data, forward=language_model_loss)
        found.append(adapter_parameters(model))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(other[key], value) for key, value in found[0].items())
    assert sum(len(p) for key, p in found[0].items() if key.endswith("lora_A")) == 4 * 14


def test_padding_and_tokens_without_a_label_are_not_looked_at() -> None:
    model, other = ours(), ours()
    data = batches()
    eva.initialize(model, data, forward=language_model_loss)
    for batch in data:  # another token where nothing is looked at: the last of a padded row
        batch["input_ids"][0, 15:] = 1
    eva.initialize(other, data, forward=language_model_loss)
    for key, value in adapter_parameters(model).items():
        torch.testing.assert_close(adapter_parameters(other)[key], value, rtol=1e-3, atol=1e-4)  # as against PEFT


def test_what_else_the_adapter_trains_stays_with_it() -> None:
    alone, model = ours(), ours(modules_to_save=["lm_head"], bias="all")
    parts = [key for key in adapter_parameters(model) if "lora_" not in key]
    assert any("lm_head" in key for key in parts)
    for each in (alone, model):
        eva.initialize(each, batches(), forward=language_model_loss)
    assert [key for key in adapter_parameters(model) if "lora_" not in key] == parts
    for key, value in adapter_parameters(alone).items():
        assert torch.equal(adapter_parameters(model)[key], value)


def test_other_adapters_and_the_mode_are_let_be() -> None:
    alone = ours()
    eva.initialize(alone, batches(), forward=language_model_loss)
    model = tiny_llama().train()
    add_adapter(model, LoRAConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False), "first")
    before = {key: value.clone() for key, value in adapter_parameters(model, "first").items()}
    ours(model)
    set_adapter(model, ["first"])
    eva.initialize(model, batches(), forward=language_model_loss)
    assert model.training
    assert adapter_names(model) == ["default", "first"]
    for key, value in before.items():
        assert torch.equal(adapter_parameters(model, "first")[key], value)
    for key, value in adapter_parameters(alone).items():
        assert torch.equal(adapter_parameters(model)[key], value)
    assert not any("default" in key for key in trainable_parameters(model)), "inactive, as it was"
    assert not any(layer._forward_pre_hooks for layer in adapted_layers(model).values())


def test_where_it_cannot_be_is_refused() -> None:
    Start("eva").check_takes_linear_layers_only()


@pytest.mark.parametrize(
    ("config", "data", "options", "message"),
    [
        ({}, [], {}, "no batches"),
        ({}, [torch.zeros(1, 3)], {}, "token ids .*or a mapping with input_ids"),
        ({}, [torch.zeros(1, 3, dtype=torch.int64)], {}, "q_proj: no batch gives it r·rho = 8 tokens"),
        ({"eva_config": {"rho": 9}}, batches(), {}, r"q_proj has 32 inputs, too few for r·rho = 36"),
        ({"eva_config": {"tau": 1.0}}, batches(1), {}, "have not settled in 2 passes over 1 batches.*tau"),
        ({"init_lora_weights": True}, batches(), {}, 'init_lora_weights=True, not "eva"'),
        ({}, batches(), {"name": "other"}, "no adapter named 'other'"),
    ],
)
def test_what_stops_it_is_named_and_leaves_the_model_alone(
    config: Any, data: Any, options: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eva, "MOST_PASSES", 2)
    model = ours(**config)
    with refused(model, message):
        eva.initialize(model, data, **options, forward=language_model_loss)


def test_a_merged_model_is_refused() -> None:
    model = ours()
    merge(model)
    with pytest.raises(InputError, match="unmerge"):
        eva.initialize(model, batches(), forward=language_model_loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 0.5}, "rho must be at least 1"),
        ({"rho": "two"}, "a value in {'rho': 'two'} is of another type"),
        ({"tau": 2}, "tau must be from 0 to 1"),
        ({"r": 1}, "keys among rho"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"LoRAConfig: eva_config.*{message}"):
        LoRAConfig(init_lora_weights="eva", eva_config=options)


def test_defaults_are_those_of_peft() -> None:
    assert LoRAConfig(init_lora_weights="eva").eva_config == vars(EvaConfig())
