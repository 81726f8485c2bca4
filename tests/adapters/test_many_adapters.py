"""Many adapters on one base: switching touches no tensor, several at once equal PEFT, one goes and the others stay."""

import copy
from typing import Any

import pytest
import torch
from helpers.adapters import ALL, FLOAT32, logits, peft_with_adapters, tiny_llama, with_adapters
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minilora.adapters import merge
from minilora.adapters.attach import adapter_names, add_adapter, delete_adapter, disable_adapters, set_adapter
from minilora.adapters.for_training import trainable_parameters
from minilora.adapters.lora_config import LoRAConfig
from minilora.adapters.mixed_batch import adapters_for_rows
from minilora.adapters.targets import adapted_layers
from minilora.errors import InputError
from minilora.nf4.linear import NF4Linear

CONFIGS: dict[str, dict[str, Any]] = {
    "fr": {"r": 4, "lora_alpha": 8, "target_modules": ALL},
    "de": {"r": 2, "target_modules": ["v_proj", "up_proj"], "rank_pattern": {"layers.1.*v_proj": 5}},
    "pl": {"r": 3, "target_modules": "all-linear", "alpha_pattern": {"mlp.*": 9}, "use_rslora": True},
}


class Operations(TorchDispatchMode):
    """The operations on tensors that run inside the `with`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def tensors(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Where every parameter and buffer lies, and how often it has been written."""
    return {name: (t.data_ptr(), t._version) for name, t in [*model.named_parameters(), *model.named_buffers()]}


@pytest.mark.parametrize("quantized", [False, True])
def test_switching_copies_and_writes_no_weight(quantized: bool) -> None:
    model = tiny_llama()
    if quantized:
        for block in model.model.layers:
            block.mlp.up_proj = NF4Linear.from_linear(block.mlp.up_proj)
    before = tensors(model)
    with_adapters(model, CONFIGS)
    of_base = {
        name.replace("base_layer.", ""): where for name, where in tensors(model).items() if ".adapters." not in name
    }
    assert of_base == before, "the adapters lie beside the base model's own tensors"
    placed = tensors(model)
    with Operations() as operations:
        for names in ("fr", ["fr", "pl"], "de", [], ["pl", "de"]):
            set_adapter(model, names)
        with adapters_for_rows(model, ["fr", "de", "__base__"]), disable_adapters(model):
            pass
        delete_adapter(model, "pl")
    assert operations.names == []
    assert all(where == placed[name] for name, where in tensors(model).items())
    logits(model)
    with adapters_for_rows(model, ["fr", "de"]):
        logits(model)
    assert all(where == placed[name] for name, where in tensors(model).items())


@pytest.mark.parametrize("names", [["fr", "de"], ["pl", "fr"], ["de", "pl", "fr"]])
def test_several_active_at_once_equal_peft(names: list[str]) -> None:
    ours, theirs = with_adapters(tiny_llama(), CONFIGS), peft_with_adapters(tiny_llama(), CONFIGS)
    set_adapter(ours, names)
    theirs.base_model.set_adapter(names)
    assert torch.allclose(logits(ours), logits(theirs), **FLOAT32)
    merge(ours)
    theirs.merge_adapter(names)
    assert torch.allclose(logits(ours), logits(theirs), **FLOAT32)


def test_a_deleted_adapter_is_gone_and_the_others_are_as_in_peft() -> None:
    ours, theirs = with_adapters(tiny_llama(), CONFIGS), peft_with_adapters(tiny_llama(), CONFIGS)
    for active, deleted, left in ((["fr", "de"], "pl", ["fr", "de"]), (["fr", "de"], "fr", ["de"])):
        set_adapter(ours, active)
        theirs.base_model.set_adapter(active)
        delete_adapter(ours, deleted)
        theirs.delete_adapter(deleted)
        assert all(layer.active == left for layer in adapted_layers(ours).values())
        assert theirs.active_adapters == left
        assert torch.allclose(logits(ours), logits(theirs), **FLOAT32)
        assert not any(f".{deleted}." in name for name, _ in ours.named_parameters())
    assert adapter_names(ours) == ["de"]
    assert list(adapted_layers(ours)) == [
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.v_proj", "mlp.up_proj")
    ]


def test_without_an_active_adapter_the_model_is_the_base_model() -> None:
    model, plain = with_adapters(tiny_llama(), CONFIGS), tiny_llama()
    set_adapter(model, "pl")
    delete_adapter(model, "pl")
    assert torch.equal(logits(model), logits(plain))
    assert not trainable_parameters(model)
    for name in ("fr", "de"):
        delete_adapter(model, name)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert not model._forward_pre_hooks, "the model's own forward is as it was too"
    add_adapter(model, LoRAConfig(**CONFIGS["fr"]), "pl")  # the name is free again
    assert adapter_names(model) == ["pl"]


def test_what_cannot_be_deleted_is_explained_and_stays() -> None:
    model = with_adapters(tiny_llama(), CONFIGS)
    before = logits(model)
    with pytest.raises(InputError, match=r"no adapter named 'it'; it has \['de', 'fr', 'pl'\]"):
        delete_adapter(model, "it")
    with adapters_for_rows(model, ["fr", "de"]), pytest.raises(InputError, match="'fr' is in use for rows of a batch"):
        delete_adapter(model, "fr")
    merged = copy.deepcopy(model)
    merge(merged)
    with pytest.raises(InputError, match=r"unmerge\(model\) first"):
        delete_adapter(merged, "pl")
    assert torch.equal(logits(model), before)
