"""What a training loop asks of a model's adapters: which parameters train, a term of the loss, what follows a step."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from minilora.adapters.adapter import Adapter, adapter_class
from minilora.adapters.attach import adapters_named
from minilora.adapters.targets import adapted_layers
from minilora.nf4 import NF4Linear


def adapter_parameters(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """The adapter's parameters by `<path of the layer>.lora_A` and so on; one that a tied pair shares is named once."""
    found: dict[nn.Parameter, str] = {}
    for path, adapter in adapters_named(model, name).items():
        for key, parameter in adapter.named_parameters():
            found.setdefault(parameter, f"{path}.{key}")
    return {path: parameter for parameter, path in found.items()}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that requires a gradient, by path, in the model's order.

    Args:
        model: any nn.Module.

    Returns:
        The parameters, for an optimizer; one that is shared is there once.
    """
    return {path: parameter for path, parameter in model.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True)
class ParameterCount:
    """How many numbers train, of how many in all; as text "4.9M of 139M, 3.5%"."""

    trainable: int
    total: int

    def __str__(self) -> str:
        return f"{_short(self.trainable)} of {_short(self.total)}, {self.trainable / max(self.total, 1):.1%}"


def _short(count: int) -> str:
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= 0.9995 * unit:  # what three digits round up to the unit
            return f"{count / unit:.3g}{letter}"
    return str(count)


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters, tied ones once; an NF4 weight counts as the in·out numbers it stands for."""
    parameters = list(model.parameters())
    in_nf4 = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, NF4Linear))
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return ParameterCount(trainable, sum(parameter.numel() for parameter in parameters) + in_nf4)


def regularization(model: nn.Module) -> Tensor | float:
    """What the acting adapters add to the loss, such as AdaLoRA's term for orthogonal factors.

    Args:
        model: a model with adapters.

    Returns:
        The term, a scalar; 0.0 where no adapter adds any.

    Example:
        (loss + regularization(model)).backward()
    """
    layers = adapted_layers(model).values()
    return summed_regularization(adapter for layer in layers for adapter in layer.acting_adapters())


def summed_regularization(adapters: Iterable[Adapter]) -> Tensor | float:
    """The same of adapters that have been collected: to go through a model's modules takes a millisecond."""
    terms = [adapter.regularization() for adapter in adapters]
    return sum((term for term in terms if term is not None), start=0.0)


def after_step(model: nn.Module, step: int) -> None:
    """What the active adapters do after an optimizer step: AdaLoRA brings its ranks to the budget.

    Call it between optimizer.step() and optimizer.zero_grad(): it needs the gradients.

    Args:
        model: a model with adapters.
        step: the number of the step, from 1.

    Raises:
        InputError: where the gradients are gone already, or an earlier step was left out.
    """
    for name in dict.fromkeys(name for layer in adapted_layers(model).values() for name in layer.active):
        adapters = adapters_named(model, name)
        adapter_class(next(iter(adapters.values())).config).after_step(adapters, step)
