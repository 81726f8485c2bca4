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
large = {"BLOCK_SIZE": 64, "DOUBLE": True, "BM": 64, "BN": 128, "BK": 64, "BR": 16, "ADD": True,
         "LORA": True, "DOT": dot_dtype(torch.float32)}
case = aot.Case("matmul in float32 with a tile that is too large", matmul.matmul_kernel, "fp32", large, 128 * 64)
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
    # An H100 (132 multiprocessors of 128 lanes at 1.755 GHz, 3.35 TB/s) issues 22 instructions a lane in the time that
    # an element of 0.52 bytes in and 2 out takes, and 39 if 4 go out: a dequantization of more cannot reach its
    # bandwidth. Half of it, to leave room for waiting.
    for dtype, budget in (("bf16", 22), ("fp16", 22), ("fp32", 39)):
        dequantize = [float(line.split()[-1]) for line in lines if line.startswith(f"dequantize {dtype}")]
        assert 0 < max(dequantize) < budget / 2, done.stdout


CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;              /* 0x00000a0000017a02 */
                                                                       /* 0x000fe40000000f00 */
        /*0010*/              @!P0 LDG.E.U8 R0, [R2.64] ;              /* 0x0000000402008981 */
        /*0020*/                   FADD R1, R1, R0 ;                   /* 0x0000000001017221 */
        /*0030*/               @P1 BRA 0x10 ;                          /* 0xffffffa000001947 */
        /*0040*/                   EXIT ;                              /* 0x000000000000794d */
        /*0050*/                   BRA 0x50;                           /* 0xfffffff000007947 */
        /*0060*/                   NOP;                                /* 0x0000000000007918 */
"""


def test_the_instructions_of_a_loop_are_counted() -> None:
    count = "from minilora.kernels.aot import instructions_of_main_loop as count; import sys; print(count(sys.argv[1]))"
    assert python("-c", count, CODE).stdout.strip() == "3"
    assert python("-c", count, CODE.replace("@P1 BRA 0x10", "@P1 BRA 0x40")).stdout.strip() == "6"  # no loop: all


def test_a_spill_is_noticed() -> None:
    done = python("-c", SPILLS)
    assert "spills" in done.stdout, done.stdout + done.stderr


def test_shared_memory_beyond_the_chip_s_is_noticed() -> None:
    source = "from minilora.kernels.aot import Usage; print(Usage(10, 0, 0, 200_000, 1.0).problems(80))"
    assert "needs 200000 bytes of shared memory, sm_80 has 166912" in python("-c", source).stdout
