"""transformers' resize_token_embeddings of a model whose embedding or head has an adapter: refused before a change.

transformers puts another layer in the place of the embedding, and of the head where it can: an adapter of one of them
would be lost or fit no more, and of a pair only half would be resized.
"""

import math
from types import MethodType
from typing import Any

from torch import nn

from minilora.adapters.layer import AdaptedLayer
from minilora.adapters.targets import adapted_layers
from minilora.errors import InputError

RESIZE = "resize_token_embeddings"


def guard_resizing(model: nn.Module) -> None:
    """Have every transformers model in this one look at its adapters before it is resized."""
    for module in model.modules():
        if hasattr(type(module), RESIZE) and not _is_guarded(module):
            setattr(module, RESIZE, MethodType(resize_token_embeddings, module))


def forget_resizing(model: nn.Module) -> None:
    """Undo it."""
    for module in model.modules():
        if _is_guarded(module):
            delattr(module, RESIZE)


def _is_guarded(module: nn.Module) -> bool:
    return getattr(vars(module).get(RESIZE), "__func__", None) is resize_token_embeddings


# Under the name of what it stands for, by which a pickled model finds the model's own again.
def resize_token_embeddings(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
) -> Any:
    """What the model's class does, where no layer that it would resize has an adapter."""
    embedding = model.get_input_embeddings()
    resized = [_base(layer) for layer in (embedding, model.get_output_embeddings()) if layer is not None]
    adapted = [path for path, layer in adapted_layers(model).items() if _holds(layer.base_layer, resized)]
    if not adapted:
        return type(model).resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, *args, **kwargs)
    wanted = new_num_tokens if new_num_tokens is not None else len(resized[0].weight)
    if pad_to_multiple_of:
        wanted = math.ceil(wanted / pad_to_multiple_of) * pad_to_multiple_of
    if {len(layer.weight) for layer in resized} == {wanted}:
        return embedding
    raise InputError(
        f"the adapters on {' and '.join(adapted)} are for {len(resized[0].weight)} tokens: resize the model before"
        " add_adapter, or take them off before: unload(model), or unload(model, merge=True) with what they have learnt"
    )


def _base(layer: Any) -> Any:
    return layer.base_layer if isinstance(layer, AdaptedLayer) else layer


def _holds(module: nn.Module, layers: list[Any]) -> bool:
    """True if one of the layers is in the module, or its weight is."""
    return any(
        inner is layer or inner._parameters.get("weight", 0) is layer._parameters.get("weight")
        for inner in module.modules()
        for layer in layers
    )
