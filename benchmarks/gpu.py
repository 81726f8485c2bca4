"""gpu: everything that only a GPU can say, in one command: first that the kernels are right on it, then their times.

Correctness is tests/test_kernels_*.py, which without a GPU run in Triton's interpreter, and every test marked `gpu`;
not what is only compiled, for GPUs that are not at hand (test_kernels_aot.py).
"""

import json
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
    for selection in (kernels, [str(TESTS), "-m", "gpu"]):
        options = ["-o", f"addopts=-q -n {PROCESSES}", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *options, *selection]
        if subprocess.run(command, cwd=TESTS.parent, check=False).returncode:
            raise InputError(f"{' '.join(command[1:])} failed: nothing is timed that is not right")
    result = nf4_products.run(rounds, device, seconds=SECONDS - (time.monotonic() - started))
    if result.settings["crossovers"] is not None:
        remember(result)
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
