"""Gradients through the checkpointed blocks of a transformers model whose own parameters are all frozen.

Reentrant checkpointing runs a block without a graph and connects its output to its inputs. Where no input of a block
needs a gradient, as after a frozen embedding or the convolutions of a sound's encoder, nothing is connected, and no
adapter in the block learns. So the first input of such a block is made to need one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

CHECKPOINT = "_gradient_checkpointing_func"  # where transformers puts the function, in each module that recomputes


def follow_checkpointing(model: nn.Module) -> None:
    """Give a transformers model the hook that does this; on another model do nothing."""
    if hasattr(model, "gradient_checkpointing_enable") and _hook not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_hook)


def forget_checkpointing(model: nn.Module) -> None:
    """Take the hook off, and what it did."""
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is _hook]:
        del model._forward_pre_hooks[key]
    for attributes in map(vars, model.modules()):
        if _is_ours(attributes.get(CHECKPOINT)):
            attributes[CHECKPOINT] = attributes[CHECKPOINT].args[0]


def _hook(model: nn.Module, args: Any) -> None:
    """Before the model's forward: whoever has asked for checkpointing meanwhile gets it in this form."""
    if not model.training or not torch.is_grad_enabled():
        return
    # Not getattr: in a model of a thousand modules that lack it, that takes milliseconds of every forward.
    for attributes in map(vars, model.modules()):
        if CHECKPOINT in attributes and not _is_ours(attributes[CHECKPOINT]):
            attributes[CHECKPOINT] = partial(_checkpoint_with_gradient, attributes[CHECKPOINT])


def _is_ours(function: Any) -> bool:
    return isinstance(function, partial) and function.func is _checkpoint_with_gradient


def _checkpoint_with_gradient(checkpoint: Callable[..., Any], block: Callable[..., Any], *args: Any) -> Any:
    """checkpoint(block, *args), its first floating-point input one that needs a gradient if none does."""
    numbers = [i for i, x in enumerate(args) if isinstance(x, Tensor) and x.is_floating_point()]
    if numbers and not any(args[i].requires_grad for i in numbers):
        first = numbers[0]
        args = (*args[:first], args[first].detach().requires_grad_(), *args[first + 1 :])
    return checkpoint(block, *args)
