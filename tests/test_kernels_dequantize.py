"""Dequantize and quantize kernels: the bytes of minilora.nf4, which are bitsandbytes'."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import DEVICE, DTYPES, Mutation, as_stored, mutations, packed, runs_somewhere, weight
from minilora.kernels.dequantize import dequantize
from minilora.kernels.quantize import quantize_blocks

from minilora import nf4

pytestmark = runs_somewhere


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
    blocks=st.integers(1, 40),
    block_size=st.sampled_from([32, 64, 128, 1024]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 1e-6, 1e4]),
)
@settings(deadline=None, max_examples=20)
def test_quantize_gives_the_bytes_of_the_pytorch_path(
    blocks: int, block_size: int, dtype: torch.dtype, scale: float
) -> None:
    torch.manual_seed(0)
    w = as_stored(scale * torch.randn(blocks * block_size), dtype).to(DEVICE)
    w[:block_size] = 0  # a block of zeros is divided by no zero
    codes, absmax = quantize_blocks(w, block_size)
    expected = nf4.quantize(w, block_size, double_quant=False)
    assert torch.equal(codes, expected.codes)
    assert torch.equal(absmax, expected.absmax)


def test_values_on_a_midpoint_take_the_lower_code() -> None:
    table = nf4.code(DEVICE)
    w = torch.zeros(64, device=DEVICE)
    w[:15], w[15] = (table[:-1] + table[1:]) / 2, 1.0  # the absmax is 1, so that nothing is scaled
    codes, _ = quantize_blocks(w, 64)
    assert (codes[:8] >> 4).tolist() == list(range(0, 16, 2))
    assert (codes[:8] & 15).tolist() == [1, 3, 5, 7, 9, 11, 13, 15]
