"""Which adapter each row of a mixed batch uses."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from minilora.errors import InputError


class RowNames:
    """The name of the adapter that each row of the batch uses; one object for all layers of a model."""

    def __init__(self, names: Sequence[str], layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self.names = list(names)
        self._rows: dict[torch.device, dict[str, Tensor]] = {}  # made once for all layers on a device

    def use(self, names: Sequence[str]) -> None:
        """From now on the batch has these rows, in this order; the names must be among those given at first."""
        if list(names) != self.names:
            self.names, self._rows = list(names), {}

    def rows(self, x: Tensor, layer: nn.Module) -> dict[str, Tensor]:
        """{name: numbers of its rows, int64 on the device of x}, for x (rows, …), the input of this layer."""
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

    def path(self, layer: nn.Module) -> str:
        """Where the layer is in the model."""
        return next(path for path, other in self._layers.items() if other is layer)
