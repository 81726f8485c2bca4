"""Gradient checkpointing of a block (Chen et al., arXiv 1604.06174), which tells its layers that they are in one.

    forward pass    the block runs; what its layers save for backward is dropped
    backward pass   the block is recomputed; what its layers save is held until each has used its own

So inside a checkpoint saving costs nothing in the forward pass, and in the backward pass memory for one block at a
time: a layer may save there what it would have to make again, such as a weight dequantized from 4 bits.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


class _State(threading.local):  # backward runs a CUDA device's part in a thread of its own
    inside = False


_state = _State()


def checkpointed(block: Callable[..., Any], *args: Any) -> Any:
    """block(*args), of which only the arguments are saved for the backward pass."""
    if torch.compiler.is_compiling():  # which traces no context
        return checkpoint(block, *args, use_reentrant=False)
    return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (_inside(), _inside()))


def inside_checkpoint() -> bool:
    """True while `checkpointed` runs a block, in the forward pass or to recompute it."""
    return not torch.compiler.is_compiling() and _state.inside


@contextmanager
def _inside() -> Iterator[None]:
    before, _state.inside = _state.inside, True
    try:
        yield
    finally:
        _state.inside = before
