"""What a variant is tried on: a tiny model for every kind of layer, its adapters on it, and how a check fails."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from minilora.adapters import (
    AdaptedLayer,
    Adapter,
    AdapterConfig,
    adapter_class,
    adapter_parameters,
    adapters_named,
    add_adapter,
)
from minilora.errors import InputError
from minilora.nf4 import NF4Linear

NAMES = ("first", "second")  # the two layers of every model here, and so the target_modules

# A few dozen float32 roundings of 6e-8 each, with room for sums in another order.
FLOAT32 = 1e-5


class Conv1D(nn.Module):
    """A linear layer that stores its weight as (in, out), as the one in transformers that GPT-2 is made of."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def _nf4(in_features: int, out_features: int, bias: bool) -> NF4Linear:
    return NF4Linear.from_linear(nn.Linear(in_features, out_features, bias=bias))


# The layers called "first" and "second", of different shapes and the second without a bias where that is possible.
LAYERS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "linear": lambda: (nn.Linear(16, 12), nn.Linear(12, 8, bias=False)),
    "nf4": lambda: (_nf4(16, 12, True), _nf4(12, 8, False)),
    "transposed": lambda: (Conv1D(12, 16), Conv1D(8, 12)),
    "embedding": lambda: (nn.Embedding(16, 12), nn.Linear(12, 8, bias=False)),
    "conv1d": lambda: (nn.Conv1d(3, 6, 3, padding=1), nn.Conv1d(6, 4, 3, stride=2, bias=False)),
    "conv2d": lambda: (nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, stride=2, bias=False)),
}


def example_input(model: nn.Module) -> Tensor:
    """What a model of `LAYERS` takes, always the same numbers, in the dtype of the model.

    (2, 3, 16), for an embedding token ids (2, 3), for convolutions (2, 3, 5) and (2, 3, 5, 5).
    """
    first = cast(nn.Module, model.first)
    layer = first.base_layer if isinstance(first, AdaptedLayer) else first
    generator = torch.Generator().manual_seed(1)
    if isinstance(layer, nn.Embedding):
        return torch.randint(layer.num_embeddings, (2, 3), generator=generator)
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        x = torch.randn(2, 3, *[5] * len(layer.kernel_size), generator=generator)
    else:
        x = tokens(2, 3)
    return x.to(cast(Tensor, layer.bias).dtype)


def tokens(*shape: int) -> Tensor:
    """Inputs (*shape, 16) for a model of linear layers, always the same numbers."""
    return torch.randn(*shape, 16, generator=torch.Generator().manual_seed(1))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from this seed; outside, the generator goes on as if nothing had happened."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


Add = Callable[[nn.Module, AdapterConfig, str], Any]  # puts an adapter of this name on a model


@dataclass(frozen=True)
class Trial:
    """A variant on trial: its configuration, and what puts it on a model."""

    config: AdapterConfig
    add: Add = add_adapter

    @property
    def variant(self) -> type[Adapter]:
        return adapter_class(self.config)

    @property
    def computes(self) -> str:
        """The method that computes y."""
        return "forward" if self.variant.additive else "transform"

    def base(self, layer: str) -> nn.Sequential:
        """The model without adapters, in evaluation mode; the same weights every time."""
        with seeded(0):
            first, second = LAYERS[layer]()
        return nn.Sequential(OrderedDict(first=first, bend=nn.Tanh(), second=second)).eval()

    def put_on(self, model: nn.Module, *names: str, **changed: Any) -> None:
        """Add an adapter for each name, with some fields of the configuration changed."""
        for name in names:
            self.add(model, replace(self.config, target_modules=list(NAMES), **changed), name)

    def model(self, layer: str, *names: str, **changed: Any) -> nn.Sequential:
        """The model with an adapter for each name ("default"), away from where it starts; the last one is active.

        The same numbers every time, and not those of an adapter that `put_on` makes.
        """
        model = self.base(layer)
        for seed, name in enumerate(names or ("default",)):
            with seeded(100 + seed):
                self.put_on(model, name, **changed)
            shake(model, name, seed)
        return model

    def model_and_input(self, layer: str, *names: str, **changed: Any) -> tuple[nn.Sequential, Tensor]:
        """The same model, and what it takes."""
        model = self.model(layer, *names, **changed)
        return model, example_input(model)

    def takes(self, layer: str) -> bool:
        """True if the variant can adapt this kind of layer; for an nn.Linear that it cannot, the InputError."""
        try:
            self.put_on(self.base(layer), "default")
        except InputError:
            if layer == "linear":
                raise
            return False
        return True

    def expect(self, holds: bool, expected: str, found: str, look_at: str) -> None:
        """Fail where the condition does not hold, saying what to look at: the name of a method or attribute."""
        if not holds:
            raise AssertionError(f"expected {expected}; found {found}; look at {self.variant.__name__}.{look_at}")

    def expect_equal(self, a: Tensor, b: Tensor, expected: str, look_at: str, tolerance: float = FLOAT32) -> None:
        """Fail where |a − b| / |b| is not below the tolerance."""
        error, same_shape = distance(a, b), a.shape == b.shape
        found = f"a relative error of {error:.1e}" if same_shape else f"shapes {tuple(a.shape)}, {tuple(b.shape)}"
        self.expect(error < tolerance, f"{expected} (within {tolerance:.0e})", found, look_at)


@torch.no_grad()
def shake(model: nn.Module, name: str = "default", seed: int = 0) -> None:
    """Move every trained number of an adapter away from where it starts, so that it changes the model."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model, name).values():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))


def adapters_of(model: nn.Module, name: str = "default") -> list[Adapter]:
    """The adapters of the first and the second layer."""
    return list(adapters_named(model, name).values())


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What the adapter trains, by the layer's and the parameter's name."""
    return {name: parameter for name, parameter in adapter_parameters(model).items() if parameter.requires_grad}


def in_float64(model: nn.Module) -> nn.Module:
    """The model, made to compute in float64, NF4 layers too."""
    for module in model.modules():
        if isinstance(module, NF4Linear):
            module.compute_dtype = torch.float64
    return model.double()


def distance(a: Tensor, b: Tensor) -> float:
    """|a − b| / |b| in float64, Frobenius norms; infinite where the shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything in the model's state dict."""
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def changed_bits(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Which entries are not bit for bit what they were."""
    same = {key for key in before.keys() & after.keys() if torch.equal(before[key], after[key])}
    return sorted((before.keys() | after.keys()) - same)


# --- checks ----------------------------------------------------------------------------------------------------------

Function = Callable[[Trial, str], None]


class Check:
    """One check: call it with a configuration; it raises AssertionError where the variant fails.

    Random numbers are the same in every run. A failure, and any other error, becomes an AssertionError that names the
    check, the variant, the kind of layer and the method to look at. `check_variant` explains the other arguments.
    """

    def __init__(self, function: Function, layers: tuple[str, ...]) -> None:
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        self._function, self._layers = function, layers

    def __call__(
        self, config: AdapterConfig, *, add: Add = add_adapter, exceptions: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        trial, reason = Trial(config, add), exceptions.get(self.__name__)
        failures = [failure for layer in self._layers if (failure := self._failure(trial, layer))]
        if reason is None and failures:
            raise failures[0]
        if reason is not None and not failures:
            name = trial.variant.__name__
            raise AssertionError(f"{self.__name__}: {name} passes; remove it from the exceptions ({reason!r})")

    def _failure(self, trial: Trial, layer: str) -> AssertionError | None:
        """What is wrong on this kind of layer, if the variant takes it."""
        where = f"{self.__name__}: {trial.variant.__name__} on {layer}"
        try:
            with seeded(0):
                if trial.takes(layer):
                    self._function(trial, layer)
        except AssertionError as error:
            return AssertionError(f"{where}: {error}").with_traceback(error.__traceback__)
        except Exception as error:
            found = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"  # dynamo's go on for many lines
            message = f"{where}: expected no error; found {found}; look at {_method_that_raised(error, trial)}"
            return AssertionError(message).with_traceback(error.__traceback__)
        return None


CHECKS: list[Check] = []


def check(*layers: str) -> Callable[[Function], Check]:
    """Decorator: make `function(trial, layer)` a check, run on each of these kinds of layer that the variant takes."""

    def decorate(function: Function) -> Check:
        CHECKS.append(Check(function, layers))
        return CHECKS[-1]

    return decorate


def _method_that_raised(error: Exception, trial: Trial) -> str:
    """The innermost method of an adapter that was running, and that is not torch's own, as `__getattr__` is.

    By default, as torch.compile does not tell, what gives y.
    """
    found, frame = f"{trial.variant.__name__}.{trial.computes}", error.__traceback__
    while frame is not None:
        owner = frame.tb_frame.f_locals.get("self")
        if isinstance(owner, Adapter) and not frame.tb_frame.f_globals["__name__"].startswith("torch."):
            found = f"{type(owner).__name__}.{frame.tb_frame.f_code.co_name}"
        frame = frame.tb_next
    return found
