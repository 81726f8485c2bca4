"""gpu: everything that only a GPU can say, in one command: first that the kernels are right on it, then their times.

Correctness is tests/test_kernels_*.py, which without a GPU run in Triton's interpreter, and every test marked `gpu`;
not what is only compiled, for GPUs that are not at hand (test_kernels_aot.py).
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import nf4_products
from benchmarks.output import Result
from minilora.errors import InputError
from minilora.kernel_dispatch import measured_file

TESTS = Path(__file__).parents[1] / "tests"
PROCESSES = 8  # the tests compile some 260 variants of the kernels, one core each
SECONDS = 450.0  # for tests and times: under 8 minutes with what comes before and after


def run(rounds: int | None, device: torch.device) -> Result:
    """Run the tests on this GPU, then, if they pass, the benchmark `kernels`, whose crossovers NF4Linear will use."""
    if device.type != "cuda":
        raise InputError("the benchmark 'gpu' needs a CUDA device; 'kernels' also runs on a CPU")
    started = time.monotonic()
    kernels = [str(path) for path in sorted(TESTS.glob("test_kernels_*.py")) if path.stem != "test_kernels_aot"]
    on_the_gpu = os.environ | {"TRITON_INTERPRET": "0"}  # compiled, whatever the shell says
    for selection in (kernels, [str(TESTS), "-m", "gpu"]):
        options = ["-o", f"addopts=-q -n {PROCESSES}", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *options, *selection]
        left = SECONDS - (time.monotonic() - started)
        try:
            failed = subprocess.run(command, cwd=TESTS.parent, env=on_the_gpu, check=False, timeout=left).returncode
        except subprocess.TimeoutExpired:
            raise InputError(
                f"the tests took more than {SECONDS:.0f} seconds: no time is left to time anything"
            ) from None
        if failed:
            raise InputError(f"{' '.join(command[1:])} failed: nothing is timed that is not right")
    result = nf4_products.run(rounds, device, seconds=SECONDS - (time.monotonic() - started))
    if result.settings["crossovers"] is not None:
        try:
            remember(result)
        except OSError as error:  # a read-only installation: the times are worth keeping all the same
            result.notes.append(f"NF4Linear will not use these crossovers: {error}")
    return result


def remember(result: Result) -> None:
    """Write the crossovers of this GPU, beside those of others, where minilora.kernel_dispatch looks for them."""
    path = measured_file()
    table = json.loads(path.read_text(encoding="utf-8"))
    where = {"date": result.machine["date"], "versions": result.machine["versions"]}
    table[result.machine["device"]] = result.settings["crossovers"] | where
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)
