"""Attention to packed sequences one by one, in place of transformers' own: the masks it knows, what it computes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from minilora.models.attention import CausalRows
from minilora.models.transformers_attention import attention_row_by_row, rows_of

T = 12
LENGTHS = (3, 1, 6, 2)


def block_mask(lengths: tuple[int, ...] = LENGTHS, window: int = T) -> Tensor:
    """(1, 1, T, T), a row of the batch after the other."""
    blocks = [torch.ones(n, n, dtype=torch.bool).tril().triu(1 - window) for n in lengths]
    return torch.block_diag(*blocks).bool()[None, None]


def changed(mask: Tensor, query: int, key: int) -> Tensor:
    mask = mask.clone()
    mask[0, 0, query, key] = ~mask[0, 0, query, key]
    return mask


# --- which rows a mask is of ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [LENGTHS, (12,), (1,) * 12, (11, 1), (1, 11)])
@pytest.mark.parametrize("window", [2, 3, 6, 12])
def test_the_rows_are_read_off_their_mask(lengths: tuple[int, ...], window: int) -> None:
    seen = None if window >= max(lengths) else window
    assert rows_of(block_mask(lengths, window)) == CausalRows(lengths, seen)


OTHER_MASKS = {
    "a key more": changed(block_mask(), 5, 1),
    "a key less": changed(block_mask(), 7, 5),
    "the next row's first token": changed(block_mask(), 4, 3),
    "a prefix seen whole": changed(block_mask(), 4, 5),
    "sees nothing": changed(block_mask(), 3, 3),
    "both ways": torch.block_diag(torch.ones(6, 6), torch.ones(6, 6)).bool()[None, None],
    "everything": torch.ones(1, 1, T, T, dtype=torch.bool),
    "padding on the left": block_mask() & (torch.arange(T) > 0),
    "two windows": torch.block_diag(block_mask((6,), 3)[0, 0], block_mask((6,), 2)[0, 0]).bool()[None, None],
    "two sequences": block_mask().expand(2, 1, T, T),
    "a mask for each head": block_mask().expand(1, 2, T, T),
    "in numbers": block_mask().float(),
    "more keys than queries": block_mask()[:, :, 3:],
}


@pytest.mark.parametrize("mask", OTHER_MASKS.values(), ids=OTHER_MASKS)
def test_a_mask_of_anything_else_is_of_no_rows(mask: Tensor) -> None:
    assert rows_of(mask) is None


# --- what is computed -------------------------------------------------------------------------------------------------


def heads(dtype: torch.dtype = torch.float64, v_size: int = 8) -> list[Tensor]:
    """q of 4 heads of 8, k and v of 2 heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, T, 4, 8), (1, T, 2, 8), (1, T, 2, v_size)]
    return [torch.randn(s, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_() for s in shapes]


def made_inside(mask: Tensor) -> Tensor:
    """The mask as a model gets it, from a rule that says what a query sees."""
    made: Tensor = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
        batch_size=1,
        q_length=T,
        kv_length=T,
        mask_function=lambda batch, head, query, key: mask[0, 0][query, key],
        allow_is_causal_skip=False,
    )
    assert torch.equal(made, mask)
    return made


MODULE: Any = SimpleNamespace(num_key_value_groups=2, is_causal=True)


@pytest.mark.parametrize("window", [4, T])
@pytest.mark.parametrize(
    "settings", [{}, {"scaling": 0.7}, {"scaling": 8**-0.5, "position_bias": None}, {"v_size": 5}], ids=str
)
def test_it_is_what_transformers_computes_with_the_mask(settings: dict[str, Any], window: int) -> None:
    settings = dict(settings)
    q, k, v = heads(v_size=settings.pop("v_size", 8))
    expected, _ = sdpa_attention_forward(MODULE, q, k, v, block_mask(window=window), **settings)
    with attention_row_by_row() as calls:
        mask = made_inside(block_mask(window=window))
        y, weights = ALL_ATTENTION_FUNCTIONS["sdpa"](MODULE, q, k, v, mask, sliding_window=3, **settings)
    assert (calls.row_by_row, calls.all_pairs, weights) == (1, 0, None)
    assert y.is_contiguous()
    gradient = torch.randn_like(expected)
    for ours, theirs in zip(
        [y, *torch.autograd.grad(y, (q, k, v), gradient)],
        [expected, *torch.autograd.grad(expected, (q, k, v), gradient)],
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)  # float64 rounding of sums of a dozen terms


def test_without_a_mask_it_is_one_causal_row() -> None:
    q, k, v = heads()
    expected, _ = sdpa_attention_forward(MODULE, q, k, v, None)
    with attention_row_by_row() as calls:
        y, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](MODULE, q, k, v, None)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert (calls.row_by_row, calls.all_pairs) == (1, 0)


def test_dropout_stays_inside_the_rows() -> None:
    q, k, v = heads(torch.float32)
    with attention_row_by_row() as calls:
        mask = made_inside(block_mask())
        torch.manual_seed(0)
        y, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](MODULE, q, k, torch.ones_like(v), mask, dropout=0.5)
        z, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](MODULE, q, k, v, mask, dropout=0.5)
    assert calls.row_by_row == 2
    # the first token of a row sees one token: kept and doubled, or dropped
    first = y[0, [0, 3, 4, 10]]
    assert set(first.unique().tolist()) == {0.0, 2.0}
    (gradient,) = torch.autograd.grad(z[0, :3].sum(), v)
    assert gradient[:, :, :3].any() and not gradient[:, :, 3:].any()


def altered(mask: Tensor) -> Tensor:
    mask[0, 0, 2, 0] = False
    return mask


NOT_CAUSAL: Any = SimpleNamespace(num_key_value_groups=2, is_causal=False)
LEFT_ALONE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "a mask that was altered": (MODULE, lambda: altered(made_inside(block_mask())), {}),
    "a copy of the mask": (MODULE, lambda: made_inside(block_mask()).clone(), {}),
    "a mask of its own making": (MODULE, block_mask, {}),
    "a mask of no rows": (MODULE, lambda: made_inside(OTHER_MASKS["both ways"]), {}),
    "a bias": (MODULE, lambda: made_inside(block_mask()), {"position_bias": torch.randn(1, 4, T, T).double()}),
    "both ways": (NOT_CAUSAL, lambda: None, {}),
    "both ways, as it is told": (MODULE, lambda: None, {"is_causal": False}),
}


@pytest.mark.parametrize(("module", "make_mask", "settings"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_all_else_is_left_to_transformers(module: Any, make_mask: Any, settings: dict[str, Any]) -> None:
    q, k, v = heads()
    with attention_row_by_row() as calls:
        mask = make_mask()
        y, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, **settings)
    assert (calls.row_by_row, calls.all_pairs) == (0, 1)
    assert torch.equal(y, sdpa_attention_forward(module, q, k, v, mask, **settings)[0])


def test_fewer_queries_than_keys_are_left_to_transformers() -> None:
    q, k, v = heads()
    q = q[:, :, :3]
    with attention_row_by_row() as calls:
        y, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](MODULE, q, k, v, None)
    assert (calls.row_by_row, calls.all_pairs) == (0, 1)
    assert torch.equal(y, sdpa_attention_forward(MODULE, q, k, v, None)[0])


def test_what_transformers_refuses_is_refused() -> None:
    q, k, v = heads()
    with attention_row_by_row(), pytest.raises(ValueError, match="does not support `softcap`"):
        ALL_ATTENTION_FUNCTIONS["sdpa"](MODULE, q, k, v, made_inside(block_mask()), softcap=30.0)


def test_in_a_compiled_graph_it_is_transformers_own() -> None:
    q, k, v = (x.detach() for x in heads())

    def attention(*qkv: Tensor) -> Tensor:
        mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](1, T, T, mask_function=lambda b, h, query, key: key <= query)
        y: Tensor = ALL_ATTENTION_FUNCTIONS["sdpa"](MODULE, *qkv, mask)[0]
        return y

    with attention_row_by_row() as calls:
        y = torch.compile(attention, backend="eager", fullgraph=True)(q, k, v)
    torch.testing.assert_close(y, sdpa_attention_forward(MODULE, q, k, v, None)[0], rtol=0, atol=1e-12)
    assert (calls.row_by_row, calls.all_pairs) == (0, 0)


# --- afterwards -------------------------------------------------------------------------------------------------------


def test_transformers_has_its_own_functions_back() -> None:
    with pytest.raises(ZeroDivisionError), attention_row_by_row(), attention_row_by_row():
        raise ZeroDivisionError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask
    for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        with pytest.raises(KeyError):  # nothing stands in front of them
            del functions["sdpa"]


def test_a_function_that_stood_in_front_does_so_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(*args: Any, **kwargs: Any) -> tuple[str, None]:
        return "mine", None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", mine)
    with attention_row_by_row():
        q, k, v = heads()
        assert ALL_ATTENTION_FUNCTIONS["sdpa"](NOT_CAUSAL, q, k, v, None) == ("mine", None)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is mine


def test_a_library_that_has_no_such_functions_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS")
    with attention_row_by_row():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
