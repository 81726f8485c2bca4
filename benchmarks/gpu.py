"""gpu: everything that only a GPU can say, in one command: first that the kernels are right on it, then their times.

Correctness is the tests of kernels, which without a GPU run in Triton's interpreter, and every test marked `gpu`; not
what is only compiled, for GPUs that are not at hand (tests/kernels/test_aot.py). What fails is named below the times.
So is a kernel that minilora's own trials have found wrong; those of the shapes that are timed here stay in the user's
cache.
"""

import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import nf4_products
from benchmarks.output import Result
from minilora.errors import InputError
from minilora.progress import progress_bar

TESTS = Path(__file__).parents[1] / "tests"
PROCESSES = 8  # the tests compile some 260 variants of the kernels, one core each
SECONDS = 450.0  # for tests and times: under 8 minutes with what comes before and after
TEST_SECONDS = 200.0  # of them, at most, for the tests


def run(rounds: int | None, device: torch.device) -> Result:
    """Run the tests on this GPU, then the benchmark `kernels`."""
    if device.type != "cuda":
        raise InputError("the benchmark 'gpu' needs a CUDA device; 'kernels' also runs on a CPU")
    started = time.monotonic()
    files = [*TESTS.glob("kernels/test_*.py"), *TESTS.glob("*/test_kernel*.py"), TESTS / "nf4/test_dispatch.py"]
    wrong = failures([str(path) for path in sorted(files) if path.stem != "test_aot"], TEST_SECONDS)
    left = TEST_SECONDS - (time.monotonic() - started)
    # by name: the other files would be imported for nothing, with packages that a GPU's machine may lack
    of_gpus = [str(path) for path in sorted(TESTS.rglob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]
    marked = failures([*of_gpus, "-m", "gpu"], max(left, 1.0))
    result = nf4_products.run(rounds, device, seconds=SECONDS - (time.monotonic() - started))
    result.notes += [*wrong, *marked]
    return result


def failures(selection: list[str], seconds: float) -> list[str]:
    """What pytest says of each selected test that fails on this GPU, or cannot be run; [] if none."""
    options = ["-o", "addopts=-q -rfE --import-mode=importlib", "-p", "no:cacheprovider"]
    options += ["--continue-on-collection-errors"]
    if find_spec("xdist"):
        options += ["-n", str(PROCESSES)]
    command = [sys.executable, "-m", "pytest", *options, *selection]
    # compiled, whatever the shell says; and on lines that have room for what pytest says of a failure
    on_the_gpu = os.environ | {"TRITON_INTERPRET": "0", "COLUMNS": "300"}
    try:
        with progress_bar("gpu, tests", None):
            done = subprocess.run(
                command, cwd=TESTS.parent, env=on_the_gpu, check=False, timeout=seconds,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
    except subprocess.TimeoutExpired:
        return [f"{' '.join(command[1:])} took more than the {seconds:.0f} seconds that there were"]
    print(done.stdout)
    if done.returncode == 0:
        return []
    named = re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE)
    return named or [f"{' '.join(command[1:])} ended with status {done.returncode}"]
