"""A model made ready to train, and put back as it was.

Dropout on; activations saved, recomputed or moved away; NF4 weights dequantized once, or for each product.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from minilora.adapters import refuse_merged, refuse_row_names, refuse_switched_off
from minilora.data import Example
from minilora.errors import InputError
from minilora.models import Transformer, attention_row_by_row, require_own_model
from minilora.nf4 import keeping_weights
from minilora.torch_helpers import in_mode
from minilora.training.config import TrainConfig
from minilora.training.optimizer import check_optimizer
from minilora.training.rows import refuse_unreadable

KEPT_SHARE = 0.25  # of the free memory, for dequantized weights: activations and gradients want some too
# What transformers notes in the modules of a model that recomputes.
RECOMPUTATION = "gradient_checkpointing", "_gradient_checkpointing_func", "_require_grads_hook", "_require_grads_hooks"


def refuse_untrainable(model: nn.Module, adapter: str, config: TrainConfig, examples: Sequence[Example]) -> None:
    """Raise InputError where this adapter cannot be trained on these examples now; nothing is changed."""
    refuse_row_names(model)
    refuse_merged(model)
    refuse_switched_off(model, "training")
    refuse_unreadable(model, examples)
    check_optimizer(model, adapter, config)


@contextmanager
def training_mode(model: nn.Module, config: TrainConfig) -> Iterator[None]:
    """Dropout on; recomputation, offload and kept weights where asked for; afterwards the model is as it was.

    Raises InputError where the model cannot do what is asked for, or there is nothing to move from its device.
    """
    if config.offload_activations:
        require_own_model(model, "leave offload_activations out")
        device = next(model.parameters()).device.type
        if device != "cuda":
            raise InputError(f"offload_activations moves them from a GPU to CPU memory: on {device} leave it out")
    recomputing = _recomputing(model, config.offload_activations) if config.gradient_checkpointing else nullcontext()
    keeping = keeping_weights(KEPT_SHARE) if config.keep_weights else nullcontext()
    attention = nullcontext() if isinstance(model, Transformer) else attention_row_by_row()
    with recomputing, keeping, attention, in_mode(model, training=True):
        yield


@contextmanager
def _recomputing(model: nn.Module, offload: bool) -> Iterator[None]:
    if isinstance(model, Transformer):
        before = model.gradient_checkpointing, model.offload_activations
        model.gradient_checkpointing, model.offload_activations = True, offload
        try:
            yield
        finally:
            model.gradient_checkpointing, model.offload_activations = before
        return
    transformer: Any = model  # of the transformers library, where every model has the method, and some refuse it
    if not (
        hasattr(model, "gradient_checkpointing_enable") and getattr(model, "supports_gradient_checkpointing", True)
    ):
        name = type(model).__name__
        raise InputError(f"{name} has no gradient checkpointing: set gradient_checkpointing to false")
    modules = [vars(module) for module in model.modules()]
    earlier = [{name: value for name, value in module.items() if name in RECOMPUTATION} for module in modules]
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name since gradient_… is deprecated
    try:
        for module in modules:
            module.pop("_require_grads_hook", None)  # so that the hooks below are not the caller's own
        # Reentrant checkpointing gives no gradient where a block's input needs none, as after a frozen embedding.
        (enable or transformer.gradient_checkpointing_enable)({"use_reentrant": False})
        # For its sake transformers 5 lets the embedding's output need a gradient, by a hook that it leaves there.
        for each in transformer.modules():
            if "_require_grads_hook" in vars(each):
                each.disable_input_require_grads()
        yield
    finally:
        for module, attributes in zip(modules, earlier, strict=True):
            for name in RECOMPUTATION:
                module.pop(name, None)
            module.update(attributes)
