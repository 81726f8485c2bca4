"""The contract of an adapter and the registry: what a variant gets without writing it, what is said when it fails."""

from dataclasses import dataclass
from typing import Any, ClassVar

import peft
import pytest
import torch
from helpers.layers import FLOAT32, layers
from torch import Tensor, nn

from minilora.adapters import adapter as registry
from minilora.adapters import merge
from minilora.adapters.adapted_module import adapted
from minilora.adapters.adapter import Adapter, AdapterConfig, Below, adapter_class, config_class, register
from minilora.adapters.attach import add_adapter, disable_adapters
from minilora.adapters.lora import LoRA
from minilora.adapters.lora_config import LoRAConfig
from minilora.adapters.merge import unmerge
from minilora.errors import InputError
from minilora.variants.dora import DoRA


@dataclass(frozen=True, kw_only=True)
class FullConfig(AdapterConfig):
    peft_type: ClassVar[str] = "FULL"


class Full(Adapter):
    """ΔW itself, learnt: nothing but `delta` is written."""

    config_class = FullConfig

    def __init__(self, layer: nn.Module, config: FullConfig, path: str = "") -> None:
        super().__init__(layer, config, path)
        self.D = nn.Parameter(torch.randn(self.kind.shape))

    def delta(self) -> Tensor:
        return self.D


@dataclass(frozen=True, kw_only=True)
class ScaleConfig(AdapterConfig):
    peft_type: ClassVar[str] = "SCALE"


class Scale(Adapter):
    """W' = 2 W, b' = 2 b: not additive."""

    config_class = ScaleConfig
    additive = False

    def transform(self, x: Tensor, below: Below, add: Tensor | None = None) -> Tensor:
        y = 2 * below(x)
        return y if add is None else y + add

    def merged_weight(self, W: Tensor) -> Tensor:
        return 2 * W

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else 2 * bias


@pytest.fixture(autouse=True)
def only_for_this_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_variants", [*registry._variants])
    register(Full)
    register(Scale)


@pytest.mark.parametrize(("layer", "x"), layers())
def test_delta_alone_makes_a_variant_of_every_kind(layer: Any, x: Tensor) -> None:
    model = nn.Sequential(layer)
    before = model(x)
    add_adapter(model, FullConfig(target_modules=["0"]))
    adapter = model[0].adapters["default"]
    torch.testing.assert_close(model(x), before + adapter.kind.apply(x, adapter.D), **FLOAT32)
    y = model(x)
    merge(model)
    torch.testing.assert_close(model(x), y, **FLOAT32)
    unmerge(model)
    assert torch.equal(model(x), y)
    with disable_adapters(model):
        assert torch.equal(model(x), before)


@pytest.mark.parametrize(("layer", "x"), layers())
def test_adapters_that_do_not_add_up_apply_in_order(layer: Any, x: Tensor) -> None:
    """full, then scale: 2 (W + D) x + 2 b; scale, then full: 2 W x + 2 b + D x; and a merge gives the same."""
    doubled = adapted(layer)
    doubled.adapters["full"] = Full(layer, FullConfig())
    doubled.adapters["scale"] = Scale(layer, ScaleConfig())
    y = layer(x)
    Dx = doubled.kind.apply(x, doubled.adapters["full"].D)
    for order, expected in {("full", "scale"): 2 * (y + Dx), ("scale", "full"): 2 * y + Dx}.items():
        doubled.active = list(order)
        torch.testing.assert_close(doubled(x), expected, **FLOAT32)
        doubled.merge()
        torch.testing.assert_close(doubled(x), expected, **FLOAT32)
        doubled.unmerge()


def test_what_is_below_a_dora_is_what_the_adapters_before_it_made() -> None:
    """DoRA keeps the norms of W + D, not of W, where D acts before it."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    both = adapted(layer)
    full = Full(layer, FullConfig())
    both.adapters["full"] = full
    both.adapters["dora"] = DoRA(layer, LoRAConfig(use_dora=True, init_lora_weights=False))
    both.active = ["full", "dora"]
    changed = nn.Linear(6, 4)
    changed.load_state_dict({"weight": layer.weight + full.D, "bias": layer.bias})
    alone = adapted(changed)
    alone.adapters["dora"], alone.active = both.adapters["dora"], ["dora"]
    x = torch.randn(5, 6)
    torch.testing.assert_close(both(x), alone(x), **FLOAT32)


def test_the_registry_gives_the_class_registered_last_that_handles_a_configuration() -> None:
    assert adapter_class(LoRAConfig()) is LoRA
    assert adapter_class(LoRAConfig(use_dora=True)) is DoRA
    assert adapter_class(FullConfig()) is Full
    assert config_class("LORA") is LoRAConfig
    assert config_class("FULL") is FullConfig
    with pytest.raises(InputError, match=r"'BOFT'.*not one of.*'FULL'.*'LORA'"):
        config_class("BOFT")


def test_every_method_has_a_name_of_its_own_in_files() -> None:
    class Nameless(Full):
        config_class = AdapterConfig

    @dataclass(frozen=True, kw_only=True)
    class AlsoLoRA(LoRAConfig):
        pass

    class Other(LoRA):
        config_class = AlsoLoRA

    with pytest.raises(InputError, match="Nameless: config_class must be a configuration with a peft_type"):
        register(Nameless)
    with pytest.raises(InputError, match="AlsoLoRA: peft_type 'LORA' is LoRAConfig's"):
        register(Other)
    assert config_class("LORA") is LoRAConfig

    again = type("Full", (Full,), {"config_class": type("FullConfig", (FullConfig,), {})})
    again.config_class.__qualname__ = FullConfig.__qualname__
    assert adapter_class(register(again).config_class()) is again, "the cell of a notebook, run again"


def test_what_is_no_configuration_is_named() -> None:
    for wrong, name in ((peft.LoraConfig(target_modules=["0"]), "peft.*LoraConfig"), ({"r": 8}, "builtins.dict")):
        with pytest.raises(InputError, match=f"a {name} is no configuration of an adapter.*LoRAConfig"):
            add_adapter(nn.Sequential(nn.Linear(4, 4)), wrong)  # type: ignore[arg-type]


def test_a_configuration_without_a_variant_leaves_the_model_alone() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Nobody(AdapterConfig):
        pass

    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(InputError, match="no adapter is registered for a Nobody"):
        add_adapter(model, Nobody(target_modules=["0"]))
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad


def test_a_layer_of_no_kind_is_named() -> None:
    with pytest.raises(InputError, match=r"model\.norm is a LayerNorm"):
        LoRA(nn.LayerNorm(4), LoRAConfig(), "model.norm")
