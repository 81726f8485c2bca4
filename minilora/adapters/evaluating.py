"""For functions that batch rows in an order of their own: evaluation mode, and no adapters chosen row by row."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from minilora.adapters.targets import adapted_layers
from minilora.errors import InputError
from minilora.torch_helpers import in_mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the `with`; afterwards each module is in the mode that it was in."""
    refuse_row_names(model)
    with in_mode(model, training=False):
        yield


def refuse_row_names(model: nn.Module) -> None:
    """Raise InputError inside `adapters_for_rows`, whose names are for rows in the order of the batch."""
    if any(layer.row_names is not None for layer in adapted_layers(model).values()):
        raise InputError(
            "inside adapters_for_rows the rows must stay in order, and here they are batched in another one: leave the"
            " `with` first; generate takes adapter_names=[...] instead"
        )
