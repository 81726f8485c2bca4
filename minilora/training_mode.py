"""A model made ready to train, and put back as it was: dropout on, activations kept, recomputed or moved away."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from minilora.errors import InputError
from minilora.model import Transformer, require_own_model
from minilora.training_config import TrainConfig

__all__ = ["training_mode"]


@contextmanager
def training_mode(model: nn.Module, config: TrainConfig) -> Iterator[None]:
    """Dropout on, recomputation and offload where asked for; afterwards the model is as it was.

    Raises InputError for a model that cannot do what is asked for, or a device on which there is nothing to move.
    """
    was_training = model.training
    if config.offload_activations:
        _check_offload(model)
    if config.gradient_checkpointing:
        _set_gradient_checkpointing(model, True, config.offload_activations)
    model.train()
    try:
        yield
    finally:
        model.train(was_training)
        if config.gradient_checkpointing:
            _set_gradient_checkpointing(model, False)


def _check_offload(model: nn.Module) -> None:
    require_own_model(model, "leave offload_activations out")
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise InputError(f"offload_activations moves them from a GPU to CPU memory: on {device.type} leave it out")


def _set_gradient_checkpointing(model: nn.Module, on: bool, offload: bool = False) -> None:
    if isinstance(model, Transformer):
        model.gradient_checkpointing, model.offload_activations = on, offload
        return
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise InputError(f"{type(model).__name__} has no gradient checkpointing: set gradient_checkpointing to false")
    transformer: Any = model  # of the transformers library
    if on:
        # Reentrant checkpointing gives no gradient where a block's input needs none, as after a frozen embedding.
        transformer.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        transformer.gradient_checkpointing_disable()
