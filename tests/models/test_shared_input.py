"""minilora/models/shared_input.py: together or one by one, outputs, gradients and hooks are the same."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.adapters import IDS, peft_model, peft_parameters, randomize, tiny_llama
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils.flop_counter import FlopCounterMode

from minilora.adapters import fused_lora, gated_lora
from minilora.adapters import layer as adapted_layer
from minilora.adapters.attach import add_adapter
from minilora.adapters.for_training import adapter_parameters
from minilora.adapters.lora_config import LoRAConfig
from minilora.adapters.mixed_batch import adapters_for_rows
from minilora.models.config import ModelConfig
from minilora.models.shared_input import project, project_swiglu
from minilora.models.transformer import Transformer
from minilora.nf4.linear import NF4Linear

IN, TOKENS = 16, 5


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def three(targets: list[str], **config: Any) -> nn.ModuleDict:
    """q plain, k in 4 bits, v a subclass: those in `targets` with LoRA."""
    torch.manual_seed(0)
    q, k, v = nn.Linear(IN, 8), NF4Linear.from_linear(nn.Linear(IN, 4, bias=False)), Twice(IN, 6)
    layers = nn.ModuleDict({"q": q, "k": k, "v": v})
    if targets:
        add_adapter(layers, LoRAConfig(r=2, target_modules=targets, init_lora_weights=False, **config))
    return layers


@pytest.fixture
def joint_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each fused call computed."""
    calls: list[int] = []
    true = fused_lora.fused_lora

    def count(x: Tensor, parts: Any) -> Any:
        calls.append(len(parts))
        return true(x, parts)

    monkeypatch.setattr(fused_lora, "fused_lora", count)
    return calls


@pytest.mark.parametrize(
    ("targets", "together"), [([], []), (["q"], []), (["q", "v"], []), (["q", "k"], [2]), (["q", "k", "v"], [2])]
)
def test_layers_together_are_the_layers_one_by_one(
    targets: list[str], together: list[int], joint_calls: list[int]
) -> None:
    layers = three(targets)
    x = torch.randn(2, TOKENS, IN, requires_grad=True)
    inputs = [x, *(parameter for parameter in layers.parameters() if parameter.requires_grad)]
    ys = project(x, *layers.values())
    assert joint_calls == together
    expected = [layer(x) for layer in layers.values()]
    for y, wanted in zip(ys, expected, strict=True):
        torch.testing.assert_close(y, wanted)
    gradients, wanted_gradients = (
        torch.autograd.grad(sum(y.square().sum() for y in outputs), inputs) for outputs in (ys, expected)
    )
    for gradient, wanted in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_a_layer_with_a_hook_or_a_forward_of_its_own_is_called(joint_calls: list[int]) -> None:
    seen: list[str] = []

    def pre(layer: nn.Module) -> None:
        layer.register_forward_pre_hook(lambda *_: seen.append("pre"))

    def after(layer: nn.Module) -> None:
        layer.register_forward_hook(lambda *_: seen.append("after"))

    def backward_pre(layer: nn.Module) -> None:
        layer.register_full_backward_pre_hook(lambda *_: seen.append("backward pre"))

    def backward(layer: nn.Module) -> None:
        layer.register_full_backward_hook(lambda *_: seen.append("backward"))

    def replaced(layer: nn.Module) -> None:
        true = layer.forward
        layer.forward = lambda x: seen.append("replaced") or true(x)

    changes: list[Callable[[nn.Module], None]] = [pre, after, backward_pre, backward, replaced]
    for change in changes:
        for of_base in (False, True):
            layers = three(["q", "k"])
            x = torch.randn(TOKENS, IN, requires_grad=True)
            change(layers["q"].base_layer if of_base else layers["q"])
            torch.cat(project(x, layers["q"], layers["k"]), dim=-1).sum().backward()
            down = three(["q"])["q"]
            change(down.base_layer if of_base else down)
            project_swiglu(x, x, down).sum().backward()
            name = change.__name__.replace("_", " ")
            assert seen == [name, name]
            seen.clear()
    assert joint_calls == []


def test_a_mixed_batch_and_a_plain_layer_go_one_by_one(joint_calls: list[int]) -> None:
    layers = three(["q", "k"])
    add_adapter(layers, LoRAConfig(r=3, target_modules=["q", "k"], init_lora_weights=False), name="other")
    x = torch.randn(3, TOKENS, IN)
    with adapters_for_rows(layers, ["other", "__base__", "default"]):
        for y, layer in zip(project(x, *layers.values()), layers.values(), strict=True):
            torch.testing.assert_close(y, layer(x))
    plain = nn.Linear(IN, 4)
    assert torch.equal(project_swiglu(x, x, plain), plain(F.silu(x) * x))
    assert joint_calls == []


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_model_computes_together_and_equals_peft(
    checkpointing: bool, joint_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    gated: list[int] = []
    true = gated_lora.gated_lora
    monkeypatch.setattr(adapted_layer, "gated_lora", lambda *args: gated.append(1) or true(*args))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    base = tiny_llama()
    theirs = peft_model(base, r=4, lora_alpha=8, target_modules=targets)
    ours = Transformer(ModelConfig.from_hf(base.config.to_dict())).eval()
    ours.load_state_dict(copy.deepcopy(base.state_dict()))
    add_adapter(ours, LoRAConfig(r=4, lora_alpha=8, target_modules=targets))
    for model in (theirs, ours):
        randomize(model)
    ours.train().gradient_checkpointing = checkpointing

    logits, expected = ours(IDS), theirs(IDS).logits
    blocks = len(ours.model.layers)
    assert joint_calls == [3, 2] * blocks
    assert len(gated) == blocks
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)  # float32 through two blocks
    logits.square().sum().backward()
    expected.square().sum().backward()
    reference = peft_parameters(theirs)
    for name, parameter in adapter_parameters(ours).items():
        wanted = reference[name].grad
        # sums over 24 tokens of 64 logits, in another order: 1e-4 of the largest
        assert (parameter.grad - wanted).abs().max() < 1e-4 * wanted.abs().max(), name


def hook_on_all_modules(kind: str, hook: Callable[..., None]) -> Any:
    register = {
        "pre": module_hooks.register_module_forward_pre_hook,
        "after": module_hooks.register_module_forward_hook,
        "backward pre": module_hooks.register_module_full_backward_pre_hook,
        "backward": module_hooks.register_module_full_backward_hook,
    }
    return register[kind](hook)


@pytest.mark.parametrize("kind", ["pre", "after", "backward pre", "backward"])
def test_hooks_of_all_modules_see_every_layer(kind: str, joint_calls: list[int]) -> None:
    layers = three(["q", "k"])
    x = torch.randn(TOKENS, IN, requires_grad=True)
    seen: list[nn.Module] = []
    with hook_on_all_modules(kind, lambda module, *_: seen.append(module)):
        q, k = project(x, layers["q"], layers["k"])
        y = project_swiglu(x, x, layers["q"])
        torch.cat([q, k, y], dim=-1).sum().backward()
    assert joint_calls == []
    for name, calls in {"q": 2, "k": 1}.items():
        layer = layers[name]
        assert [seen.count(module) for module in (layer, layer.base_layer, layer.adapters["default"])] == [calls] * 3


def test_flops_are_counted_in_every_layer() -> None:
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = Transformer(ModelConfig.from_hf(tiny_llama().config.to_dict()))
    add_adapter(model, LoRAConfig(r=4, target_modules=layers))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(IDS)
    counts = counter.get_flop_counts()
    for path, layer in model.named_modules():
        if path.endswith(tuple(layers)):
            products = layer.in_features * layer.out_features + 4 * (layer.in_features + layer.out_features)
            assert sum(counts[f"Transformer.{path}"].values()) == 2 * IDS.numel() * products, path
