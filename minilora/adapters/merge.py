"""The plain merge: adapters folded into the weights of a model, undone, and taken off with it."""

from torch import nn

from minilora.adapters.attach import adapter_names, replace_module
from minilora.adapters.input_gradients import forget_checkpointing
from minilora.adapters.resizing import forget_resizing
from minilora.adapters.targets import adapted_layers
from minilora.adapters.tying import settle_ties
from minilora.errors import InputError
from minilora.progress import with_progress


def merge(model: nn.Module, safe: bool = True) -> None:
    """Fold the active adapters into the weights, each layer W + Σ s·BA; NF4 layers become dense, never 4-bit again.

    The layers as they were are kept for `unmerge`.

    Args:
        model: a model with adapters, changed in place.
        safe: look whether each merged weight is finite; False saves the time.

    Raises:
        InputError: naming the layer, where the sum is not finite or the layer cannot be merged, and where the model has
            adapters and none of them is active. The model is then unmerged, as it was.
    """
    layers = adapted_layers(model)
    if layers and not any(layer.active for layer in layers.values()):
        raise InputError(f"no adapter is active, to be merged: set_adapter chooses among {adapter_names(model)}")
    try:
        for path, layer in with_progress(layers.items(), len(layers), "Merging", "layers"):
            layer.merge(path, safe)
    except BaseException:
        unmerge(model)
        raise


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: every layer is what it was, bit for bit.

    Args:
        model: a model, merged or not.
    """
    for layer in adapted_layers(model).values():
        layer.unmerge()


def unload(model: nn.Module, merge: bool = False) -> nn.Module:
    """Take all adapters off, in place, and return the model with plain layers: the original ones, or the merged ones.

    The parameters stay frozen. A tied pair whose merged weights differ is untied in the model's `config` too.

    Args:
        model: a model with adapters.
        merge: fold the active adapters into the weights first.

    Returns:
        The model itself.

    Raises:
        InputError: as `merge` does.
    """
    (_merge if merge else unmerge)(model)
    for path, layer in adapted_layers(model).items():
        replace_module(model, path, layer.base_layer)
    forget_checkpointing(model)
    forget_resizing(model)
    if merge:
        settle_ties(model)
    return model


_merge = merge  # under a name that unload's argument does not hide
