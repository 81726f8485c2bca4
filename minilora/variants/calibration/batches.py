"""The batches that an initialisation looks at (EVA the inputs of layers, LoRA-GA their gradients), and the loss on one.

A batch is what the data to train on looks like:

    token ids (B, T)                                  the labels are the tokens themselves
    a mapping with input_ids and, if there are any,   what a transformers model takes; minilora.data.Batch as
    attention_mask, labels (-100: no label), …        `batch._asdict()`
    anything else                                     with forward=function(model, batch) that returns the loss
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from minilora.adapters import LoRA, adapters_named, refuse_merged
from minilora.errors import InputError

Forward = Callable[[nn.Module, Any], Tensor]


def as_mapping(batch: Any) -> dict[str, Any]:
    """The batch's tensors by name; nothing for a batch of another kind."""
    if isinstance(batch, Tensor) and not batch.is_floating_point():
        return {"input_ids": batch}
    return dict(batch) if isinstance(batch, Mapping) else {}


def attended_tokens(batch: Any) -> Tensor | None:
    """True (B, T) at the tokens that are no padding; None where no attention mask says."""
    mask = as_mapping(batch).get("attention_mask")
    return None if mask is None else mask.bool()


def loras_to_start(model: nn.Module, name: str, init_lora_weights: str) -> dict[str, LoRA]:
    """The LoRA of each layer of this adapter, by path; what else it trains is not initialized from data."""
    found = {path: each for path, each in adapters_named(model, name).items() if isinstance(each, LoRA)}
    if not found:
        raise InputError(f"adapter {name!r} is no LoRA: there is nothing to initialize from data")
    init = next(iter(found.values())).config.init_lora_weights
    if init != init_lora_weights:
        raise InputError(f'adapter {name!r} has init_lora_weights={init!r}, not "{init_lora_weights}"')
    refuse_merged(model)
    return found


def as_list(batches: Iterable[Any]) -> list[Any]:
    """The batches, at least one, to go through more than once."""
    found = list(batches)
    if not found:
        raise InputError("there are no batches to look at")
    return found


@contextmanager
def looking_at_inputs(
    model: nn.Module, look: Mapping[str, Callable[[Tensor], None]], mask: Tensor | None
) -> Iterator[None]:
    """Inside the `with`, give each of these layers' inputs (tokens, in_features) to its function, by path.

    mask: True (B, T) at the tokens to look at; None for all.
    """

    def hook(path: str, layer: nn.Module, arguments: tuple[Tensor]) -> None:
        x = arguments[0]
        if mask is not None and mask.shape == x.shape[:-1]:  # not so in an expert, which gets some of the tokens
            x = x[mask.to(x.device)]
        look[path](x.reshape(-1, x.shape[-1]))

    handles = [model.get_submodule(path).register_forward_pre_hook(partial(hook, path)) for path in look]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
