"""Attention to packed sequences in a transformers model, one sequence after the other.

    mask of sequences           ■ · · · ·      transformers' scaled_dot_product_attention computes the scores of all
    of 3 and 2 tokens           ■ ■ · · ·      pairs of tokens and masks those between sequences and those ahead;
                                ■ ■ ■ · ·      from the mask follow their lengths, and each can be computed by itself
                                · · · ■ ·
                                · · · ■ ■

A model makes its masks once a forward pass, for all layers. The lengths are stored on a mask of packed causal
sequences, with a window or without; an attention that is given this very mask goes sequence by sequence. Any other
computes what transformers would have.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minilora.models.attention import CausalRows, attend, row_by_row


@dataclass
class Calls:
    """How often attention went sequence by sequence, and how often it was transformers' own."""

    row_by_row: int = 0
    all_pairs: int = 0


@contextmanager
def attention_row_by_row() -> Iterator[Calls]:
    """Inside the `with`, what transformers calls "sdpa" computes nothing between packed sequences.

    A backward pass that recomputes blocks must be inside it too.
    """
    calls = Calls()
    masks = _functions("masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS")
    attentions = _functions("modeling_utils", "ALL_ATTENTION_FUNCTIONS")
    if masks is None or attentions is None:
        yield calls
        return
    with _replaced(masks, _noting_rows(masks["sdpa"])), _replaced(attentions, _skipping(attentions["sdpa"], calls)):
        yield calls


def _functions(module: str, name: str) -> Any:
    """One of transformers' tables of functions, by kind of attention; None where it is not imported, or has none."""
    return getattr(sys.modules.get(f"transformers.{module}"), name, None)


@contextmanager
def _replaced(functions: Any, function: Callable[..., Any]) -> Iterator[None]:
    before = functions["sdpa"]
    functions["sdpa"] = function  # in front of the one that is registered, which stays
    try:
        yield
    finally:
        del functions["sdpa"]
        if functions["sdpa"] is not before:  # which stood in front too
            functions["sdpa"] = before


def _noting_rows(make_mask: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    def make(*args: Any, **kwargs: Any) -> Tensor | None:
        mask = make_mask(*args, **kwargs)
        if mask is not None and not torch.compiler.is_compiling():
            mask.rows = rows_of(mask), mask._version  # type: ignore[attr-defined]
        return mask

    return make


def rows_of(mask: Tensor) -> CausalRows | None:
    """The packed sequences whose causal mask this is, bool (1, 1, T, T); None where it is another mask."""
    if mask.dtype != torch.bool or mask.shape != (1, 1, mask.shape[-1], mask.shape[-1]):
        return None
    sees = mask[0, 0]
    seen = sees.sum(-1)
    starts = (seen == 1).nonzero()[:, 0].tolist()  # the first of a sequence, and no other, sees one token alone
    if starts[:1] != [0]:
        return None
    lengths = tuple(stop - start for start, stop in zip(starts, [*starts[1:], len(sees)], strict=True))
    window = int(seen.max())
    row = torch.repeat_interleave(torch.tensor(lengths, device=mask.device))
    if not torch.equal(sees, (row[:, None] == row).tril().triu(1 - window)):
        return None
    return CausalRows(lengths, None if window == max(lengths) else window)


def _skipping(attention: Callable[..., Any], calls: Calls) -> Callable[..., Any]:
    def skipping(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        if torch.compiler.is_compiling():  # a graph that knew the lengths would be compiled anew for every batch
            return attention(module, query, key, value, attention_mask, **kwargs)
        rows = _rows_to_compute(module, query, key, attention_mask, kwargs)
        if rows is None:
            calls.all_pairs += 1
            return attention(module, query, key, value, attention_mask, **kwargs)
        calls.row_by_row += 1
        dropout, scale = kwargs.get("dropout", 0.0), kwargs.get("scaling")
        if dropout or scale not in (None, query.shape[-1] ** -0.5) or query.shape[-1] != value.shape[-1]:
            y = row_by_row(query, key, value, rows.lengths, rows.window, dropout, scale)
        else:
            y = attend(query, key, value, rows)
        return y.transpose(1, 2).contiguous(), None

    return skipping


# What transformers' function for "sdpa" looks at beside dropout and scaling; all else that models give it, it ignores.
CHANGES_SCORES = ("position_bias", "cache", "softcap")


def _rows_to_compute(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> CausalRows | None:
    """The sequences of this attention, where it is that of packed causal sequences and nothing else."""
    T = query.shape[2]
    if key.shape[2] != T or any(kwargs.get(name) is not None for name in CHANGES_SCORES):
        return None
    if mask is None:  # causal, unless the module says otherwise, and of one sequence
        causal = kwargs.get("is_causal")
        return CausalRows((T,), None) if (getattr(module, "is_causal", True) if causal is None else causal) else None
    rows: CausalRows | None
    rows, version = getattr(mask, "rows", (None, 0))
    return rows if version == mask._version else None
