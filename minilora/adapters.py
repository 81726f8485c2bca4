"""Adapters on a whole model: find the layers, attach, name, switch, merge, take off. Works on any nn.Module."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import cast

import torch
from torch import nn

from minilora.adapted_layer import AdaptedLayer, adapted
from minilora.adapter import Adapter, AdapterConfig, adapter_class
from minilora.errors import InputError
from minilora.layer_kinds import kind_of
from minilora.linear4bit import NF4Linear

# --- which layers ----------------------------------------------------------------------------------------------------


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Every AdaptedLayer of the model, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLayer)}


def find_targets(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Paths of the layers that the configuration targets, in the model's order, matched by PEFT's rules.

    "all-linear" is every linear layer but the output head (`get_output_embeddings()` or `lm_head`).
    Raises InputError where nothing matches, naming the nearest names, or a match cannot take an adapter.
    """
    modules = _modules_before_adapters(model)
    kinds = {path: kind_of(getattr(module, "base_layer", module)) for path, module in modules.items()}
    possible = [path for path, kind in kinds.items() if kind is not None]
    targets = config.target_modules
    if not targets:
        raise InputError('name the layers to adapt in target_modules, or pass target_modules="all-linear"')
    if isinstance(targets, str) and targets.lower() == "all-linear":
        head = _output_head(model)
        linear = [path for path, kind in kinds.items() if kind is not None and kind.is_linear]
        matched = [path for path in linear if modules[path] is not head]
    else:
        matched = [path for path in modules if _matches(targets, path)]
    if not matched:
        raise InputError(f"target_modules={targets!r} matches no layer; {_hint(targets, possible)}")
    found = [path for path in matched if not _matches(config.exclude_modules or [], path)]
    if not found:
        raise InputError(f"exclude_modules={config.exclude_modules!r} excludes every layer that target_modules matches")
    for path in found:
        if path not in possible:
            raise InputError(
                f"target_modules matches {path}, a {type(modules[path]).__name__}: only linear layers, embeddings and"
                " convolutions can take an adapter"
            )
    return found


def _modules_before_adapters(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by path, without the root and without what is inside an AdaptedLayer."""
    inside = tuple(path + "." for path in adapted_layers(model))
    return {path: module for path, module in model.named_modules() if path and not path.startswith(inside)}


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)  # every transformers model has it
    return get() if get else getattr(model, "lm_head", None)


def _matches(names: str | Iterable[str], path: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole path, a list holds paths or ends of paths."""
    if not isinstance(names, str):
        return any(path == name or path.endswith(f".{name}") for name in names)
    try:
        return re.fullmatch(names, path) is not None
    except re.error as error:
        raise InputError(f"{names!r} is not a regular expression ({error}); to give names, use a list") from None


def _check_every_name_matches(model: nn.Module, config: AdapterConfig) -> None:
    """A list in which one name of several is misspelled would silently adapt less than was asked for."""
    modules = _modules_before_adapters(model)
    names = config.target_modules
    for name in [] if names is None or isinstance(names, str) else names:
        if not any(_matches([name], path) for path in modules):
            raise InputError(f"target_modules: {name!r} matches no layer; {_hint([name], list(modules))}")


def _hint(targets: str | Iterable[str], paths: list[str]) -> str:
    """The existing names nearest to the wanted ones."""
    names = sorted({path.rpartition(".")[2] for path in paths} | set(paths))
    wanted = [targets] if isinstance(targets, str) else list(targets)
    near = [name for want in wanted for name in get_close_matches(want, names, n=3)]
    hint = f"the nearest names are {near}" if near else f"the layers' names are {names[:12]}"
    if isinstance(targets, str):
        hint += "; a string is a regular expression for the whole name, a list holds names or ends of names"
    return hint


# --- on, off, and which one ------------------------------------------------------------------------------------------


def add_adapter(model: nn.Module, config: AdapterConfig, name: str = "default") -> None:
    """Put a new adapter on every targeted layer and make it the active one; the first adapter freezes the model.

    Raises InputError for a name in use, a target that matches nothing, or a merged model; the model is then unchanged.
    """
    _check_every_name_matches(model, config)
    _check_new_name(model, name)
    attach(model, build_adapters(model, config, find_targets(model, config)), name)


def build_adapters(model: nn.Module, config: AdapterConfig, targets: list[str]) -> dict[str, Adapter]:
    """An adapter for the layer at each of these paths, by path, on the layer's device and not yet on the model."""
    variant = adapter_class(config)
    layers = {path: model.get_submodule(path) for path in targets}
    bases = {path: layer.base_layer if isinstance(layer, AdaptedLayer) else layer for path, layer in layers.items()}
    shared = variant.share(config, bases)
    return {
        path: variant.build(base, config, path, shared).to(_device(base)).train(base.training)
        for path, base in bases.items()
    }


def _device(layer: nn.Module) -> torch.device:
    """Where the layer's weight lies; a packed one is a buffer."""
    return next(itertools.chain(layer.parameters(), layer.buffers())).device


def attach(model: nn.Module, adapters: Mapping[str, Adapter], name: str) -> None:
    """Put these adapters on the layers at their paths under one name, and make it the active one."""
    _check_new_name(model, name)
    _refuse_merged(model)
    if not adapter_names(model):
        model.requires_grad_(False)
    for path, adapter in adapters.items():
        layer = model.get_submodule(path)
        if not isinstance(layer, AdaptedLayer):
            layer = adapted(layer)
            _replace(model, path, layer)
        layer.adapters[name] = adapter
    set_adapter(model, name)


def _check_new_name(model: nn.Module, name: str) -> None:
    if name in adapter_names(model):
        raise InputError(f"the model already has an adapter named {name!r}; choose another name or unload() first")
    if not name or "." in name or hasattr(nn.ModuleDict, name):
        raise InputError(f"{name!r} cannot name an adapter: use a word without dots")


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters on the model, sorted."""
    return sorted({name for layer in adapted_layers(model).values() for name in layer.adapters})


def adapters_named(model: nn.Module, name: str) -> dict[str, Adapter]:
    """The adapters of this name by the path of their layer, in the model's order.

    Raises InputError where the model has none.
    """
    _check_names(model, [name])
    layers = adapted_layers(model).items()
    return {path: cast(Adapter, layer.adapters[name]) for path, layer in layers if name in layer.adapters}


def set_adapter(model: nn.Module, names: str | list[str]) -> None:
    """Make these adapters, and no others, act and train; the updates of several add up.

    Raises InputError for a name that the model does not have, and on a merged model.
    """
    names = [names] if isinstance(names, str) else list(names)
    _check_names(model, names)
    _refuse_merged(model)
    for layer in adapted_layers(model).values():
        layer.active = list(names)
        for name, adapter in layer.adapters.items():
            adapter.requires_grad_(name in names)


def _check_names(model: nn.Module, names: list[str]) -> None:
    existing = adapter_names(model)
    for name in names:
        if name not in existing:
            raise InputError(f"the model has no adapter named {name!r}; it has {existing}")


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the `with` the model is the base model, merged or not, at no cost in compute or memory."""
    layers = list(adapted_layers(model).values())
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


# --- merge and take off ----------------------------------------------------------------------------------------------


def merge(model: nn.Module, safe: bool = True) -> None:
    """Fold the active adapters into the weights, each layer W + Σ s·BA; NF4 layers become dense, never 4-bit again.

    Raises InputError naming the layer where the sum is not finite; the model is then unmerged, as it was. safe=False
    saves the time of looking.
    """
    try:
        for path, layer in adapted_layers(model).items():
            layer.merge(path, safe)
    except InputError:
        unmerge(model)
        raise


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: every layer is what it was, bit for bit."""
    for layer in adapted_layers(model).values():
        layer.unmerge()


def unload(model: nn.Module, merge: bool = False) -> nn.Module:
    """Take all adapters off, in place, and return the model with plain layers: the original ones, or the merged ones.

    The parameters stay frozen. Raises InputError as `merge` does.
    """
    (_merge if merge else unmerge)(model)
    for path, layer in adapted_layers(model).items():
        _replace(model, path, layer.base_layer)
    return model


_merge = merge  # under a name that unload's argument does not hide


def _refuse_merged(model: nn.Module) -> None:
    if any(layer.merged for layer in adapted_layers(model).values()):
        raise InputError("the adapters are merged into the weights: call unmerge(model) first")


# --- parameters ------------------------------------------------------------------------------------------------------


def adapter_parameters(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """The adapter's parameters by `<path of the layer>.lora_A`, `.lora_B` and so on, in the model's order.

    Raises InputError where the model has no such adapter.
    """
    return {
        f"{path}.{key}": parameter
        for path, adapter in adapters_named(model, name).items()
        for key, parameter in adapter.named_parameters()
    }


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that requires a gradient, by path, in the model's order."""
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
