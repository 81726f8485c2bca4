"""Every kernel compiled ahead of time, without a GPU: registers, spills and shared memory, from the chip's own code.

    python -m minilora.kernels.aot             all kernels for sm_80, sm_90 and sm_100
    python -m minilora.kernels.aot --arch 90

The table is what the cuobjdump that comes with Triton reads in the compiled code. A kernel fails that spills registers
to the stack, which lies in the GPU's slow memory, or asks for more shared memory than a block can have. Instructions a
weight say what no GPU is needed for: at M = 1 an H100 reads 4.127 bits in the time that it issues 4.6.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import backward, dequantize, gemv, matmul, quantize
from .codes import dot_dtype, tile

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block can have: CUDA guide, table 24
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # Triton's names
WARPS = 4  # of every kernel's launch
STATISTICS = {"codes_ptr": "*u8", "nested_ptr": "*fp32", "offset_ptr": "*fp32", "map_ptr": "*fp32"}


@dataclass(frozen=True)
class Case:
    """One kernel as one of its launches would compile it."""

    name: str
    kernel: Any
    dtype: str
    constants: dict[str, Any]
    weights: int  # of the tile that one program unpacks at a time
    pairs: bool = True

    def source(self) -> ASTSource:
        """The kernel with its argument types; pointers and row lengths are multiples of 16, as they are in use."""
        absmax = "*u8" if self.constants.get("DOUBLE") else "*fp32"
        table = "*i64" if self.pairs else "*fp32"
        types = (
            STATISTICS
            | {"absmax_ptr": absmax, "table_ptr": table, "midpoints_ptr": "*fp32"}
            | dict.fromkeys([*"MNKRn", "K_PIECES", "add_stride", "SPLIT", "n_blocks"], "i32")
        )
        signature, aligned = {}, {}
        for i, name in enumerate(self.kernel.arg_names):
            signature[name] = "constexpr" if name in self.constants else types.get(name, f"*{self.dtype}")
            if signature[name].startswith("*") or name in "NK":
                aligned[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, self.constants, aligned)


def cases() -> Iterator[Case]:
    """What the launching functions ask for, in every dtype."""
    for dtype, double in product(DTYPES, (True, False)):
        nf4: dict[str, Any] = {"BLOCK_SIZE": 64, "DOUBLE": double}
        kind = f"{dtype}, {'double' if double else 'single'}"
        whole = nf4 | {"BYTES": dequantize.BYTES, "SHORT": False}
        yield Case(f"dequantize {kind}", dequantize.dequantize_kernel, dtype, whole, 2 * dequantize.BYTES)
        for pairs in (False, True):
            table = "pairs" if pairs else "values"
            more = {"BN": gemv.BN, "PIECES": gemv.PIECES, "BR": matmul.BR, "ADD": True, "LORA": True}
            weights = 64 * gemv.BN * gemv.PIECES
            yield Case(f"gemv {kind}, {table}", gemv.gemv_kernel, dtype, nf4 | more, weights, pairs)
    tiles = {(dtype, *tile(DTYPES[dtype], M)) for dtype, M in product(DTYPES, (1, 32, 4096))}
    for dtype, BM, BN in sorted(tiles):
        sizes = {"BLOCK_SIZE": 64, "DOUBLE": True, "BM": BM, "BN": BN, "DOT": dot_dtype(DTYPES[dtype])}
        name = f"backward {dtype}, {BM} rows"
        yield Case(name, backward.backward_kernel, dtype, sizes | {"BK": backward.BK}, BN * backward.BK)
        for extra in (False, True):
            more = {"BK": matmul.BK, "BR": matmul.BR, "ADD": extra, "LORA": extra}
            name = f"matmul {dtype}, {BM} rows{' + add + LoRA' if extra else ''}"
            yield Case(name, matmul.matmul_kernel, dtype, sizes | more, BN * matmul.BK)
    for dtype in DTYPES:
        blocks = {"BLOCK_SIZE": 64, "BLOCKS": quantize.BLOCKS, "SMALLEST": quantize.TINY}
        yield Case(f"quantize {dtype}", quantize.quantize_kernel, dtype, blocks, 64 * quantize.BLOCKS)


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes: registers a thread, bytes of stack and local memory, of shared a block.

    instructions: that a thread issues for each weight that it unpacks, in the main loop.
    """

    registers: int
    stack: int
    local: int
    shared: int
    instructions: float

    def problems(self, arch: int) -> list[str]:
        """Why it would be slow or not start, if it would."""
        found = []
        if self.stack or self.local:
            found.append(f"spills {max(self.stack, self.local)} bytes a thread")
        if self.shared > SHARED_LIMIT[arch]:
            found.append(f"needs {self.shared} bytes of shared memory, sm_{arch} has {SHARED_LIMIT[arch]}")
        return found


def usage(case: Case, arch: int) -> Usage:
    """Compile for sm_<arch> and read what the code takes."""
    options = {"num_warps": WARPS, "num_stages": 3, "enable_fp_fusion": False}
    compiled = triton.compile(case.source(), target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources, code = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", resources)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {resources!r}")
    registers, stack, local = map(int, found.groups())
    issued = instructions_of_main_loop(code) * WARPS * 32 / case.weights
    return Usage(registers, stack, local, compiled.metadata.shared, issued)


def _cuobjdump(option: str, file: str) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([program, option, file], capture_output=True, text=True, check=True).stdout


def instructions_of_main_loop(code: str) -> int:
    """How many instructions the longest loop has, from a jump backwards to its target; without a loop, all."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    addresses = [int(address, 16) for address, text in lines if not text.startswith("NOP")]
    jumps = [(int(at, 16), re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)) for at, text in lines]
    loops = [(int(jump[1], 16), at) for at, jump in jumps if jump and int(jump[1], 16) < at]
    return max([sum(first <= a <= last for a in addresses) for first, last in loops], default=len(addresses))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="compile every kernel without a GPU, and say what it takes")
    parser.add_argument("--arch", type=int, choices=SHARED_LIMIT, nargs="*", default=list(SHARED_LIMIT))
    failed = False
    print(f"Triton {triton.__version__}\n{'':38}  chip  registers  spills  shared bytes  instructions a weight")
    for arch, case in product(parser.parse_args(argv).arch, cases()):
        used = usage(case, arch)
        problems = used.problems(arch)
        failed = failed or bool(problems)
        spills = max(used.stack, used.local)
        line = f"{case.name:38} {arch:5}  {used.registers:9}  {spills:6}  {used.shared:12}  {used.instructions:21.1f}"
        line += f"  {'; '.join(problems)}"
        print(line.rstrip(), flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
