"""The scaling of an adapter changed after the fact: less of it, or more."""

import math
from dataclasses import replace
from typing import Any

from torch import nn

from minilora.adapters.attach import adapters_named, refuse_merged
from minilora.errors import InputError


def scale_adapter(model: nn.Module, factor: float, name: str = "default") -> None:
    """Multiply an adapter's scaling, the s of s·BA, by a factor, from now on and in what is saved.

    lora_alpha, or alpha, becomes as much larger, so that a folder says what is computed. Again with 1 / factor it is
    what it was. A model that is compiled is compiled again.

    Args:
        model: a model with the adapter, not merged.
        factor: above 0; below 1 for less of what the adapter has learnt. Without any of it, `set_adapter` others.
        name: which adapter.

    Raises:
        InputError: for a merged model, and for an adapter that has more than scaled updates, naming the layer: copies
            of modules, rows, biases, (IA)³, VeRA, and a start such as PiSSA's, which a file derives from the scaling.
            Nothing is changed then.

    Source: PEFT's `LoraLayer.scale_layer`, which leaves embeddings out and what is saved as it was.
    """
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise InputError(f"scale_adapter multiplies by a number above 0, not by {factor!r}")
    adapters = adapters_named(model, name)
    refuse_merged(model)
    holders: list[Any] = []
    for path, adapter in adapters.items():
        own = [module for module in adapter.modules() if "scaling" in vars(module)]
        has_bias = adapter._parameters["bias"] is not None
        if has_bias or not (own or adapter.borrowed_parameters()):
            raise InputError(f"{name!r} has more than a scaled update: a {type(adapter).__name__} on {path}")
        if getattr(adapter, "start_A", None) is not None:
            raise InputError(
                f"{path}: {name!r} starts from the base's own weights, for its scaling: save_adapter(..., as_lora=True)"
                " and load that one"
            )
        holders += own
    config = next(iter(adapters.values())).config
    alpha = "lora_alpha" if hasattr(config, "lora_alpha") else "alpha"
    if getattr(config, alpha) <= 0:
        raise InputError(f"{name!r} has {alpha}={getattr(config, alpha)!r}: there is nothing to multiply")
    pattern = {key: factor * value for key, value in config.alpha_pattern.items()}
    config = replace(config, **{alpha: factor * getattr(config, alpha), "alpha_pattern": pattern})
    for adapter in adapters.values():
        adapter.config = config
    for holder in holders:
        holder.scaling *= factor
        if "lora_alpha" in vars(holder):
            holder.lora_alpha *= factor
