"""A method beside LoRA and PEFT's own, on copies of one model: the same numbers everywhere, and folders both ways."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.adapters import IDS, tiny_llama
from torch import Tensor, nn

from minilora.adapters import merge
from minilora.adapters.adapter import AdapterConfig
from minilora.adapters.attach import adapters_named, add_adapter
from minilora.adapters.layer_kinds import kind_of
from minilora.adapters.merge import unmerge
from minilora.errors import InputError
from minilora.formats.peft import load_adapter, save_adapter

FLOAT32 = 1e-5  # of the largest number: two layers of sums over dozens of terms, in another order than PEFT's
FLOAT64 = 1e-9  # the same in float64, where 10 steps of AdamW have divided small gradients by their own size


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters of minilora's or PEFT's adapter, by the key in PEFT's file."""
    if isinstance(model, peft.PeftModel):
        return {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    return {
        f"base_model.model.{path}.{name}": parameter
        for path, adapter in adapters_named(model, "default").items()
        for name, parameter in zip(adapter.saved_tensors(), adapter.parameters(), strict=True)
    }


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float = 0, atol: float = 0) -> None:
    assert ours.keys() == theirs.keys() and ours
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=rtol, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


def assert_near(y: Tensor, expected: Tensor, tolerance: float = FLOAT32) -> None:
    torch.testing.assert_close(y, expected, rtol=0, atol=tolerance * float(expected.detach().abs().max()))


def randomize(*models: nn.Module, scale: float = 0.3) -> None:
    """Move every parameter of the adapters away from its start, alike in all models."""
    for model in models:
        generator = torch.Generator().manual_seed(1)
        for _, parameter in sorted(parameters(model).items()):
            parameter.data.add_(scale * torch.randn(parameter.shape, generator=generator))


def output(model: nn.Module, x: Tensor = IDS) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y.logits


def train_steps(model: nn.Module, steps: int, x: Tensor = IDS) -> list[float]:
    """The loss before each AdamW step."""
    optimizer = torch.optim.AdamW(parameters(model).values(), lr=1e-2)
    target = torch.randn(output(model, x).shape, generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (output(model, x) - target.to(next(iter(parameters(model).values())).dtype)).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Method:
    """A method as minilora and PEFT have it, both asked for by the same values; by default on the tiny Llama."""

    def __init__(self, ours: type[AdapterConfig], theirs: type[peft.PeftConfig], **defaults: Any) -> None:
        self.ours, self.theirs, self.defaults = ours, theirs, defaults

    def config(self, **values: Any) -> AdapterConfig:
        return self.ours(**self.defaults | values)

    def both(self, base: nn.Module | None = None, **values: Any) -> tuple[nn.Module, peft.PeftModel]:
        """minilora's and PEFT's adapter on copies of the model, drawn from one seed."""
        ours, theirs = (tiny_llama() if base is None else copy.deepcopy(base) for _ in range(2))
        torch.manual_seed(5)
        add_adapter(ours, self.config(**values))
        torch.manual_seed(5)
        theirs = peft.get_peft_model(theirs, self.theirs(**self.defaults | values))
        return ours.eval(), theirs.eval()

    def check_equals_peft(
        self, base: nn.Module | None = None, x: Tensor = IDS, scale: float = 0.3, **values: Any
    ) -> None:
        """Start, forward, every gradient, 10 AdamW steps and the merge are those of PEFT."""
        ours, theirs = self.both(base, **values)
        plain = output(tiny_llama() if base is None else base, x)
        assert_same(parameters(ours), parameters(theirs))
        assert_near(output(ours, x), output(theirs, x))

        randomize(ours, theirs, scale=scale)
        assert not torch.allclose(output(ours, x), plain, rtol=1e-2), "the adapter does something"
        assert_near(output(ours, x), output(theirs, x))
        for model in (ours, theirs):
            output(model, x).pow(2).mean().backward()
        gradients = [{k: p.grad for k, p in parameters(model).items()} for model in (ours, theirs)]
        largest = max(float(g.abs().max()) for g in gradients[1].values())
        assert_same(*gradients, rtol=1e-4, atol=1e-5 * largest)  # a gradient near 0 is a difference of large terms

        trained, their_trained = copy.deepcopy(ours), copy.deepcopy(theirs)
        torch.testing.assert_close(train_steps(trained, 10, x), train_steps(their_trained, 10, x), rtol=1e-4, atol=0)
        # float32 steps part where AdamW divides a gradient of 1e-8 by itself; in float64 they must stay together
        doubles = ours.double(), theirs.double()
        x = x.double() if x.is_floating_point() else x
        for model in doubles:
            train_steps(model, 10, x)
        assert_same(parameters(ours), parameters(theirs), rtol=1e-6, atol=1e-8)

        before = output(ours, x)
        merge(ours)
        theirs.merge_adapter()
        assert_near(output(ours, x), output(theirs, x), FLOAT64)
        assert_near(output(ours, x), before, FLOAT64)
        unmerge(ours)
        assert torch.equal(output(ours, x), before)

    def check_folders_both_ways(self, folder: Path, scale: float = 0.3, **values: Any) -> None:
        """What minilora saves, PEFT loads, and the reverse, to equal logits; and minilora what it has saved itself."""
        ours, theirs = self.both(**values)
        randomize(ours, theirs, scale=scale)
        wanted = output(ours)
        save_adapter(ours, folder / "ours")
        theirs.save_pretrained(folder / "theirs")
        loaded = peft.PeftModel.from_pretrained(tiny_llama(), folder / "ours").eval()
        assert_near(output(loaded), wanted)
        for name in ("ours", "theirs"):
            load_adapter(model := tiny_llama(), folder / name)
            assert_near(output(model.eval()), wanted)

    def check_drops_as_peft(self, layer: nn.Module, x: Tensor, **values: Any) -> None:
        """With the same random numbers the same inputs are dropped, in training only."""
        ours, theirs = self.both(nn.Sequential(layer), target_modules=["0"], **values)
        randomize(ours, theirs, scale=1.0)
        results = []
        for model in (ours, theirs):
            torch.manual_seed(3)
            results.append(model.train()(x))
        assert_near(*results)
        assert not torch.allclose(results[0], ours.eval()(x))

    def check_adds_delta(self, layer: nn.Module, scale: float = 0.3, **values: Any) -> None:
        """y = (W + ΔW) x + b, merged or not, on a linear layer that PEFT does not know; its W may be in 4 bits."""
        model, W = nn.Sequential(layer), kind_of(layer).weight(layer)
        add_adapter(model, self.config(target_modules=["0"], **values))
        randomize(model, scale=scale)
        x = torch.randn(3, W.shape[1])
        expected = x @ (W + adapters_named(model, "default")["0"].delta()).T + layer.bias
        torch.testing.assert_close(model(x), expected)
        merge(model)
        torch.testing.assert_close(model(x), expected)

    def check_refuses(self, *layers: nn.Module) -> None:
        """One InputError names the layer, which stays as it was."""
        for layer in layers:
            model = nn.Sequential(layer)
            with pytest.raises(InputError, match=f"^0 is a {type(layer).__name__}: "):
                add_adapter(model, self.config(target_modules=["0"]))
            assert model[0] is layer

    def check_names_and_defaults(self, **needed: Any) -> None:
        ours, theirs = self.ours(**needed), self.theirs(**needed)
        for name in vars(ours).keys() - ours.peft_lacks - {"task_type", *needed}:
            assert getattr(ours, name) == getattr(theirs, name), name
