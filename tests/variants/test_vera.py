"""VeRA against PEFT: the shared pair of matrices above all."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.adapters import tiny_llama
from helpers.methods import Method, assert_near, assert_same, output, parameters, randomize, train_steps
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from minilora.adapters.attach import adapters_named, add_adapter
from minilora.errors import InputError
from minilora.formats.peft import load_adapter, save_adapter
from minilora.nf4.linear import NF4Linear
from minilora.variants.vera import VeRAConfig

TARGETS = ["q_proj", "v_proj", "down_proj", "up_proj"]  # (32, 32), (16, 32), (32, 48) and (48, 32)
pytestmark = pytest.mark.filterwarnings("ignore:Specified to not")  # PEFT, of save_projection=False
VERA = Method(VeRAConfig, peft.VeraConfig)


@pytest.mark.parametrize(
    "values", [{"r": 8}, {"r": 5, "d_initial": 0.3, "projection_prng_key": 7}, {"r": 8, "init_weights": False}]
)
def test_equals_peft_on_a_llama(values: dict[str, Any]) -> None:
    VERA.check_equals_peft(scale=1.0, target_modules=TARGETS, **values)


def test_equals_peft_on_transformers_conv1d() -> None:
    torch.manual_seed(0)
    VERA.check_equals_peft(nn.Sequential(Conv1D(16, 12)), torch.randn(3, 12), scale=1, target_modules=["0"], r=4)


def test_the_pair_is_that_of_peft_shared_by_all_layers_and_not_trained() -> None:
    ours, theirs = VERA.both(target_modules=TARGETS, r=8, projection_prng_key=3)
    adapters = list(adapters_named(ours, "default").values())
    assert torch.equal(adapters[0].shared.A, theirs.base_model.vera_A["default"])
    assert torch.equal(adapters[0].shared.B, theirs.base_model.vera_B["default"])
    assert len({id(adapter.shared) for adapter in adapters}) == 1
    for model in (ours, copy.deepcopy(ours), copy.deepcopy(ours).double()):  # in whatever way it is moved or copied
        shared = {adapter.shared.A.data_ptr() for adapter in adapters_named(model, "default").values()}
        assert len(shared) == 1
    assert {name.rpartition(".")[2] for name in parameters(ours)} == {"vera_lambda_b", "vera_lambda_d"}


def test_dropout_draws_the_same_masks_as_peft() -> None:
    VERA.check_drops_as_peft(nn.Linear(12, 16), torch.randn(20, 12), r=4, vera_dropout=0.4)


def test_over_nf4() -> None:
    torch.manual_seed(0)
    VERA.check_adds_delta(NF4Linear.from_linear(nn.Linear(64, 16)), scale=1.0, r=8)


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": TARGETS},
        {"target_modules": TARGETS, "save_projection": False, "projection_prng_key": 5},
        {"target_modules": "all-linear"},
    ],
)
@pytest.mark.filterwarnings("error:Unexpected keyword")  # PEFT does not know a key in adapter_config.json
def test_folders_go_both_ways(values: dict[str, Any], tmp_path: Path) -> None:
    VERA.check_folders_both_ways(tmp_path, scale=1.0, r=8, task_type="CAUSAL_LM", **values)
    keys = load_file(tmp_path / "ours" / "adapter_model.safetensors").keys()
    assert ("base_model.vera_A" in keys) == values.get("save_projection", True)


@pytest.mark.parametrize("bias", ["vera_only", "all"])
def test_biases_train_and_go_both_ways(bias: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 8))
    values = {"r": 4, "target_modules": ["0"], "bias": bias, "task_type": None}
    x = torch.randn(5, 8)
    ours, theirs = VERA.both(base, **values)
    assert len(parameters(ours)) == (3 if bias == "vera_only" else 5)
    assert_near(torch.tensor(train_steps(ours, 10, x)), torch.tensor(train_steps(theirs, 10, x)))
    assert_same(parameters(ours), parameters(theirs), rtol=1e-4, atol=1e-5)  # 10 steps of AdamW in float32
    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert_near(loaded(x), ours(x))
    load_adapter(again := copy.deepcopy(base), tmp_path / "theirs")
    assert_near(again(x), theirs(x))


def test_excluded_layers_which_peft_has_no_word_for_are_left_out_of_the_targets(tmp_path: Path) -> None:
    ours = tiny_llama()
    add_adapter(
        ours, VeRAConfig(r=8, target_modules=["q_proj", "v_proj"], exclude_modules=["layers.0.self_attn.v_proj"])
    )
    randomize(ours, scale=1.0)
    save_adapter(ours, tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "exclude_modules" not in saved and len(saved["target_modules"]) == 3
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert_near(output(theirs.eval()), output(ours))
    load_adapter(again := tiny_llama(), tmp_path)
    assert_near(output(again), output(ours))


def test_a_pair_in_the_file_is_the_one_that_counts(tmp_path: Path) -> None:
    """As drawn on another system, say: not what the key gives here."""
    ours = tiny_llama()
    add_adapter(ours, VeRAConfig(r=8, target_modules=["v_proj"]))
    randomize(ours, scale=1.0)
    next(iter(adapters_named(ours, "default").values())).shared.A.mul_(2)
    save_adapter(ours, tmp_path)
    load_adapter(again := tiny_llama(), tmp_path)
    assert_near(output(again), output(ours))
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert_near(output(theirs.eval()), output(ours))


def test_a_file_without_the_promised_pair_is_refused(tmp_path: Path) -> None:
    ours = tiny_llama()
    add_adapter(ours, VeRAConfig(r=8, target_modules=["v_proj"], save_projection=False))
    save_adapter(ours, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"save_projection": false', '"save_projection": true'))
    with pytest.raises(InputError, match=r"lacks base_model\.vera_A, base_model\.vera_B"):
        load_adapter(tiny_llama(), tmp_path)


def test_bad_configurations_and_layers_are_refused() -> None:
    for values, message in (({"r": 0}, "not 0"), ({"vera_dropout": 1.0}, "vera_dropout"), ({"bias": "b"}, "bias='b'")):
        with pytest.raises(InputError, match=message):
            VeRAConfig(**values)
    model = tiny_llama()
    with pytest.raises(InputError, match="embed_tokens is a Embedding: VeRA adapts linear layers only"):
        add_adapter(model, VeRAConfig(target_modules=["q_proj", "embed_tokens"]))


def test_names_and_defaults_are_those_of_peft() -> None:
    VERA.check_names_and_defaults()
