"""A mixed batch: each row of it with an adapter of its own, or with none.

    names   fr     de     __base__   fr
    y       W x₀   W x₁   W x₂       W x₃        one product for all rows
          + ΔW x₀  ΔW x₁             ΔW x₃       fr's ΔW for rows 0 and 3, de's for row 1

What one layer does with it is `AdaptedLayer.row_by_row`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from minilora.adapters.attach import BASE, check_names, refuse_merged
from minilora.adapters.row_names import RowNames
from minilora.adapters.targets import adapted_layers
from minilora.errors import InputError


@contextmanager
def adapters_for_rows(model: nn.Module, names: Sequence[str]) -> Iterator[RowNames]:
    """Inside the `with`, row i of the batch goes through the adapter names[i] alone, "__base__" through none.

    Which adapters are active does not matter; gradients reach those that train, which `set_adapter` decides. With
    gradient checkpointing, call backward inside the `with` too: outside PyTorch fails, or with use_reentrant=True gives
    wrong gradients.

    Args:
        model: a model with adapters.
        names: one for each row of what the model is called with, along the first dimension; for a generate that
            multiplies the rows (beams, several answers to a prompt), one for each row that it makes.

    Yields:
        The names of the rows, of which `use` takes other ones for a next batch.

    Raises:
        InputError: for a name that the model does not have, and on a merged model. And from the model inside, where a
            layer with adapters sees another number of rows (an expert of a Mixture-of-Experts is given tokens from all
            of them), or a module that an adapter has a copy of takes more than one input.
    """
    if isinstance(names, str):
        raise InputError(f"adapters_for_rows takes one name for each row of the batch, a list, not {names!r}")
    check_names(model, sorted(set(names) - {BASE}))
    refuse_merged(model)
    layers = adapted_layers(model)
    before = [layer.row_names for layer in layers.values()]
    has_encoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    row_names = RowNames(names, layers, has_encoder)
    try:
        for layer in layers.values():
            layer.row_names = row_names
        yield row_names
    finally:
        for layer, previous in zip(layers.values(), before, strict=True):
            layer.row_names = previous
