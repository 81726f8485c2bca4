"""One layer of any kind with an initialisation on it, minilora's and PEFT's, and what training makes of both."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from helpers.adapters import peft_parameters
from helpers.layers import rel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from minilora.adapters.attach import add_adapter
from minilora.adapters.for_training import adapter_parameters
from minilora.adapters.layer_kinds import kind_of
from minilora.adapters.lora import LoRA
from minilora.adapters.lora_config import LoRAConfig
from minilora.adapters.targets import adapted_layers
from minilora.errors import InputError
from minilora.nf4.linear import NF4Linear

IN, OUT, R, ALPHA = 24, 20, 4, 6
KINDS = ["linear", "conv1d", "nf4"]


def base(kind: str = "linear", seed: int = 0) -> nn.Sequential:
    """A model of one layer, "0"."""
    torch.manual_seed(seed)
    if kind == "conv1d":
        layer = Conv1D(OUT, IN)
        nn.init.normal_(layer.weight, std=0.2)
        nn.init.normal_(layer.bias)
        return nn.Sequential(layer)
    linear = nn.Linear(IN, OUT)
    return nn.Sequential(NF4Linear.from_linear(linear) if kind == "nf4" else linear)


def as_linear(model: nn.Sequential) -> nn.Sequential:
    """The same weights in an nn.Linear."""
    W = kind_of(model[0]).weight(model[0])
    linear = nn.Linear(IN, OUT)
    linear.weight.data, linear.bias.data = W.contiguous().clone(), model[0].bias.data.clone()
    return nn.Sequential(linear)


def adapter(model: nn.Module) -> LoRA:
    return model[0].adapters["default"]


@contextmanager
def refused(model: nn.Module, message: str) -> Iterator[None]:
    """Inside the `with`, one line of these words; the model is then as it was, without hooks."""
    before, modules = {key: value.clone() for key, value in model.state_dict().items()}, list(model.modules())
    with pytest.raises(InputError, match=message) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert all(after is module for after, module in zip(model.modules(), modules, strict=True))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules[1:])
    assert all(layer.enabled for layer in adapted_layers(model).values())


def seeded(svd_lowrank: Callable[..., Any]) -> Callable[..., Any]:
    """torch.svd_lowrank with the random numbers that minilora draws, and none of the program's."""

    def with_seed(*arguments: Any, **options: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(42)
            return svd_lowrank(*arguments, **options)

    return with_seed


def train(model: nn.Module, steps: int = 5) -> dict[str, Tensor]:
    """The output, the first gradients, and the parameters after some AdamW steps."""
    torch.manual_seed(2)
    x, target = torch.randn(30, IN), torch.randn(30, OUT)
    parameters = (peft_parameters if isinstance(model, peft.PeftModel) else adapter_parameters)(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    found: dict[str, Tensor] = {}
    for step in range(steps):
        torch.manual_seed(step)  # for dropout
        y = model(x)
        optimizer.zero_grad()
        F.mse_loss(y, target).backward()
        if step == 0:
            found |= {"y": y.detach()} | {f"{key}.grad": p.grad.clone() for key, p in parameters.items()}
        optimizer.step()
    return found | {key: p.detach().clone() for key, p in parameters.items()} | {"trained y": model(x).detach()}


# Sums of some dozens of float32 terms, 6e-8 each; AdamW divides by |gradient|, which keeps relative errors as they are.
FLOAT32 = 1e-5


def assert_trains_as(model: nn.Module, expected: nn.Module) -> None:
    found, wanted = train(model), train(expected)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert rel(found[key], value) < FLOAT32, key


class Start:
    """A value of init_lora_weights, on minilora's models and on PEFT's."""

    def __init__(self, init: bool | str) -> None:
        self.init = init

    def values(self, config: dict[str, Any]) -> dict[str, Any]:
        return {"r": R, "lora_alpha": ALPHA, "target_modules": ["0"], "init_lora_weights": self.init} | config

    def ours(self, kind: str = "linear", **config: Any) -> nn.Sequential:
        model = base(kind)
        torch.manual_seed(1)
        add_adapter(model, LoRAConfig(task_type=None, **self.values(config)))  # or PEFT would look for a language model
        return model

    def theirs(self, kind: str = "linear", **config: Any) -> peft.PeftModel:
        """PEFT gets a base in 4 bits as a dense layer of the dequantized weights."""
        model = as_linear(base(kind)) if kind == "nf4" else base(kind)
        torch.manual_seed(1)
        return peft.get_peft_model(model, peft.LoraConfig(fan_in_fan_out=kind == "conv1d", **self.values(config)))

    def check_trains_as_peft(self, kind: str = "linear", **config: Any) -> None:
        assert_trains_as(self.ours(kind, **config), self.theirs(kind, **config))

    def check_starts_at_the_base(self, kind: str = "linear") -> None:
        plain, model, x = base(kind), self.ours(kind), torch.randn(7, IN)
        assert torch.equal(model[0].base_layer.weight, plain[0].weight)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-6, atol=1e-6)  # b + 0 + Wx: another order of summation

    def check_refuses(self, model: nn.Sequential, message: str, **config: Any) -> None:
        """Named are the layer and the initialisation."""
        with refused(model, rf"^0: init_lora_weights='{self.init}' .*{message}"):
            add_adapter(model, LoRAConfig(**self.values(config)))

    def check_takes_linear_layers_only(self) -> None:
        for layer in (nn.Conv2d(3, 8, 3), nn.Embedding(10, 8)):
            self.check_refuses(nn.Sequential(layer), f"linear layer, not {type(layer).__name__}")
