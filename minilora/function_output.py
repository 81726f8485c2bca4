"""What an autograd.Function's forward returns, where torch.compile traces it."""

import torch
from torch import Tensor


def as_output(y: Tensor) -> Tensor:
    """y; in torch.compile as a view, since torch 2.11 loses the gradients of an output that an earlier step made too.

    So it is after an operation in place, or a `.to` that had nothing to change.
    """
    return y.view_as(y) if torch.compiler.is_compiling() else y
