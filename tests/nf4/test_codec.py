"""minilora/nf4/codec.py against bitsandbytes' CPU code, byte for byte, and against float64."""

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minilora import nf4
from minilora.errors import InputError
from minilora.nf4 import codec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MIDPOINTS = (nf4.code()[:-1] + nf4.code()[1:]) / 2


@pytest.fixture(autouse=True)
def _eager():
    # bitsandbytes compiles its fallback for odd shapes: eager is the same arithmetic without the seconds of compiling
    with torch.compiler.set_stance("force_eager"):
        yield


def weights(kind: str, n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """n values with the traits that quantization can trip over."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, generator=g)
    if kind == "zero blocks":
        w[: n // 2] = 0
    elif kind == "constant":
        w = torch.full((n,), -0.3)  # every absmax equal: double quantization sees blocks of zeros
    elif kind == "midpoints":  # every value on a tie
        w = MIDPOINTS[torch.randint(15, (n,), generator=g)]
        w[::32] = 1.0
    elif kind == "near midpoints":  # on a tie but for the last bit, where x * (1 / c) and x / c differ
        w = 0.37 * weights("midpoints", n, torch.float32, seed)
    elif kind == "wide":  # absmax from 1e-7 to 1e4: both ends of the dynamic map
        w *= 10 ** (torch.rand(n, generator=g) * 11 - 7)
    elif kind == "subnormal":
        w *= 1e-39
    return w.to(dtype)


KINDS = ["normal", "zero blocks", "constant", "midpoints", "near midpoints", "wide", "subnormal"]


def assert_same_bytes(w: Tensor, block_size: int, double_quant: bool) -> None:
    expected, state = bnb.quantize_4bit(w, blocksize=block_size, quant_type="nf4", compress_statistics=double_quant)
    q = nf4.quantize(w, block_size, double_quant)
    assert torch.equal(q.codes, expected.view(-1))
    assert torch.equal(q.absmax, state.absmax)
    if double_quant:
        assert torch.equal(q.nested_absmax, state.state2.absmax)
        assert torch.equal(q.offset, state.offset)
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert torch.equal(codec.dequantize_absmax(q), absmax)
    actual, reference = nf4.dequantize(q), bnb.dequantize_4bit(expected, state).view(w.shape)
    assert actual.dtype == w.dtype
    assert torch.equal(flush_subnormals(actual), flush_subnormals(reference))


def flush_subnormals(w: Tensor) -> Tensor:
    # where the CPU has a bfloat16 conversion bitsandbytes uses it, and that turns results below 1.2e-38 into zero
    return torch.where(w.abs() < torch.finfo(torch.float32).tiny, 0.0, w)


def test_tables_are_bitsandbytes_own():
    assert torch.equal(nf4.code(), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nf4.dynamic_map(), bnb.create_dynamic_map())


def test_code_is_normal_quantiles_in_float64():
    # 1e-6: float32 probabilities next to 0.9677 move a quantile by up to 6e-8 / pdf(1.85) = 8e-7
    quantile = torch.special.ndtri
    above = quantile(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])
    below = -quantile(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    expected = torch.cat([below, above, torch.zeros(1)]).sort().values / above.max()
    torch.testing.assert_close(nf4.code().double(), expected, rtol=0, atol=1e-6)


def test_tables_ignore_the_callers_defaults():
    tables = (nf4.code, nf4.dynamic_map, codec._rounding_table, codec.byte_pairs)
    for table in tables:
        table.cache_clear()
    w = weights("normal", 64 * 1024, torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            nf4.dequantize(nf4.quantize(w))
    finally:
        torch.set_default_dtype(torch.float32)
    test_tables_are_bitsandbytes_own()
    assert_same_bytes(w, 64, double_quant=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1,), (63,), (64, 3), (3, 5, 7), (192, 576), (33, 70)])
def test_bytes_equal_bitsandbytes(shape, kind, dtype):
    w = weights(kind, torch.Size(shape).numel(), dtype).view(shape)
    assert_same_bytes(w, 64, double_quant=True)


@settings(deadline=None, max_examples=80)
@given(
    n=st.integers(1, 40_000),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
    block_size=st.sampled_from(codec.BLOCK_SIZES),
    double_quant=st.booleans(),
)
def test_bytes_equal_bitsandbytes_for_any_length(n, kind, dtype, seed, block_size, double_quant):
    assert_same_bytes(weights(kind, n, dtype, seed), block_size, double_quant)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_equal_bitsandbytes_across_chunks(dtype):
    n = codec.DEQUANTIZE_CHUNK + codec.QUANTIZE_CHUNK + 12_345  # several chunks, a short last block, an odd length
    assert_same_bytes(weights("wide", n, dtype), 64, double_quant=True)


def test_every_code_is_the_nearest_and_a_tie_goes_down():
    w = torch.linspace(-1, 1, 64 * 1000).view(1000, 64)
    w[:, 0] = 1  # absmax 1 in every block: the values are their own scaled selves
    w[:15, 1], w[:15, 2] = MIDPOINTS, torch.nextafter(MIDPOINTS, torch.tensor(2.0))
    codes = nf4.quantize(w, double_quant=False).codes
    codes = torch.stack([codes >> 4, codes & 15], dim=1).view(w.shape)
    distance = (w.double().unsqueeze(-1) - nf4.code().double()).abs()
    chosen = distance.gather(-1, codes.long().unsqueeze(-1)).squeeze(-1)
    # 1e-7: the midpoints are themselves rounded to float32, so a value that close to a tie may go either way
    assert (chosen <= distance.min(-1).values + 1e-7).all()
    assert codes[:15, 1].tolist() == list(range(15))
    assert codes[:15, 2].tolist() == list(range(1, 16))


def test_an_input_need_not_be_contiguous():
    w = torch.randn(96, 130)
    assert torch.equal(nf4.quantize(w.T).codes, nf4.quantize(w.T.contiguous()).codes)


# -------------------------------------------------------------------------------------------- double quantization


def absmax_of(w: Tensor) -> tuple[Tensor, Tensor]:
    absmax = nf4.quantize(w, double_quant=False).absmax
    return absmax, absmax - absmax.mean()


def test_table_rule_is_bitsandbytes_cpu_rule():
    w = weights("normal", 64 * 65_536, torch.float32)
    _, centred = absmax_of(w)
    expected, state = bnb.quantize_blockwise(centred, blocksize=256)
    q = nf4.quantize(w, absmax_rule="table")
    assert torch.equal(q.absmax, expected)
    assert torch.equal(q.nested_absmax, state.absmax)
    assert torch.equal(nf4.quantize(w).absmax, expected)  # and on a CPU it is the default


def test_nearest_rule_is_nearest():
    w = weights("normal", 64 * 16_384, torch.float32)
    _, centred = absmax_of(w)
    q = nf4.quantize(w, absmax_rule="nearest")
    scaled = (centred.view(-1, 256) / q.nested_absmax.unsqueeze(-1)).view(-1).double()
    distance = (scaled.unsqueeze(-1) - nf4.dynamic_map().double()).abs()
    chosen = distance.gather(-1, q.absmax.long().unsqueeze(-1)).squeeze(-1)
    assert (chosen <= distance.min(-1).values + 1e-7).all()  # 1e-7: float32 midpoints, as above


def test_the_two_rules_differ_in_few_places_and_by_little():
    w = weights("normal", 64 * 65_536, torch.float32)
    _, centred = absmax_of(w)
    table, nearest = (nf4.quantize(w, absmax_rule=rule) for rule in ("table", "nearest"))
    differ = (table.absmax != nearest.absmax).float().mean()
    assert 0 < differ < 0.01  # 0.2% measured: without a difference these tests would tell nothing
    # the table rounds the scaled value to a grid of step 2/65535 first: that costs at most one step in distance
    of_table, of_nearest = ((codec.dequantize_absmax(q) - q.offset - centred).abs() for q in (table, nearest))
    assert (of_table <= of_nearest + nearest.nested_absmax.max() * 2.1 / 65535).all()


@pytest.mark.parametrize(("double_quant", "bits"), [(False, 4 + 32 / 64), (True, 4 + 8 / 64 + 32 / (64 * 256))])
def test_bits_per_weight(double_quant, bits):
    q = nf4.quantize(torch.randn(512, 512), double_quant=double_quant)
    tensors = [t for t in (q.codes, q.absmax, q.nested_absmax) if t is not None]
    assert sum(t.nbytes for t in tensors) * 8 / 512**2 == bits


# ------------------------------------------------------------------------------------------------------ dequantize


def test_dequantize_rounds_once_to_any_dtype():
    q = nf4.quantize(torch.randn(33, 70))
    exact = nf4.dequantize(q, torch.float32)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(nf4.dequantize(q, dtype), exact.to(dtype))
    out = torch.empty(33, 70, dtype=torch.bfloat16)
    assert nf4.dequantize(q, out=out) is out
    assert torch.equal(out, exact.bfloat16())


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**31))
def test_error_is_at_most_half_the_widest_gap(n, seed):
    w = weights("normal", n, torch.float32, seed)
    q = nf4.quantize(w, double_quant=False)
    half_gap = max(b - a for a, b in pairwise(nf4.code().tolist())) / 2
    bound = half_gap * q.absmax.repeat_interleave(64)[:n]
    assert ((nf4.dequantize(q) - w).abs() <= bound * (1 + 1e-6)).all()  # 1e-6: a few float32 roundings


MEASURE = """
import re, torch
from pathlib import Path
from minilora import nf4

def peak():  # not getrusage's ru_maxrss, which a child inherits from the process that started it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

nf4.dequantize(nf4.quantize(torch.randn(64, 64)))  # the tables are made and the kernels loaded
w = torch.randn(4096, 4096)
base = peak()
q = nf4.quantize(w)
quantized = peak()
nf4.dequantize(q, torch.bfloat16)
print((quantized - base) / w.nbytes, (peak() - quantized) / w.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_stays_under_a_quarter_of_the_tensor():
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    quantize, dequantize = map(float, run.stdout.split())
    # the result itself is 4.127 / 32 = 0.13 of the float32 tensor, so far less would mean that nothing was measured
    assert 0.1 < quantize < 0.25
    assert 0.4 < dequantize < 0.5 + 0.15  # the bfloat16 result, 6 MiB (0.09) of scratch memory, some pages rounded up


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 100, 129])  # in a full block, and in the short last one
def test_nan_and_infinity_are_refused_by_name(bad, dtype, position):
    w = torch.randn(130).to(dtype)
    w[position] = bad
    with pytest.raises(InputError, match=rf"layers\.0\.q_proj.*element {position} .*{str(bad).lstrip('-')}"):
        nf4.quantize(w, name="layers.0.q_proj")


@pytest.mark.parametrize("w", [torch.arange(64), torch.empty(0, 64), torch.full((128,), 3e38)])
def test_what_nf4_cannot_hold_is_refused(w):
    with pytest.raises(InputError, match="embed"):
        nf4.quantize(w, name="embed")


def test_block_size_is_one_of_bitsandbytes_sizes():
    with pytest.raises(InputError, match="block_size 48"):
        nf4.quantize(torch.randn(96), block_size=48)


def test_codes_may_be_a_parameter():
    q = nf4.quantize(torch.randn(70))
    as_parameter = replace(q, codes=torch.nn.Parameter(q.codes, requires_grad=False))
    assert torch.equal(nf4.dequantize(as_parameter), nf4.dequantize(q))
