"""The batches that an initialisation looks at (EVA the inputs of layers, LoRA-GA their gradients), and the loss on one.

A batch is what the data to train on looks like:

    token ids (B, T)                                  the labels are the tokens themselves
    a mapping with input_ids and, if there are any,   what a transformers model takes; minilora.data.Batch as
    attention_mask, labels (-100: no label), …        `batch._asdict()`
    anything else                                     with forward=function(model, batch) that returns the loss
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapters import adapters_named
from minilora.data import Batch
from minilora.errors import InputError
from minilora.lora import LoRA
from minilora.loss import summed_loss
from minilora.model import Transformer

Forward = Callable[[nn.Module, Any], Tensor]


def language_model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy (nats) of the labelled tokens of a batch, by minilora's Transformer or a transformers model.

    Raises InputError for a batch that is neither token ids nor a mapping with input_ids, or a model without a loss.
    """
    values = as_mapping(batch)
    if "input_ids" not in values:
        raise InputError(
            "a batch must be token ids (B, T), or a mapping with input_ids; for any other, give"
            " forward=function(model, batch) that returns the loss"
        )
    device = next(model.parameters()).device
    values = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in values.items()}
    ids = values["input_ids"]
    mask = values.get("attention_mask", torch.ones_like(ids))
    values.setdefault("labels", ids.masked_fill(mask == 0, -100))
    if isinstance(model, Transformer):
        n = (values["labels"][:, 1:] != -100).sum()
        return summed_loss(model, Batch(ids, values["labels"], mask)) / n
    loss = getattr(model(**values), "loss", None)
    if loss is None:
        raise InputError(f"{type(model).__name__} returns no loss: give forward=function(model, batch) that does")
    return loss


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
