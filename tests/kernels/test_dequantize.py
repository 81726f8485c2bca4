"""Dequantize and quantize kernels: the bytes of minilora.nf4, which are bitsandbytes'."""

import math

import pytest
import torch
from helpers.kernels import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    Mutation,
    as_stored,
    mutations,
    packed,
    runs_somewhere,
    weight,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from minilora.kernels.dequantize import dequantize
from minilora.kernels.quantize import quantize

from minilora import nf4
from minilora.nf4 import codec

pytestmark = runs_somewhere


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_pytorch_path_that_kernels_are_held_to_gives_the_cpus_bytes(dtype: torch.dtype) -> None:
    """Which are bitsandbytes' in tests/nf4/test_codec.py; not in there, since a GPU's machine may lack bitsandbytes."""
    torch.manual_seed(0)
    w = torch.randn(100_001).to(dtype)
    on_cpu, on_gpu = nf4.quantize(w, double_quant=False), nf4.quantize(w.cuda(), double_quant=False)
    assert torch.equal(on_gpu.codes.cpu(), on_cpu.codes)
    assert torch.equal(on_gpu.absmax.cpu(), on_cpu.absmax)
    assert torch.equal(nf4.dequantize(on_gpu).cpu(), nf4.dequantize(on_cpu))


@given(
    shape=st.lists(st.integers(1, 70), min_size=1, max_size=2),
    block_size=st.sampled_from([32, 64, 128, 4096]),
    double_quant=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    pairs=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_dequantize_gives_the_bytes_of_the_pytorch_path(
    shape: list[int], block_size: int, double_quant: bool, dtype: torch.dtype, pairs: bool
) -> None:
    torch.manual_seed(0)
    q = nf4.quantize(torch.randn(shape, device=DEVICE), block_size, double_quant)
    n = math.prod(shape)
    room = torch.full((n + 4096,), float("nan"), dtype=dtype, device=DEVICE)  # poisoned: every element must be written
    out = room[:n].view(shape)
    assert dequantize(q, out=out, pairs=pairs) is out
    assert torch.equal(out, weight(q, dtype))
    assert room[n:].isnan().all()  # and no other


@pytest.mark.parametrize("mutate", mutations())
def test_a_fault_shows(mutate: Mutation) -> None:
    q = packed(600, 64)  # more than 256 blocks, so that there are two nested ones
    assert torch.equal(dequantize(q, torch.float32), weight(q, torch.float32))
    assert not torch.equal(dequantize(mutate(q), torch.float32), weight(q, torch.float32))


@given(
    n=st.integers(1, 10_000),  # a program takes 4096; the last block need not be whole
    block_size=st.sampled_from([32, 64, 128, 4096]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 1e-39, 1e4]),
)
@settings(deadline=None, max_examples=20)
def test_quantize_gives_the_bytes_of_the_pytorch_path(
    n: int, block_size: int, dtype: torch.dtype, scale: float
) -> None:
    assume(scale != 1e-39 or not (INTERPRETED and dtype == torch.bfloat16))  # the interpreter misreads its subnormals
    torch.manual_seed(0)
    w = as_stored(scale * torch.randn(n), dtype).to(DEVICE)
    w[:block_size] = 0  # a block of zeros is divided by no zero
    expected = nf4.quantize(w, block_size)
    got = nf4.quantize(w, block_size, whole_blocks=quantize)
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(got.absmax, expected.absmax) and torch.equal(got.nested_absmax, expected.nested_absmax)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_what_is_not_finite_shows_in_the_absmax_of_its_block(bad: float) -> None:
    """It is how nf4.quantize finds it."""
    w = torch.ones(3 * 64, device=DEVICE)
    w[100] = bad
    assert quantize(w, 64)[1].isfinite().tolist() == [True, False, True]


def test_quantize_writes_its_result_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = []

    def poisoned(n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        rooms.append((n, torch.full((n + 4096,), 99, dtype=dtype, device=device)))
        return rooms[-1][1][:n]

    monkeypatch.setattr(torch, "empty", poisoned)
    quantize(torch.zeros(65 * 64, device=DEVICE), 64)
    monkeypatch.undo()
    assert [n for n, _ in rooms] == [65 * 32, 65]
    for n, room in rooms:
        assert (room[:n] != 99).all() and (room[n:] == 99).all()


def test_values_near_a_midpoint_are_scaled_by_the_reciprocal() -> None:
    """On a tie but for the last bit, where w · (1 / c) and w / c differ."""
    torch.manual_seed(0)
    ties = torch.cat([codec.midpoints(nf4.code()), torch.ones(1)]).repeat(4)  # each block has its absmax, c
    w = (torch.rand(64, 1) * ties).view(-1).to(DEVICE)
    codes, absmax = quantize(w, 64)
    assert torch.equal(codes, nf4.quantize(w).codes)
    divided = codec.encode((w.view(-1, 64) / absmax[:, None]).view(-1))
    assert not torch.equal(codes, divided), "which this test is to tell apart"


def test_values_on_a_midpoint_take_the_lower_code() -> None:
    table = nf4.code(DEVICE)
    w = torch.zeros(64, device=DEVICE)
    w[:15], w[15] = (table[:-1] + table[1:]) / 2, 1.0  # the absmax is 1, so that nothing is scaled
    codes, _ = quantize(w, 64)
    assert (codes[:8] >> 4).tolist() == list(range(0, 16, 2))
    assert (codes[:8] & 15).tolist() == [1, 3, 5, 7, 9, 11, 13, 15]
