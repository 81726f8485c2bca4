"""Logits that are computed when something asks for them, so that a model of another library need not compute them.

    hidden -> head -> logits -> (scaled, capped, ...) -> output.logits

Nearly every language model ends with its head, and hands on what the head gave it. Then the hidden states are all that
a loss needs, and which of them go through the head is the loss's to decide. A model that does more with its logits must
be given them. Whether it does cannot be seen before it has run; so the head gives what stands for its logits: the first
operation on that computes them, all of them, and goes on with them as if they had always been there. What comes out of
the model tells which of the two it was.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

__all__ = ["DeferredLogits", "deferring_logits"]


class DeferredLogits(Tensor):
    """head(hidden), of which `hidden` (…, hidden) is there; `computed` holds the logits (…, V) once they are, too."""

    head: Callable[[Tensor], Tensor]
    hidden: Tensor
    computed: Tensor | None

    @classmethod
    def of(cls, head: Callable[[Tensor], Tensor], hidden: Tensor) -> "DeferredLogits":
        """What stands for head(hidden)."""
        logits = torch.empty(0).as_subclass(cls)
        logits.head, logits.hidden, logits.computed = head, hidden, None
        return logits

    def compute(self) -> Tensor:
        """The logits; the same tensor every time, so that an operation in place changes them for all."""
        if self.computed is None:
            self.computed = self.head(self.hidden)
        return self.computed

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, cls.compute, (args, kwargs or {}))
        return func(*args, **kwargs)


@contextmanager
def deferring_logits(head: nn.Module) -> Iterator[None]:
    """Inside the `with`, a call of the head gives DeferredLogits; the head must be plainly called."""
    forward = head.forward
    head.forward = lambda hidden: DeferredLogits.of(forward, hidden)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward
