"""Gradient checkpointing of a block (Chen et al., arXiv 1604.06174), which tells its layers that they are in one.

    forward         the block runs; what its layers save for the way back is dropped
    way back        the block runs once more; what its layers save is held until each has used its own

So inside a checkpoint, to save costs nothing on the way forward, and on the way back lasts for one block at a time. A
layer may save there what it has made and will need again, a weight dequantized from 4 bits, instead of making it anew.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


class _State(threading.local):  # backward runs a CUDA device's part in a thread of its own
    inside = False


_state = _State()


def checkpointed(block: Callable[..., Any], *args: Any) -> Any:
    """block(*args), of which only the arguments are kept for the way back."""
    if torch.compiler.is_compiling():  # which traces no context
        return checkpoint(block, *args, use_reentrant=False)
    return checkpoint(block, *args, use_reentrant=False, context_fn=_contexts)


def inside_checkpoint() -> bool:
    """True while `checkpointed` runs a block, for the first or the second time."""
    return not torch.compiler.is_compiling() and _state.inside


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return _inside(), _inside()


@contextmanager
def _inside() -> Iterator[None]:
    before, _state.inside = _state.inside, True
    try:
        yield
    finally:
        _state.inside = before
