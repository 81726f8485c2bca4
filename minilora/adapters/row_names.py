"""Which adapter each row of a mixed batch uses."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from minilora.errors import InputError


class RowNames:
    """The name of the adapter that each row of the batch uses; one object for all layers of a model."""

    def __init__(self, names: Sequence[str], layers: Mapping[str, nn.Module], has_encoder: bool) -> None:
        self._layers, self._has_encoder = layers, has_encoder
        self.names = list(names)
        self._rows: dict[tuple[torch.device, int], dict[str, Tensor]] = {}  # made once for all layers on a device

    def use(self, names: Sequence[str]) -> None:
        """From now on the batch has these rows, in this order; the names must be among those given at first."""
        if list(names) != self.names:
            self.names, self._rows = list(names), {}

    def rows(self, x: Tensor, layer: nn.Module) -> dict[str, Tensor]:
        """{name: numbers of its rows, int64 on the device of x}, for x (rows, …), the input of this layer."""
        if layer.merged:
            raise InputError(f"{layer.merged} are merged into {self.path(layer)}: call unmerge(model) first")
        names = self.names
        if self._has_encoder and x.dim() >= (3 if x.is_floating_point() else 2):
            names = _one_of_each_block(names, len(x))
        if len(x) != len(names):
            raise InputError(
                f"{self.path(layer)}: its input of shape {tuple(x.shape)} has {len(x)} rows, and names were given for"
                f" {len(self.names)}: a mixed batch takes a name for each row, in layers that see the batch row by row"
            )
        key = x.device, len(x)
        if key not in self._rows:
            numbers: dict[str, list[int]] = {}
            for row, name in enumerate(names):
                numbers.setdefault(name, []).append(row)
            self._rows[key] = {name: torch.tensor(rows, device=x.device) for name, rows in numbers.items()}
        return self._rows[key]

    def path(self, layer: nn.Module) -> str:
        """Where the layer is in the model."""
        return next(path for path, other in self._layers.items() if other is layer)


def _one_of_each_block(names: list[str], rows: int) -> list[str]:
    """The names of so many rows, where each stands in a block of equal ones; else all of them.

    Beam search multiplies the rows of a decoder, and an encoder has run before that.
    """
    size = max(1, len(names) // max(1, rows))
    blocks = [names[i : i + size] for i in range(0, len(names), size)]
    return [block[0] for block in blocks] if all(len({*block}) == 1 for block in blocks) else names
