"""Gradients through the checkpointed blocks of a transformers model whose own parameters are all frozen.

Reentrant checkpointing runs a block without a graph and connects its output to its input. Where the input of the first
block needs no gradient, as after a frozen embedding, nothing is connected, and no adapter in the block learns. So for
as long as blocks are checkpointed, the embedding's output is made to need one.
"""

from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapters.targets import input_embedding


def follow_checkpointing(model: nn.Module) -> None:
    """Give a transformers model the hook that does this; on another model do nothing."""
    if hasattr(model, "gradient_checkpointing_enable") and _hook not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_hook, with_kwargs=True)


def forget_checkpointing(model: nn.Module) -> None:
    """Take the hook off."""
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is _hook]:
        del model._forward_pre_hooks[key], model._forward_pre_hooks_with_kwargs[key]


def _hook(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the model's forward: have this one call of the embedding give what needs a gradient."""
    if not model.training or not torch.is_grad_enabled() or kwargs.get("inputs_embeds") is not None:
        return
    # Not getattr: in a model of a thousand modules that lack it, that takes milliseconds of every forward.
    if any(vars(module).get("gradient_checkpointing") for module in model.modules()):
        path = input_embedding(model)
        if path is None:
            return
        embedding = model.get_submodule(path)

        def once(module: nn.Module, args: Any, output: Tensor) -> None:
            handle.remove()
            if not output.requires_grad:
                output.requires_grad_(True)

        handle = embedding.register_forward_hook(once)
