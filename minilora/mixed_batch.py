"""A mixed batch: each row of it with an adapter of its own, or with none.

    names   fr     de     __base__   fr
    y       W x₀   W x₁   W x₂       W x₃        one product for all rows
          + ΔW x₀  ΔW x₁             ΔW x₃       fr's ΔW for rows 0 and 3, de's for row 1

What one layer does with it is `AdaptedLayer.row_by_row`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from minilora.adapted_layer import AdaptedLayer
from minilora.adapters import BASE, adapted_layers, check_names, refuse_merged
from minilora.errors import InputError


class RowNames:
    """The name of the adapter that each row of the batch uses; one object for all layers of a model."""

    def __init__(self, names: Sequence[str], layers: dict[str, AdaptedLayer]) -> None:
        self._layers = layers
        self.names = list(names)
        self._rows: dict[torch.device, dict[str, Tensor]] = {}  # made once for all layers on a device

    def use(self, names: Sequence[str]) -> None:
        """From now on the batch has these rows, in this order; the names must be among those given at first."""
        if list(names) != self.names:
            self.names, self._rows = list(names), {}

    def rows(self, x: Tensor, layer: AdaptedLayer) -> dict[str, Tensor]:
        """{name: numbers of its rows, int64 on the device of x}.

        Raises InputError where x (rows, …), the input of this layer, has another number of rows, and on a merged layer.
        """
        if layer.merged:
            raise InputError(f"{layer.merged} are merged into {self.path(layer)}: call unmerge(model) first")
        if len(x) != len(self.names):
            raise InputError(
                f"{self.path(layer)}: its input of shape {tuple(x.shape)} has {len(x)} rows, and names were given for"
                f" {len(self.names)}: a mixed batch takes a name for each row, in layers that see the batch row by row"
            )
        if x.device not in self._rows:
            numbers: dict[str, list[int]] = {}
            for row, name in enumerate(self.names):
                numbers.setdefault(name, []).append(row)
            self._rows[x.device] = {name: torch.tensor(rows, device=x.device) for name, rows in numbers.items()}
        return self._rows[x.device]

    def path(self, layer: AdaptedLayer) -> str:
        """Where the layer is in the model."""
        return next(path for path, other in self._layers.items() if other is layer)


@contextmanager
def adapters_for_rows(model: nn.Module, names: Sequence[str]) -> Iterator[RowNames]:
    """Inside the `with`, row i of the batch goes through the adapter names[i] alone, "__base__" through none.

    names: one for each row of what the model is called with, along the first dimension; for a generate that multiplies
    the rows (beams, several answers to a prompt), one for each row that it makes. Which adapters are active does not
    matter; gradients reach those that train, which `set_adapter` decides. With gradient checkpointing, call backward
    inside the `with` too: outside PyTorch raises an error, or with use_reentrant=True gives wrong gradients.
    Raises InputError for a name that the model does not have and on a merged model; and, from the model, where a layer
    with adapters sees another number of rows (an expert of a Mixture-of-Experts is given tokens from all of them), or
    a module that an adapter has a copy of takes more than one input.
    """
    if isinstance(names, str):
        raise InputError(f"adapters_for_rows takes one name for each row of the batch, a list, not {names!r}")
    check_names(model, sorted(set(names) - {BASE}))
    refuse_merged(model)
    layers = adapted_layers(model)
    before = [layer.row_names for layer in layers.values()]
    row_names = RowNames(names, layers)
    try:
        for layer in layers.values():
            layer.row_names = row_names
        yield row_names
    finally:
        for layer, previous in zip(layers.values(), before, strict=True):
            layer.row_names = previous


def refuse_row_names(model: nn.Module) -> None:
    """Raise InputError inside `adapters_for_rows`: for functions that make batches of rows in an order of their own."""
    if any(layer.row_names is not None for layer in adapted_layers(model).values()):
        raise InputError(
            "inside adapters_for_rows the rows must stay in order, and here they are batched in another one: leave the"
            " `with` first; generate takes adapter_names=[...] instead"
        )
