"""What adapters train beside their updates, combined: copies of modules, and rows of embeddings.

A copy or row pᵢ counts as its difference from the base model's p, which is combined as an update ΔW is, but whole:

    p + Σ wᵢ (pᵢ − p)

An adapter that has no copy of the module, or not the row of this token, differs by nothing there.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapters.adapter import Adapter
from minilora.adapters.trained_parts import TrainedCopy, TrainedRows
from minilora.errors import InputError

Named = Sequence[tuple[str, Adapter]]  # the adapters on one layer, with their names


def parts_config(parts: Mapping[str, Named]) -> dict[str, Any]:
    """What a configuration says of copies of these modules, and of all the rows that the adapters have, by path.

    Raises InputError where the adapters on a layer are not alike.
    """
    copies: list[str] = []
    tokens: dict[str, list[int]] = {}
    for path, named in parts.items():
        if len({type(adapter) for _, adapter in named}) > 1:
            kinds = ", ".join(f"{name!r} has a {type(adapter).__name__}" for name, adapter in named)
            raise InputError(f"{path}: what differs in kind cannot be combined: {kinds}")
        rows = [adapter for _, adapter in named if isinstance(adapter, TrainedRows)]
        if not rows:
            copies.append(path)
        elif not all(each.is_tied for each in rows):  # those that are follow the embedding
            tokens[path] = sorted({token for each in rows for token in each.token_ids})
    return {"modules_to_save": copies or None, "trainable_token_indices": tokens or None}


def combine_part(
    path: str,
    new: Adapter,
    adapters: Sequence[Adapter],
    thin: Callable[[Tensor], Tensor],
    add: Callable[[Sequence[Tensor]], Tensor],
) -> None:
    """Give a new copy, or new rows, which are the base model's still, what the adapters make of them together."""
    if isinstance(new, TrainedCopy):
        copies = [_tensors(each.module) for each in adapters if isinstance(each, TrainedCopy)]
        for key, own in (*new.module.named_parameters(), *new.module.named_buffers()):
            if own.is_floating_point():
                own.add_(add([thin(each[key] - own) for each in copies]))
        return
    assert isinstance(new, TrainedRows)
    rows = [each for each in adapters if isinstance(each, TrainedRows)]
    if new.is_tied:
        if not all(each.is_tied for each in rows):
            raise InputError(f"{path}: one of the adapters has rows of its own, and together they have the embedding's")
        return
    differences = []
    for each in rows:
        places = torch.tensor([new.token_ids.index(token) for token in each.token_ids], device=new.rows.device)
        difference = thin(each.rows - new.rows[places])
        differences.append(torch.zeros_like(new.rows).index_copy(0, places, difference))
    new.rows.add_(add(differences))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
