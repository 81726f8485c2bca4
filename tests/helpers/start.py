"""One layer of any kind with an initialisation on it, minilora's and PEFT's, and what training makes of both."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from helpers.adapters import peft_parameters
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from minilora.adapters import LoRA, LoRAConfig, adapter_parameters, add_adapter, kind_of
from minilora.errors import InputError
from minilora.nf4 import NF4Linear

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


def ours(init: bool | str, kind: str = "linear", **config: Any) -> nn.Sequential:
    model = base(kind)
    config = {"r": R, "lora_alpha": ALPHA, "target_modules": ["0"], "init_lora_weights": init} | config
    torch.manual_seed(1)
    add_adapter(model, LoRAConfig(task_type=None, **config))  # no causal language model, or PEFT would look for one
    return model


def theirs(init: bool | str, kind: str = "linear", **config: Any) -> peft.PeftModel:
    """PEFT gets a base in 4 bits as a dense layer of the dequantized weights."""
    model = as_linear(base(kind)) if kind == "nf4" else base(kind)
    config = {"r": R, "lora_alpha": ALPHA, "target_modules": ["0"], "init_lora_weights": init} | config
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(fan_in_fan_out=kind == "conv1d", **config))


def adapter(model: nn.Module) -> LoRA:
    return model[0].adapters["default"]


def rel(a: Tensor, b: Tensor) -> float:
    """|a − b| / |b| in float64, Frobenius norms."""
    return float((a.double() - b.double()).detach().norm() / b.double().detach().norm())


def conv() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3))


def embedding() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(10, 8))


def assert_refused(init: str, model: nn.Sequential, message: str, **config: Any) -> None:
    """One line that names the layer and the initialisation; the model is left as it was."""
    layer, bits = model[0], {key: value.clone() for key, value in model.state_dict().items()}
    config = {"r": R, "target_modules": ["0"], "init_lora_weights": init} | config
    with pytest.raises(InputError, match=rf"^0: init_lora_weights='{init}' .*{message}") as caught:
        add_adapter(model, LoRAConfig(**config))
    assert "\n" not in str(caught.value)
    assert model[0] is layer
    assert all(torch.equal(value, bits[key]) for key, value in model.state_dict().items())


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
