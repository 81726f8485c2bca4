"""Adapters on a whole model: find the targets, attach, name, switch, merge, take off again."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from torch import nn

from minilora.errors import InputError
from minilora.linear4bit import NF4Linear
from minilora.lora import LoRA, LoRAConfig, LoRALinear


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every LoRALinear of the model by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters on the model, in the order in which they were added."""
    return list(dict.fromkeys(name for layer in lora_layers(model).values() for name in layer.adapters))


def _base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules by path, each LoRALinear standing for the layer inside it."""
    layers = tuple(path + "." for path in lora_layers(model))
    return {path: m for path, m in model.named_modules() if path and not path.startswith(layers)}


def _matches(pattern: str | Iterable[str], path: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole path, a list holds paths or their ends."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, path) is not None
    return any(path == name or path.endswith("." + name) for name in pattern)


def _pattern_value(patterns: dict, path: str, default: float) -> float:
    """rank_pattern and alpha_pattern: the first pattern that the end of the path matches, else the default."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | NF4Linear | LoRALinear)


def find_targets(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Paths of the layers to adapt, in module order."""
    modules = _base_modules(model)
    target, exclude = config.target_modules, config.exclude_modules
    if target is None:
        raise InputError("LoRAConfig: name the layers to adapt in target_modules, or pass 'all-linear'")
    if isinstance(target, str) and target.lower() == "all-linear":
        get_head = getattr(model, "get_output_embeddings", None)
        head = get_head() if get_head else getattr(model, "lm_head", None)
        found = [path for path, module in modules.items() if _is_linear(module) and module is not head]
    else:
        found = [path for path in modules if _matches(target, path)]
    if exclude:
        found = [path for path in found if not _matches(exclude, path)]
    if not found:
        names = sorted({path.rpartition(".")[2] for path, module in modules.items() if _is_linear(module)})
        wanted = [target] if isinstance(target, str) else list(target)
        near = [name for want in wanted for name in get_close_matches(want, names, n=3)] or names
        raise InputError(f"target_modules={target!r} matches no layer; the nearest names are {near}")
    for path in found:
        if not _is_linear(modules[path]):
            raise InputError(
                f"target {path} is a {type(modules[path]).__name__}: only linear layers take LoRA"
            )
    return found


def add_adapter(model: nn.Module, config: LoRAConfig, name: str = "default") -> None:
    """Put a LoRA on every layer that the configuration names, freeze the rest, and make it the active one."""
    if name in adapter_names(model):
        raise InputError(f"the model already has an adapter named {name!r}")
    targets = find_targets(model, config)
    model.requires_grad_(False)
    for path in targets:
        layer = model.get_submodule(path)
        if not isinstance(layer, LoRALinear):
            parent, _, child = path.rpartition(".")
            layer = LoRALinear(layer)
            setattr(model.get_submodule(parent), child, layer)
        base = layer.base_layer
        r = int(_pattern_value(config.rank_pattern, path, config.r))
        alpha = _pattern_value(config.alpha_pattern, path, config.lora_alpha)
        adapter = LoRA(base.in_features, base.out_features, config, r, alpha)
        layer.adapters[name] = adapter.to(base.weight.device)
    set_adapter(model, name)


def set_adapter(model: nn.Module, names: str | list[str]) -> None:
    """Make these adapters, and no others, the ones that act and train; several add up."""
    names = [names] if isinstance(names, str) else list(names)
    existing = adapter_names(model)
    for name in names:
        if name not in existing:
            raise InputError(f"no adapter named {name!r}; the model has {existing}")
    for layer in lora_layers(model).values():
        layer.active = [name for name in names if name in layer.adapters]
        for name, adapter in layer.adapters.items():
            adapter.requires_grad_(name in names)


def adapter_parameters(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """The adapter's parameters by `<path>.lora_A` and `<path>.lora_B`."""
    return {
        f"{path}.{key}": parameter
        for path, layer in lora_layers(model).items()
        if name in layer.adapters
        for key, parameter in layer.adapters[name].named_parameters()
    }


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that requires a gradient, by its path."""
    return {path: parameter for path, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, the model is the base model, merged or not."""
    layers = list(lora_layers(model).values())
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def merge(model: nn.Module) -> None:
    """Fold the active adapters into the weights; NF4 layers become dense ones."""
    layers = lora_layers(model)
    try:
        for path, layer in layers.items():
            layer.merge(path)
    except InputError:
        unmerge(model)
        raise


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: every layer is again what it was, bit for bit."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def unload(model: nn.Module, merge: bool = False) -> nn.Module:
    """Take the adapters off and leave plain layers: the original ones, or with `merge=True` the merged ones."""
    if merge:
        globals()["merge"](model)
    else:
        unmerge(model)
    for path, layer in lora_layers(model).items():
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)
    return model
