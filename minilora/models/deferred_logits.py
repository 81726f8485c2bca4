"""Deferred logits: a model of another library returns its hidden states, and the loss applies the head to a part.

    hidden -> head -> logits -> (scaled, capped, ...) -> output.logits

Nearly every language model returns what its head gave it. Then the loss can decide which hidden states go through the
head. A model that scales or caps its logits needs them, and whether it does cannot be seen before it has run. So the
head returns a stand-in: the first operation on it computes all logits and goes on with them; if there was none, the
stand-in comes out of the model as it went in.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


class DeferredLogits(Tensor):
    """Stands for head(hidden): `hidden` (…, hidden); `computed`, the logits (…, V), once an operation has asked."""

    head: Callable[[Tensor], Tensor]
    hidden: Tensor
    computed: Tensor | None

    @classmethod
    def of(cls, head: Callable[[Tensor], Tensor], hidden: Tensor) -> "DeferredLogits":
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
