"""Fused products against float64 on the dequantized weight, and bit for bit where the input is the identity."""

from itertools import product

import pytest
import torch
from helpers.kernels import DEVICE, DTYPES, Mutation, as_stored, assert_near, mutations, packed, runs_somewhere, weight
from minilora.kernels import matmul as matmul_module
from minilora.kernels.backward import backward
from minilora.kernels.gemv import gemv
from minilora.kernels.matmul import matmul

from minilora.errors import InputError

pytestmark = runs_somewhere

SHAPES = [(1, 64, 64), (1, 70, 192), (3, 5, 64), (16, 64, 128), (17, 130, 192), (65, 33, 320)]  # M, N, K


def rows(M: int, K: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(M, K, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("pairs", [True, False], ids=["pairs", "values"])
def test_products_are_near_float64(M: int, N: int, K: int, dtype: torch.dtype, double_quant: bool, pairs: bool) -> None:
    q = packed(N, K, double_quant)
    W, x, g = weight(q, dtype), rows(M, K, dtype), rows(M, N, dtype)
    assert_near(matmul(x, q, pairs=pairs), x.double() @ W.double().T, x, W, dtype)
    assert_near(backward(g, q, pairs), g.double() @ W.double(), g, W.T, dtype)
    W32 = weight(q, torch.float32)  # a single row is multiplied in float32 throughout
    assert_near(gemv(x[0], q, pairs=pairs)[None], x[:1].double() @ W32.double().T, x[:1], W32, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N", "K", "r"), [(1, 70, 64, 1), (17, 33, 128, 5), (2, 64, 64, 40)])
def test_what_is_added_in_the_epilogue(M: int, N: int, K: int, r: int, dtype: torch.dtype) -> None:
    q = packed(N, K)
    W, x, bias = weight(q, dtype), rows(M, K, dtype), rows(1, N, dtype)[0]
    xA, B = rows(M, r, dtype, 2), rows(N, r, dtype, 3)
    exact = x.double() @ W.double().T + bias.double() + xA.double() @ B.double().T
    wide = [torch.cat([a, b], dim=1) for a, b in ((x, xA), (W, B))]
    assert_near(matmul(x, q, bias, xA, B), exact, *wide, dtype)
    assert_near(matmul(x, q, bias), exact - xA.double() @ B.double().T, x, W, dtype)
    add = rows(M, N, dtype, 4)
    W32, row = weight(q, torch.float32), x[:1]
    assert_near(gemv(x[0], q, add[0])[None], row.double() @ W32.double().T + add[:1].double(), row, W32, dtype)
    exact = exact[:1] - row.double() @ (W - W32).double().T
    wide = [torch.cat([a, b], dim=1) for a, b in ((row, xA[:1]), (W32, B))]
    assert_near(gemv(x[0], q, bias, xA[0], B)[None], exact, *wide, dtype)
    assert_near(matmul(x, q, add), x.double() @ W.double().T + add.double(), x, W, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [64, 128])
def test_the_identity_brings_out_the_dequantized_weight_bit_for_bit(dtype: torch.dtype, block_size: int) -> None:
    q = packed(70, 128, block_size=block_size)
    W = weight(q, dtype)
    assert torch.equal(matmul(torch.eye(128, device=DEVICE, dtype=dtype), q).T, W)
    assert torch.equal(backward(torch.eye(70, device=DEVICE, dtype=dtype), q), W)
    for k, pairs in product((0, 63, 64, 127), (True, False)):
        assert torch.equal(gemv(torch.eye(128, device=DEVICE, dtype=dtype)[k], q, pairs=pairs), W[:, k])


@pytest.mark.parametrize("split", [1, 2, 5, 7])
def test_the_sum_may_be_divided_among_any_number_of_programs(split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, x = packed(40, 320), rows(5, 320, torch.float32)
    W = weight(q, torch.float32)
    monkeypatch.setattr(matmul_module, "split_of", lambda *_: split)
    assert_near(matmul(x, q), x.double() @ W.double().T, x, W, torch.float32)


def test_arguments_may_be_views() -> None:
    """Of fused_lora's h = x A^T for several layers, each takes its columns; a slice of a batch is not dense either."""
    q = packed(33, 128)
    wide = rows(6, 256, torch.float32)
    x, xA, B, add = (
        wide[::2, ::2],
        rows(3, 9, torch.float32)[:, 4:7],
        rows(3, 33, torch.float32).T,
        rows(33, 3, torch.float32).T,
    )
    g = rows(33, 3, torch.float32).T
    dense = [a.contiguous() for a in (x, xA, B, add, g)]
    assert torch.equal(matmul(x, q, add, xA, B), matmul(dense[0], q, dense[3], dense[1], dense[2]))
    assert torch.equal(gemv(x[0], q, add[0], xA[0], B), gemv(dense[0][0], q, dense[3][0], dense[1][0], dense[2]))
    assert torch.equal(backward(g, q), backward(dense[4], q))


@pytest.mark.parametrize("mutate", mutations())
def test_a_fault_shows(mutate: Mutation) -> None:
    q = packed(600, 64)
    W, x, g = weight(q, torch.float32), rows(3, 64, torch.float32), rows(3, 600, torch.float32)
    wrong = mutate(q)
    for y, exact, x_, W_ in (
        (matmul(x, wrong), x.double() @ W.double().T, x, W),
        (backward(g, wrong), g.double() @ W.double(), g, W.T),
        (gemv(x[0], wrong)[None], x[:1].double() @ W.double().T, x[:1], W),
    ):
        with pytest.raises(AssertionError, match="times the bound"):
            assert_near(y, exact, x_, W_, torch.float32)


def test_nothing_is_written_outside_the_result() -> None:
    """Ragged M, N: the kernel's tiles reach over the edge, its stores may not."""
    q, x = packed(33, 64), rows(3, 64, torch.float32)
    room = torch.full((3 * 33 + 4096,), 7.0, device=DEVICE)
    out = room[: 3 * 33].view(1, 3, 33)
    empty = torch.empty
    try:
        torch.empty = lambda *args, **kwargs: out  # type: ignore[assignment]
        matmul(x, q)
    finally:
        torch.empty = empty
    assert (room[3 * 33 :] == 7).all()
    assert not (out == 7).any()


@pytest.mark.parametrize(("K", "block_size"), [(96, 64), (64, 32), (65, 64)])
def test_blocks_that_straddle_rows_are_refused(K: int, block_size: int) -> None:
    q = packed(4, K, block_size=block_size)
    x, g = rows(1, K, torch.float32), rows(1, 4, torch.float32)
    for call in (lambda: matmul(x, q), lambda: backward(g, q), lambda: gemv(x[0], q)):
        with pytest.raises(InputError, match="dequantize and multiply instead"):
            call()


def test_as_stored_is_rounding_on_a_gpu() -> None:
    x = torch.randn(1000)
    assert torch.equal(as_stored(x, torch.float16), x.half())
    cut = as_stored(x, torch.bfloat16)
    assert ((cut.float() - x).abs() <= 2**-7 * x.abs()).all()
