"""The batches that an initialisation looks at (EVA the inputs of layers, LoRA-GA their gradients), and the loss on one.

A batch is what the data to train on looks like:

    token ids (B, T)                                  the labels are the tokens themselves
    a mapping with input_ids and, if there are any,   what a transformers model takes; minilora.data.Batch as
    attention_mask, labels (-100: no label), …        `batch._asdict()`
    anything else                                     with forward=function(model, batch) that returns the loss
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from minilora.adapters import LoRA, adapters_named
from minilora.errors import InputError

Forward = Callable[[nn.Module, Any], Tensor]


def as_mapping(batch: Any) -> dict[str, Any]:
    """The batch's tensors by name; nothing for a batch of another kind."""
    if isinstance(batch, Tensor) and not batch.is_floating_point():
        return {"input_ids": batch}
    return dict(batch) if isinstance(batch, Mapping) else {}


def loras_named(model: nn.Module, name: str) -> dict[str, LoRA]:
    """The LoRA of each layer of this adapter, by path; what else it trains is not initialized from data.

    Raises InputError where the model has no such adapter, or it is of another method.
    """
    found = {path: each for path, each in adapters_named(model, name).items() if isinstance(each, LoRA)}
    if not found:
        raise InputError(f"adapter {name!r} is no LoRA: there is nothing to initialize from data")
    return found


def as_list(batches: Iterable[Any]) -> list[Any]:
    """The batches, to go through more than once. Raises InputError where there are none."""
    found = list(batches)
    if not found:
        raise InputError("there are no batches to look at")
    return found
