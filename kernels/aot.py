"""Every kernel compiled ahead of time, without a GPU: registers, spills and shared memory, from the chip's own code.

    python -m minilora.kernels.aot             all kernels for sm_80, sm_90 and sm_100
    python -m minilora.kernels.aot --arch 90

The table is what the cuobjdump that comes with Triton reads in the compiled code. A kernel fails that spills registers
to the stack, which lies in the GPU's slow memory, or asks for more shared memory than a block can have.
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
STATISTICS = {"codes_ptr": "*u8", "nested_ptr": "*fp32", "offset_ptr": "*fp32", "map_ptr": "*fp32", "pairs_ptr": "*i64"}


@dataclass(frozen=True)
class Case:
    """One kernel as one of its launches would compile it."""

    name: str
    kernel: Any
    dtype: str
    constants: dict[str, Any]

    def source(self) -> ASTSource:
        """The kernel with its argument types; pointers and row lengths are multiples of 16, as they are in use."""
        absmax = "*u8" if self.constants.get("DOUBLE") else "*fp32"
        types = (
            STATISTICS
            | {"absmax_ptr": absmax, "midpoints_ptr": "*fp32"}
            | dict.fromkeys([*"MNKRn", "add_stride", "SPLIT"], "i32")
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
        yield Case(f"dequantize {kind}", dequantize.dequantize_kernel, dtype, nf4 | {"BYTES": dequantize.BYTES})
        yield Case(f"gemv {kind}", gemv.gemv_kernel, dtype, nf4 | {"BN": gemv.BN, "BK": gemv.BK})
    for dtype, M in product(DTYPES, (1, 4096)):
        BM, BN = tile(DTYPES[dtype], M)
        if (dtype, M) == ("fp32", 4096):
            continue  # the same tile as for M = 1
        sizes = {"BLOCK_SIZE": 64, "DOUBLE": True, "BM": BM, "BN": BN, "DOT": dot_dtype(DTYPES[dtype])}
        yield Case(f"backward {dtype}, {BM} rows", backward.backward_kernel, dtype, sizes | {"BK": backward.BK})
        for extra in (False, True):
            more = {"BK": matmul.BK, "BR": 16, "ADD": extra, "LORA": extra}
            name = f"matmul {dtype}, {BM} rows{' + add + LoRA' if extra else ''}"
            yield Case(name, matmul.matmul_kernel, dtype, sizes | more)
    for dtype in DTYPES:
        blocks = {"BLOCK_SIZE": 64, "BLOCKS": quantize.BLOCKS, "SMALLEST": quantize.TINY}
        yield Case(f"quantize {dtype}", quantize.quantize_kernel, dtype, blocks)


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes: registers a thread, bytes of stack and local memory, of shared a block."""

    registers: int
    stack: int
    local: int
    shared: int

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
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}
    compiled = triton.compile(case.source(), target=GPUTarget("cuda", arch, 32), options=options)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(cuobjdump), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"{' '.join(command)} printed no resource usage: {text!r}")
    registers, stack, local = map(int, found.groups())
    return Usage(registers, stack, local, compiled.metadata.shared)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="compile every kernel without a GPU, and say what it takes")
    parser.add_argument("--arch", type=int, choices=SHARED_LIMIT, nargs="*", default=list(SHARED_LIMIT))
    failed = False
    print(f"Triton {triton.__version__}\n{'':38}  chip  registers  spills  shared bytes")
    for arch, case in product(parser.parse_args(argv).arch, cases()):
        used = usage(case, arch)
        problems = used.problems(arch)
        failed = failed or bool(problems)
        spills = max(used.stack, used.local)
        line = f"{case.name:38} {arch:5}  {used.registers:9}  {spills:6}  {used.shared:12}  {'; '.join(problems)}"
        print(line.rstrip(), flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
