"""Which layers of a model a configuration means, matched by PEFT's rules."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from difflib import get_close_matches

from torch import nn

from minilora.adapters.adapter import AdapterConfig, ends_with
from minilora.adapters.default_targets import DEFAULT_TARGETS
from minilora.adapters.layer import AdaptedLayer
from minilora.adapters.layer_kinds import kind_of
from minilora.errors import InputError

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # of torch.compile, FSDP, checkpoints


def name_of(path: str) -> str:
    """The path without what the wrappers of a block put into it; `get_submodule` finds the module by it too."""
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def named_modules(model: nn.Module, every_name: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """The modules without wrappers, by `name_of` their path; a module with several names by the first, or by each."""
    for path, module in model.named_modules(remove_duplicate=not every_name):
        if not any(wrapper in module._modules for wrapper in WRAPPERS):
            yield name_of(path), module


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Every AdaptedLayer of the model, by path."""
    return {path: module for path, module in named_modules(model) if isinstance(module, AdaptedLayer)}


def modules_before_adapters(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by path, without the root, adapted layers as the layers that they were, nothing from inside them."""
    found: dict[str, nn.Module] = {}
    inside: str | None = None  # the adapted layer before, whose own modules follow it
    for path, module in named_modules(model):
        if not path or (inside is not None and path.startswith(inside)):
            continue
        inside = f"{path}." if isinstance(module, AdaptedLayer) else None
        found[path] = module.base_layer if isinstance(module, AdaptedLayer) else module
    return found


def other_names(model: nn.Module) -> dict[str, list[str]]:
    """Of a module that the model has under several names: the first, to the others."""
    first: dict[nn.Module, str] = {}
    others: dict[str, list[str]] = {}
    for path, module in named_modules(model, every_name=True):
        if first.setdefault(module, path) != path:
            others.setdefault(first[module], []).append(path)
    return others


def input_embedding(model: nn.Module) -> str | None:
    """The path of the layer that the token ids go into, where the model can tell."""
    get = getattr(model, "get_input_embeddings", None)  # every transformers model has it
    if get is not None:
        try:
            return _path_of(model, get())
        except NotImplementedError:  # of sounds or images
            return None
    paths = [path for path in modules_before_adapters(model) if matches(["embed_tokens"], path)]
    return paths[0] if paths else None


def output_head(model: nn.Module) -> str | None:
    """The path of the layer that gives the logits, where the model can tell."""
    get = getattr(model, "get_output_embeddings", None)
    return _path_of(model, get() if get is not None else getattr(model, "lm_head", None))


def _path_of(model: nn.Module, layer: nn.Module | None) -> str | None:
    return next((path for path, module in named_modules(model) if module is layer), None)


def tied_pair(model: nn.Module) -> tuple[str, str] | None:
    """The paths of the input embedding and of the output head where they have one weight."""
    modules, embedding, head = modules_before_adapters(model), input_embedding(model), output_head(model)
    if embedding == head or embedding not in modules or head not in modules:
        return None
    tied = getattr(modules[head], "weight", None) is getattr(modules[embedding], "weight", modules)
    return (embedding, head) if tied else None


def tied_layers(model: nn.Module) -> list[str]:
    """The paths of all layers that have the input embedding's weight, it and other embeddings first; [] of it alone."""
    modules = modules_before_adapters(model)
    embedding = modules.get(input_embedding(model) or "")
    W = None if embedding is None else embedding._parameters.get("weight")
    same = [path for path, module in modules.items() if W is not None and module._parameters.get("weight") is W]
    same.sort(key=lambda path: not isinstance(modules[path], nn.Embedding))
    return same if len(same) > 1 else []


def embeddings_in_place_of(model: nn.Module, path: str) -> list[str]:
    """The embeddings that a transformers model calls in the place of the one at this path, whose weight is theirs.

    T5 and BART have a `shared` that holds the weight, and is called by nobody.
    """
    modules, tied = modules_before_adapters(model), getattr(model, "all_tied_weights_keys", {})
    users = [name_of(target).removesuffix(".weight") for target, source in tied.items() if source == f"{path}.weight"]
    return [user for user in users if isinstance(modules.get(user), nn.Embedding)]


def ensures_tying(config: AdapterConfig) -> bool:
    return bool(getattr(config, "ensure_weight_tying", False))


def layers_to_tie(model: nn.Module, config: AdapterConfig) -> list[str]:
    """The tied layers, where the configuration asks that what trains of them trains as one."""
    return tied_layers(model) if ensures_tying(config) else []


def _model_type(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def with_default_targets(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """The configuration; where it names nothing to adapt, with the layers that are usual in this type of model."""
    names = DEFAULT_TARGETS.get(_model_type(model) or "")
    if names is None or config.target_modules is not None or getattr(config, "target_parameters", None):
        return config
    return replace(config, target_modules=names)


def find_targets(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Paths of the layers that the configuration targets, in the model's order, matched by PEFT's rules.

    "all-linear" is every linear layer but the output head (`get_output_embeddings()` or `lm_head`; for task_type
    "SEQ_CLS" without one, `score` or `classifier`). Experts that are one tensor are no layers; PEFT adds those of some
    models, here target_parameters names them. Raises InputError where nothing matches, naming the nearest names, or a
    match cannot take an adapter.
    """
    modules = modules_before_adapters(model)
    kinds = {path: kind for path, module in modules.items() if (kind := kind_of(module)) is not None}
    targets = config.target_modules
    if not targets and getattr(config, "target_parameters", None):
        return []
    if not targets:
        of_type = f", since there is no default for {_model_type(model)!r}" if _model_type(model) else ""
        raise InputError(f'name the layers to adapt in target_modules, or pass target_modules="all-linear"{of_type}')
    if isinstance(targets, str) and targets.lower() == "all-linear":
        left_out = _heads(model, config)
        linear = [path for path, kind in kinds.items() if kind.is_linear]
        matched = [path for path in linear if path not in left_out]
    else:
        others = other_names(model)
        matched = [
            path for path in modules if any(_is_targeted(config, each) for each in (path, *others.get(path, ())))
        ]
    if not matched:
        blocks = "" if config.layers_to_transform is None else f" in the blocks {config.layers_to_transform}"
        raise InputError(f"target_modules={targets!r} matches no layer{blocks}; {nearest_names(targets, list(kinds))}")
    excluded, saved = config.exclude_modules or [], _names_to_save(config)
    found = [
        path for path in matched
        if not matches(excluded, path) and not any(f".{name}." in f".{path}." for name in saved)
    ]  # fmt: skip
    found = _with_tied(model, config, found)
    if not found:
        keys = [key for key in ("exclude_modules", "modules_to_save") if getattr(config, key)]
        named = " and ".join(f"{key}={getattr(config, key)!r}" for key in keys)
        raise InputError(f"{named} excludes every layer that target_modules matches")
    for path in found:
        _check_can_be_adapted(modules, path)
        _check_is_called(model, config, path)
    _check_nothing_is_hidden(model, config)
    return found


def _check_can_be_adapted(modules: dict[str, nn.Module], path: str) -> None:
    if type(modules[path]).__module__.startswith("peft."):
        raise InputError(f"target_modules matches {path}, an adapter of PEFT: take it off with peft_model.unload()")
    if kind_of(modules[path]) is None:
        matrices = [name for name, value in modules[path].named_parameters(recurse=False) if value.dim() in (2, 3)]
        hint = f"; its {' and '.join(matrices)} can, named in target_parameters" if matrices else ""
        raise InputError(
            f"target_modules matches {path}, a {type(modules[path]).__name__}: only linear layers, embeddings and"
            f" convolutions can take an adapter{hint}"
        )


def _check_is_called(model: nn.Module, config: AdapterConfig, path: str) -> None:
    users = embeddings_in_place_of(model, path)
    if users and path not in layers_to_tie(model, config):
        raise InputError(
            f"{path} holds a weight and is called by nobody: name {' and '.join(users)}, which have it too, or add"
            " ensure_weight_tying=True"
        )


def _check_nothing_is_hidden(model: nn.Module, config: AdapterConfig) -> None:
    """A layer inside a module of which another adapter has a copy would silently be left out."""
    by_name = str(config.target_modules).lower() != "all-linear"
    for path, wrapper in adapted_layers(model).items():
        for name, module in wrapper.base_layer.named_modules() if wrapper.any_module else ():
            kind, inside = kind_of(module), f"{path}.{name}"
            targeted = _is_targeted(config, inside) if by_name else kind is not None and kind.is_linear
            if targeted and not matches(config.exclude_modules or [], inside):
                raise InputError(f"target_modules matches {inside}, and another adapter has its own {path}: exclude it")


def _with_tied(model: nn.Module, config: AdapterConfig, paths: list[str]) -> list[str]:
    """The paths; with ensure_weight_tying, where one of them is of a tied layer, also the others."""
    tied = layers_to_tie(model, config)
    if not any(path in paths for path in tied):
        return paths
    return [path for path in modules_before_adapters(model) if path in paths or path in tied]


def _is_targeted(config: AdapterConfig, path: str) -> bool:
    """PEFT's rule: a whole path in the list is meant in any block, the end of one in layers_to_transform only."""
    targets, blocks = config.target_modules or [], config.layers_to_transform
    if not matches(targets, path):
        return False
    if isinstance(targets, str) or path in targets or blocks is None or blocks == []:
        return True
    return block_number(config, path) in ([blocks] if isinstance(blocks, int) else blocks)


def block_number(config: AdapterConfig, path: str) -> int | None:
    """The number of the block that the path lies in: the first one after a name of layers_pattern, or after any."""
    names = config.layers_pattern or []
    for name in [names] if isinstance(names, str) else names:
        if match := re.search(rf"(?:^|\.){name}\.(\d+)\.", path):
            return int(match[1])
    match = None if names else re.search(r"(?:^|\.)[^.]*\.(\d+)\.", path)
    return int(match[1]) if match else None


def matches(names: str | Iterable[str], path: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole path, a list holds paths or ends of paths."""
    if not isinstance(names, str):
        return any(path == name or path.endswith(f".{name}") for name in names)
    try:
        return re.fullmatch(names, path) is not None
    except re.error as error:
        raise InputError(f"{names!r} is not a regular expression ({error}); to give names, use a list") from None


def _heads(model: nn.Module, config: AdapterConfig) -> list[str]:
    """What "all-linear" leaves out."""
    head = output_head(model)
    if head is None and config.task_type == "SEQ_CLS":
        return [name for name in ("score", "classifier") if hasattr(model, name)][:1]
    return [head] if head else []


LISTS = nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict
HEADS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


def _names_to_save(config: AdapterConfig) -> list[str]:
    """modules_to_save and, as in PEFT, the new head that a task other than language modelling gives the model."""
    return [*(config.modules_to_save or []), *HEADS.get(config.task_type or "", [])]


def find_modules_to_save(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Paths of the modules whose end modules_to_save names, as in PEFT: "norm" is the end of "input_layernorm"."""
    found = [path for path in modules_before_adapters(model) if path.endswith(tuple(_names_to_save(config)))]
    found = _with_tied(model, config, found)
    for path in found:
        _check_is_called(model, config, path)
        if isinstance(module := model.get_submodule(path), LISTS):
            raise InputError(f"modules_to_save matches {path}, a {type(module).__name__}, which is not called itself")
        for other in [*found, *adapted_layers(model)]:
            if other.startswith(f"{path}."):
                raise InputError(
                    f"modules_to_save matches {path}, and {other} inside it has an adapter or is named too"
                )
    return found


# --- misspelled names ------------------------------------------------------------------------------------------------


def check_every_name_matches(model: nn.Module, config: AdapterConfig) -> None:
    """A list in which one name of several is misspelled would silently train less than was asked for."""
    paths = [*modules_before_adapters(model), *(path for paths in other_names(model).values() for path in paths)]
    for key in ("target_modules", "modules_to_save"):
        names = getattr(config, key)
        for name in [] if names is None or isinstance(names, str) else names:
            if not any(path.endswith(name) if key == "modules_to_save" else matches([name], path) for path in paths):
                what = "layer" if key == "target_modules" else "module"
                hint = _parameter_of(model, name) or nearest_names([name], paths)
                raise InputError(f"{key}: {name!r} matches no {what}; {hint}")
    blocks = config.layers_to_transform
    existing = sorted({number for path in paths if (number := block_number(config, path)) is not None})
    for number in [] if blocks is None else [blocks] if isinstance(blocks, int) else blocks:
        if number not in existing:
            pattern = f" after {config.layers_pattern!r}" if config.layers_pattern else ""
            raise InputError(f"layers_to_transform: there is no block {number}; the blocks{pattern} are {existing}")


def check_every_pattern_matches(model: nn.Module, config: AdapterConfig, targets: list[str]) -> None:
    """A misspelled pattern would silently leave the default rank or lora_alpha where another was asked for."""
    names = [f"{path}{config.pattern_suffix}" for path in targets]
    if getattr(config, "target_parameters", None):
        names += dict(model.named_parameters())
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key, None) or {}:
            if not any(ends_with(pattern, name) for name in names):
                near = nearest_names([pattern], names)
                raise InputError(f"{key}: {pattern!r} matches no layer that is adapted; {near}")


def _parameter_of(model: nn.Module, name: str) -> str | None:
    """Where a name means the weights of a Mixture-of-Experts' experts, which are one tensor, and not layers."""
    path = next((path for path, _ in model.named_parameters() if matches([name], path)), None)
    owner = path.rpartition(".")[0] if path else ""
    return f"it is a parameter of {owner}, and not a layer: name it in target_parameters" if path else None


def nearest_names(targets: str | Iterable[str], paths: list[str]) -> str:
    """The existing names nearest to the wanted ones."""
    names = sorted({path.rpartition(".")[2] for path in paths} | set(paths))
    wanted = [targets] if isinstance(targets, str) else list(targets)
    near = list(dict.fromkeys(name for want in wanted for name in get_close_matches(want, names, n=3)))
    hint = f"the nearest names are {near}" if near else f"the layers' names are {names[:12]}"
    if isinstance(targets, str):
        hint += "; a string is a regular expression for the whole name, a list holds names or ends of names"
    return hint
