"""A model put into evaluation mode for functions that batch rows in an order of their own."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from minilora.adapters.mixed_batch import refuse_row_names
from minilora.torch_helpers import in_mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the `with`; afterwards each module is in the mode that it was in.

    For what puts rows into batches in an order of its own: raises InputError inside `adapters_for_rows`.
    """
    refuse_row_names(model)
    with in_mode(model, training=False):
        yield
