"""A model of transformers, or one like it, up to the hidden states that the loss is taken of.

Where it can be told that the model's output is its head's, row by row, the head is called by the loss, on the labelled
positions alone. Whatever else happens to the logits happens to those of the loss.
"""

from contextlib import nullcontext
from inspect import signature
from typing import Any, cast

from torch import Tensor, nn

from minilora.data import Batch, PackedBatch
from minilora.errors import InputError
from minilora.models import DeferredLogits, deferring_logits, row_positions
from minilora.torch_helpers import is_plainly_called


def hidden_and_head(model: nn.Module, batch: Batch | PackedBatch, chosen: Tensor) -> tuple[Tensor, nn.Module]:
    """The hidden states at the chosen positions, a bool mask (B, T), and the head: logits = head(hidden).

    Where the logits could not be deferred, they come in the place of the hidden states, and the identity as the head.
    Raises InputError for a model that gives no logits.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids.to(chosen.device)}
    if isinstance(batch, Batch):
        inputs["attention_mask"] = batch.attention_mask.to(chosen.device)
    else:  # packed sequences are told by positions that start again, where there is neither a mask nor a cache
        inputs |= {"position_ids": row_positions(batch.lengths).to(chosen.device), "use_cache": False}
    head = _plain_head(model)
    # Where no hook looks at the logits too, transformers computes those of the chosen positions alone.
    of_transformers = type(model).__module__.startswith("transformers.")  # elsewhere the name may mean something else
    seen_by_others = head is None or bool(model._forward_hooks)
    if of_transformers and not seen_by_others and "logits_to_keep" in signature(model.forward).parameters:
        columns = chosen.any(0).nonzero()[:, 0]
        inputs["logits_to_keep"], chosen = columns, chosen[:, columns]
    with nullcontext() if head is None else deferring_logits(head):
        output = model(**inputs)
    if not hasattr(output, "logits"):
        raise InputError(f"this {type(model).__name__} gives no logits when it is called: give the model inside it")
    logits = output.logits
    if head is None or not isinstance(logits, DeferredLogits) or logits.computed is not None:
        return logits[chosen], nn.Identity()
    return logits.hidden[chosen], head


def _plain_head(model: nn.Module) -> nn.Module | None:
    """The layer that gives the model's logits, where it can tell, and whose calls do nothing but that, row by row."""
    replaced = "forward" in model.__dict__ or model._compiled_call_impl is not None  # by accelerate, or torch.compile
    if replaced or not hasattr(type(model), "get_output_embeddings"):
        return None
    head = cast(Any, model).get_output_embeddings()
    if not isinstance(head, nn.Module):
        return None
    plain = all(is_plainly_called(each) and getattr(each, "row_names", None) is None for each in head.modules())
    return head if plain else None
