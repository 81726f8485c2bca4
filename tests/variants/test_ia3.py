"""(IA)³ against PEFT."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.adapters import tiny_llama
from helpers.methods import Method, assert_near, output, randomize
from torch import nn
from transformers.pytorch_utils import Conv1D

from minilora.adapters import merge
from minilora.adapters.attach import add_adapter, set_adapter
from minilora.adapters.lora_config import LoRAConfig
from minilora.errors import InputError
from minilora.formats.peft import load_adapter, save_adapter
from minilora.nf4.linear import NF4Linear
from minilora.variants.ia3 import IA3Config

TARGETS = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
IA3 = Method(IA3Config, peft.IA3Config)


def test_equals_peft_on_a_llama() -> None:
    IA3.check_equals_peft(**TARGETS)
    IA3.check_equals_peft(target_modules=r".*\.[ud].*_proj", feedforward_modules=r".*down_proj")
    IA3.check_equals_peft(**TARGETS, init_ia3_weights=False)


@pytest.mark.parametrize("feedforward", [["0"], []])
def test_equals_peft_on_each_kind_of_layer(feedforward: list[str]) -> None:
    torch.manual_seed(0)
    for layer, x in [
        (nn.Linear(12, 16), torch.randn(3, 5, 12)),
        (Conv1D(16, 12), torch.randn(3, 5, 12)),
        (nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 5, 5)),
        (nn.Conv3d(4, 6, (1, 2, 3), stride=2), torch.randn(2, 4, 5, 5, 5)),
    ]:
        nn.init.normal_(layer.bias)  # Conv1D's is zero
        values = {"target_modules": ["0"], "feedforward_modules": feedforward}
        IA3.check_equals_peft(nn.Sequential(layer), x, **values)


@pytest.mark.parametrize("feedforward", [["0"], []])
def test_equals_peft_over_the_weight_that_nf4_stands_for(feedforward: list[str]) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(64, 16)
    quantized = NF4Linear.from_linear(dense)
    dense.weight.data = quantized.dequantize(torch.float32)
    ours, theirs = IA3.both(nn.Sequential(dense), target_modules=["0"], feedforward_modules=feedforward)
    ours = nn.Sequential(quantized)
    add_adapter(ours, IA3Config(target_modules=["0"], feedforward_modules=feedforward))
    randomize(ours, theirs)
    x = torch.randn(5, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    before = ours(x)
    merge(ours)
    torch.testing.assert_close(ours(x), before, rtol=1e-5, atol=1e-5)  # roundings in sums over 64 terms


@pytest.mark.parametrize(
    "values",
    [
        TARGETS,
        {"target_modules": "all-linear", "feedforward_modules": ["down_proj"]},
        {"target_modules": "all-linear", "feedforward_modules": ["mlp.down_proj"]},
        {"target_modules": ["v_proj"], "feedforward_modules": []},
    ],
)
@pytest.mark.filterwarnings("error:Unexpected keyword")  # PEFT does not know a key in adapter_config.json
def test_folders_go_both_ways(values: dict[str, Any], tmp_path: Path) -> None:
    IA3.check_folders_both_ways(tmp_path, **values, task_type="CAUSAL_LM")


def test_several_adapters_scale_one_after_the_other() -> None:
    """PEFT multiplies the factors of several adapters even where one is of inputs: minilora applies each as it is."""
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 6), torch.randn(5, 8)
    model = nn.Sequential(layer)
    for name, feedforward in (("outputs", []), ("inputs", ["0"])):
        add_adapter(model, IA3Config(target_modules=["0"], feedforward_modules=feedforward), name)
        model[0].adapters[name].ia3_l.data.uniform_(0.5, 2)
    set_adapter(model, ["outputs", "inputs"])
    l_out, l_in = (model[0].adapters[name].ia3_l.flatten() for name in ("outputs", "inputs"))
    expected = l_out * layer(l_in * x)
    torch.testing.assert_close(model(x), expected)
    merge(model)
    torch.testing.assert_close(model(x), expected)


def test_layers_chosen_in_words_that_peft_lacks_are_saved_by_their_paths(tmp_path: Path) -> None:
    ours = tiny_llama()
    add_adapter(ours, IA3Config(**TARGETS, layers_to_transform=[1]))
    randomize(ours)
    save_adapter(ours, tmp_path)
    for theirs in (peft.PeftModel.from_pretrained(tiny_llama(), tmp_path), tiny_llama()):
        if not isinstance(theirs, peft.PeftModel):
            load_adapter(theirs, tmp_path)
        assert_near(output(theirs.eval()), output(ours))


@pytest.mark.parametrize("feedforward", [["0"], []])
def test_beside_a_lora_before_or_after_it(feedforward: list[str]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(5, 8)
    add_adapter(model, LoRAConfig(target_modules=["0"], init_lora_weights=False), "lora")
    add_adapter(model, IA3Config(target_modules=["0"], feedforward_modules=feedforward, init_ia3_weights=False), "ia3")
    lora, ia3 = (model[0].adapters[name] for name in ("lora", "ia3"))
    W, b, dW = model[0].base_layer.weight, model[0].base_layer.bias, lora.delta()
    for order, W_, b_ in [
        (["lora", "ia3"], ia3.merged_weight(W + dW), ia3.merged_bias(b)),
        (["ia3", "lora"], ia3.merged_weight(W) + dW, ia3.merged_bias(b)),
    ]:
        set_adapter(model, order)
        torch.testing.assert_close(model(x), x @ W_.T + b_)


def test_bfloat16_stays_bfloat16_merged_or_not() -> None:
    model = tiny_llama().to(torch.bfloat16)
    add_adapter(model, IA3Config(**TARGETS))
    randomize(model, scale=0.05)
    before = output(model)
    assert before.dtype == torch.bfloat16
    assert {p.dtype for n, p in model.named_parameters() if "ia3_l" in n} == {torch.float32}
    merge(model)
    error = (output(model) - before).float().norm() / before.float().norm()
    assert error < 2**-5  # 2 layers, each of some roundings by 2^-9


def test_bad_configurations_and_layers_are_refused() -> None:
    with pytest.raises(InputError, match="feedforward_modules"):
        IA3Config(target_modules=["k_proj"])
    model = tiny_llama()
    keys = list(model.state_dict())
    with pytest.raises(InputError, match="embed_tokens is an embedding"):
        add_adapter(model, IA3Config(target_modules=["embed_tokens"], feedforward_modules=[]))
    with pytest.raises(InputError, match="feedforward_modules: 'down_porj' is the end of no target layer's name"):
        add_adapter(model, IA3Config(target_modules=["down_proj"], feedforward_modules=["down_porj"]))
    assert list(model.state_dict()) == keys


def test_names_and_defaults_are_those_of_peft() -> None:
    IA3.check_names_and_defaults(feedforward_modules=[])
