"""A model made ready to train, and put back as it was: dropout on, activations kept, recomputed or moved away."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from minilora.errors import InputError
from minilora.model import Transformer
from minilora.training_config import TrainConfig

__all__ = ["training_mode"]


@contextmanager
def training_mode(model: nn.Module, config: TrainConfig) -> Iterator[None]:
    """Dropout on, and recomputation where asked for; afterwards the model is as it was.

    Raises InputError for a model that cannot do what is asked for.
    """
    was_training = model.training
    if config.gradient_checkpointing:
        _set_gradient_checkpointing(model, True)
    model.train()
    try:
        yield
    finally:
        model.train(was_training)
        if config.gradient_checkpointing:
            _set_gradient_checkpointing(model, False)


def _set_gradient_checkpointing(model: nn.Module, on: bool) -> None:
    if isinstance(model, Transformer):
        model.gradient_checkpointing = on
        return
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise InputError(f"{type(model).__name__} has no gradient checkpointing: set gradient_checkpointing to false")
    transformer: Any = model  # of the transformers library
    if on:
        # Reentrant checkpointing gives no gradient where a block's input needs none, as after a frozen embedding.
        transformer.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        transformer.gradient_checkpointing_disable()
