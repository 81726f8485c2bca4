"""Adapters on a whole model, any nn.Module: put on, named, chosen, switched off, taken off again."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise, permutations
from typing import Any, cast

import torch
from torch import nn

from minilora.adapters.adapted_module import adapted
from minilora.adapters.adapter import Adapter, AdapterConfig, adapter_class
from minilora.adapters.input_gradients import follow_checkpointing, forget_checkpointing
from minilora.adapters.layer import AdaptedLayer
from minilora.adapters.parameter_lora import parameter_updates
from minilora.adapters.resizing import forget_resizing, guard_resizing
from minilora.adapters.targets import (
    adapted_layers,
    check_every_name_matches,
    check_every_pattern_matches,
    find_targets,
    modules_before_adapters,
    with_default_targets,
)
from minilora.adapters.trained_parts import add_parts
from minilora.adapters.tying import check_tie
from minilora.errors import InputError
from minilora.nf4 import NF4Linear
from minilora.progress import with_progress

BASE = "__base__"  # stands for no adapter in a mixed batch, as in PEFT


def add_adapter(model: nn.Module, config: AdapterConfig, name: str = "default") -> None:
    """Put a new adapter on every targeted layer and make it the active one; the first adapter freezes the model.

    Args:
        model: any nn.Module, changed in place.
        config: the method, such as `LoRAConfig`, with the layers to adapt.
        name: what to call it; a word without dots.

    Raises:
        InputError: for a name in use, a target that matches nothing or cannot take the adapter, and a merged model. The
            model is then unchanged.
    """
    if not isinstance(config, AdapterConfig):
        kind = f"{type(config).__module__}.{type(config).__name__}"
        raise InputError(f"a {kind} is no configuration of an adapter: give one of minilora's, such as LoRAConfig")
    config = with_default_targets(model, config)
    check_every_name_matches(model, config)
    check_new_name(model, name)
    targets = find_targets(model, config)
    check_every_pattern_matches(model, config, targets)
    adapters = build_adapters(model, config, targets)
    check_tie(model, config, adapters)
    attach(model, adapters, name)


def build_adapters(model: nn.Module, config: AdapterConfig, targets: list[str]) -> dict[str, Adapter]:
    """By path an adapter for each of these layers, on its device, and what else the configuration trains."""
    variant = adapter_class(config)
    modules = modules_before_adapters(model)
    bases = {path: modules[path] for path in targets}
    shared = variant.share(config, bases)
    adapters: dict[str, Adapter] = {}
    # a start like PiSSA's decomposes every weight: it takes a while
    for path, base in with_progress(bases.items(), len(bases), "Making adapters", "layers"):
        adapters[path] = variant.build(base, config, path, shared)
    adapters |= parameter_updates(model, config)
    add_parts(model, config, adapters)
    for path, adapter in adapters.items():
        adapter.to(_device(modules[path])).train(modules[path].training)
    return adapters


def _device(layer: nn.Module) -> torch.device:
    """Where the layer's weight lies, or where accelerate fetches it to for each call; a packed one is a buffer."""
    hook: Any = getattr(layer, "_hf_hook", None)
    if getattr(hook, "offload", False):
        return torch.device(hook.execution_device)
    return next(itertools.chain(layer.parameters(), layer.buffers())).device


def attach(model: nn.Module, adapters: Mapping[str, Adapter], name: str) -> None:
    """Put these adapters on the layers at their paths under one name, and make it the active one."""
    check_new_name(model, name)
    refuse_merged(model)
    refuse_switched_off(model, f"{name!r} is added")
    for path, adapter in adapters.items():
        layer = model.get_submodule(path)
        if isinstance(layer, AdaptedLayer) and adapter.base_for(layer.base_layer) is not layer.base_layer:
            raise InputError(
                f"{path} has an adapter, and {name!r} would change the layer under it: unload(model) first"
            )
    outer_first = sorted({*adapters, *adapted_layers(model)})
    for path, inside in pairwise(outer_first):
        if inside.startswith(f"{path}."):
            raise InputError(f"{path} has an adapter, and so would {inside} inside it: adapt one of them")
    with _as_before_on_failure(model, adapters, name):
        if not adapter_names(model):
            model.requires_grad_(False)
        for path, adapter in adapters.items():
            layer = model.get_submodule(path)
            if not isinstance(layer, AdaptedLayer):
                layer = adapted(adapter.base_for(layer))
                replace_module(model, path, layer)
                if isinstance(layer.base_layer, NF4Linear):
                    _have_it_called(model, path)
            layer.adapters[name] = adapter
        follow_checkpointing(model)
        guard_resizing(model)
        set_adapter(model, name)


@contextmanager
def _as_before_on_failure(model: nn.Module, paths: Iterable[str], name: str) -> Iterator[None]:
    """Where adding this adapter at these paths fails inside the `with`, the model is what it was."""
    layers = {path: model.get_submodule(path) for path in paths}
    active = [(layer, layer.active) for layer in adapted_layers(model).values()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        yield
    except BaseException:
        for path, layer in layers.items():
            if not isinstance(layer, AdaptedLayer):
                replace_module(model, path, layer)
            elif name in layer.adapters:
                del layer.adapters[name]
        for layer, names in active:
            layer.active = names
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        raise


def replace_adapters(model: nn.Module, adapters: Mapping[str, Adapter], name: str) -> None:
    """Put these adapters in the place of those of this name; a layer left without any adapter is plain again."""
    refuse_merged(model)
    for path, layer in adapted_layers(model).items():
        if path in adapters:
            layer.adapters[name] = adapters[path].requires_grad_(name in layer.active)
        elif name in layer.adapters:
            del layer.adapters[name]
            if not layer.adapters:
                replace_module(model, path, layer.base_layer)


def _have_it_called(model: nn.Module, path: str) -> None:
    """A weight in 4 bits cannot be read, as torch's TransformerEncoder does: but where there is a hook, it calls."""
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer):
        model.get_submodule(path).register_forward_hook(_nothing)
        for encoder in model.modules():
            if isinstance(encoder, nn.TransformerEncoder) and any(parent is layer for layer in encoder.layers):
                encoder.use_nested_tensor = False  # the same numbers, padding computed too


def _nothing(layer: nn.Module, args: Any, output: Any) -> None:
    """What the hook does."""


def check_new_name(model: nn.Module, name: str) -> None:
    if not isinstance(name, str):
        raise InputError(f"an adapter's name is a word, not {name!r}")
    if name in adapter_names(model):
        raise InputError(f"the model already has an adapter named {name!r}; choose another name or unload() first")
    if not name or "." in name or name == BASE or hasattr(nn.ModuleDict(), name):
        raise InputError(f"{name!r} cannot name an adapter: use a word without dots")


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put it in the place of the module at this path, under every name that the model has for that one."""
    old = model.get_submodule(path)
    places = [(parent, child) for parent in model.modules() for child, other in parent._modules.items() if other is old]
    for parent, child in places:
        setattr(parent, child, module)


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters on the model, sorted.

    Args:
        model: any nn.Module.

    Returns:
        The names, active or not; [] where the model has no adapter.
    """
    return sorted({name for layer in adapted_layers(model).values() for name in layer.adapters})


def adapters_named(model: nn.Module, name: str) -> dict[str, Adapter]:
    """The adapters of this name by the path of their layer, in the model's order; InputError where there are none."""
    check_names(model, [name])
    layers = adapted_layers(model).items()
    return {path: cast(Adapter, layer.adapters[name]) for path, layer in layers if name in layer.adapters}


def set_adapter(model: nn.Module, names: str | list[str]) -> None:
    """Make these adapters, and no others, act and train; the updates of several add up.

    Args:
        model: a model with adapters.
        names: one name or several, in the order in which the adapters are applied; [] for the base model.

    Raises:
        InputError: for a name that the model does not have or that is given twice, for several of which one replaces
            what the others change, and on a merged model.
    """
    names = [names] if isinstance(names, str) else list(names)
    check_names(model, names)
    if len(set(names)) < len(names):
        raise InputError(f"{names} has a name twice, whose update would count twice: give each once")
    refuse_merged(model)
    layers = adapted_layers(model)
    for path, layer in layers.items():
        together = [name for name in names if name in layer.adapters]
        adapters = [cast(Adapter, layer.adapters[name]) for name in together]
        if any(one.excludes(other) for one, other in permutations(adapters, 2)):
            raise InputError(f"{together} cannot act together: one of them puts a {path} in the place of all else")
    for layer in layers.values():
        layer.active = list(names)
        for name, adapter in layer.adapters.items():
            adapter.requires_grad_(name in names)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Take this adapter off and forget it; a layer without any other is the plain layer again.

    The other active adapters stay active; where it was the only one, the model is the base model until `set_adapter`.

    Args:
        model: a model with adapters.
        name: which one.

    Raises:
        InputError: for a name that the model does not have, inside an `adapters_for_rows` that uses it, and where
            it is merged.
    """
    check_names(model, [name])
    layers = adapted_layers(model)
    if any(name in layer.merged and name in layer.adapters for layer in layers.values()):
        raise InputError(f"{name!r} is merged into the weights: call unmerge(model) first")
    if any(layer.row_names and name in layer.row_names.names for layer in layers.values()):
        raise InputError(f"{name!r} is in use for rows of a batch: delete it after `with adapters_for_rows(...)`")
    for path, layer in layers.items():
        layer.active = [other for other in layer.active if other != name]
        if name in layer.adapters:
            del layer.adapters[name]
        if not layer.adapters:
            replace_module(model, path, layer.base_layer)
    if not any(layer.adapters for layer in layers.values()):
        forget_checkpointing(model)
        forget_resizing(model)


def check_names(model: nn.Module, names: list[str]) -> None:
    existing = adapter_names(model)
    for name in names:
        if name not in existing:
            has = f"it has {existing}" if existing else "it has none yet: add_adapter or load_adapter puts one on"
            raise InputError(f"the model has no adapter named {name!r}; {has}")


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the `with` the model is the base model, merged or not, at no cost in compute or memory.

    Args:
        model: a model with or without adapters.
    """
    layers = list(adapted_layers(model).values())
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def refuse_switched_off(model: nn.Module, before: str) -> None:
    """Raise InputError inside `disable_adapters`, which is to be left before what the words say."""
    if not all(layer.enabled for layer in adapted_layers(model).values()):
        raise InputError(f"adapters are switched off here: leave disable_adapters before {before}")


def refuse_merged(model: nn.Module) -> None:
    if any(layer.merged for layer in adapted_layers(model).values()):
        raise InputError("the adapters are merged into the weights: call unmerge(model) first")
