"""The proof that a kernel gives of itself: the kernels pass it, and no fault that one could have does."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers.kernels import DEVICE, INTERPRETED, Mutation, mutations, runs_somewhere
from minilora.kernels import proof
from torch import Tensor

pytestmark = runs_somewhere

KERNELS = ("dequantize", "gemv", "matmul", "backward")
fault = partial(proof.fault, device=DEVICE)


@pytest.mark.parametrize("kernel", [*KERNELS, "quantize"])
@pytest.mark.parametrize(
    ("dtype", "block_size", "double_quant"),
    [(torch.float16, 64, True), (torch.float32, 64, False)],
    ids=["float16", "float32"],
)
def test_the_kernels_pass(kernel: str, dtype: torch.dtype, block_size: int, double_quant: bool) -> None:
    assert fault(kernel, dtype, block_size, double_quant) == ""


@pytest.mark.parametrize("kernel", ["dequantize", "quantize"])
def test_blocks_may_be_small(kernel: str) -> None:
    assert fault(kernel, torch.float16, 32, True) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [*KERNELS, "quantize"])
@pytest.mark.parametrize("block_size", [64, 4096])
def test_the_kernels_pass_in_bfloat16(kernel: str, block_size: int) -> None:
    assert fault(kernel, torch.bfloat16, block_size, True) == ""


@pytest.mark.skipif(not INTERPRETED, reason="a GPU rounds bfloat16")
@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_that_is_cut_off_instead_of_rounded_does_not_pass(kernel: str) -> None:
    """As Triton's interpreter does it: at most one unit in the last place."""
    assert fault(kernel, torch.bfloat16, 64, True) != ""


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mutate", mutations())
def test_what_is_wrong_with_the_weight_shows(kernel: str, mutate: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"minilora.kernels.{kernel}")
    right = getattr(module, kernel)
    if kernel == "dequantize":
        wrong: Any = lambda q, dtype: right(mutate(q), dtype)  # noqa: E731
    else:
        wrong = lambda x, q, *more: right(x, mutate(q), *more)  # noqa: E731
    monkeypatch.setattr(module, kernel, wrong)
    text = fault(kernel, torch.float32, 64, True)
    assert "of 98304 bytes differ from PyTorch's" in text or "times what rounding explains" in text


def nothing(y: Tensor) -> Tensor:
    """A kernel that writes nothing leaves what was there: here, what no one has written."""
    return torch.full_like(y, torch.nan)


def last_row(y: Tensor) -> Tensor:
    """As if the last tile, which is not whole, had been left out."""
    y[-1:] = 0
    return y


def last_column(y: Tensor) -> Tensor:
    y[..., -1] = 0
    return y


def one_value(y: Tensor) -> Tensor:
    y.view(-1)[y.numel() // 2] *= 1.01
    return y


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("spoil", [nothing, last_row, last_column, one_value])
def test_what_is_wrong_with_the_result_shows(
    kernel: str, spoil: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"minilora.kernels.{kernel}")
    right = getattr(module, kernel)
    monkeypatch.setattr(module, kernel, lambda *args, **options: spoil(right(*args, **options)))
    assert fault(kernel, torch.float16, 64, True) != ""


@pytest.mark.parametrize("kernel", ["gemv", "matmul"])
@pytest.mark.parametrize("missing", ["add", "LoRA", "a LoRA's fourth column", "ragged rows only"])
def test_what_is_wrong_with_what_is_added_shows(kernel: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"minilora.kernels.{kernel}")
    right = getattr(module, kernel)

    def wrong(x: Tensor, q: Any, add: Tensor | None, xA: Tensor | None, B: Tensor | None) -> Tensor:
        if missing == "add":
            add = None
        elif missing == "LoRA":
            xA = B = None
        elif missing == "ragged rows only":  # right where a tile divides the weight's rows
            add = None if q.shape[0] % 64 else add
        elif B is not None and xA is not None:
            B = torch.cat([B[:, :3], 0 * B[:, 3:4], B[:, 4:]], 1)
        return right(x, q, add, xA, B)

    monkeypatch.setattr(module, kernel, wrong)
    assert "times what rounding explains" in fault(kernel, torch.float16, 64, True)


@pytest.mark.parametrize("which", ["codes", "absmax", "ties"])
def test_what_is_wrong_with_quantizing_shows(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = importlib.import_module("minilora.kernels.quantize")
    right = quantize.quantize

    def wrong(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        if which == "ties":  # they would go to the upper code
            w = torch.where(w == 0, w, torch.nextafter(w, torch.full_like(w, torch.inf)))
        codes, absmax = right(w, block_size)
        if which != "ties":
            (codes if which == "codes" else absmax)[-1] += 1
        return codes, absmax

    monkeypatch.setattr(quantize, "quantize", wrong)
    assert "bytes differ from PyTorch's" in fault("quantize", torch.float32, 64, False)


def test_a_rounding_more_is_seen() -> None:
    """u is half a unit in the last place: float16 that is rounded down has an error of a whole one."""
    exact = torch.linspace(1, 2, 1000, dtype=torch.float64)
    rounded, cut = exact.half(), ((exact * 1024).floor() / 1024).half()
    zero = torch.zeros_like(exact)
    assert proof.times_the_rounding(rounded, exact, zero, torch.float16) == ""
    assert proof.times_the_rounding(cut, exact, zero, torch.float16) != ""
    assert "nan" in proof.times_the_rounding(rounded * torch.nan, exact, zero, torch.float16)
