"""Every kernel compiles for every chip, without spills and within its shared memory; and the check would notice."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", "3.6", reason="needs triton: pip install minilora[gpu]")

SPILLS = """
import triton
from minilora.kernels import aot, matmul
from minilora.kernels.codes import dot_dtype
import torch
large = {"BLOCK_SIZE": 64, "DOUBLE": True, "BM": 64, "BN": 64, "BK": 64, "BR": 16, "ADD": True,
         "LORA": True, "DOT": dot_dtype(torch.float32)}
case = aot.Case("matmul in float32 with a tile that is too large", matmul.matmul_kernel, "fp32", large)
print(aot.usage(case, 90).problems(90))
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: one that interprets kernels cannot compile them."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_compiles_and_fits(arch: int) -> None:
    done = python("-m", "minilora.kernels.aot", "--arch", str(arch))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if f" {arch} " in line]
    for kernel in ("dequantize", "quantize", "gemv", "matmul", "backward"):
        assert any(line.startswith(kernel) for line in lines), f"{kernel} was not compiled: {done.stdout}"


def test_a_spill_is_noticed() -> None:
    done = python("-c", SPILLS)
    assert "spills" in done.stdout, done.stdout + done.stderr


def test_shared_memory_beyond_the_chip_s_is_noticed() -> None:
    source = "from minilora.kernels.aot import Usage; print(Usage(10, 0, 0, 200_000).problems(80))"
    assert "needs 200000 bytes of shared memory, sm_80 has 166912" in python("-c", source).stdout
