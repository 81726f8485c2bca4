"""When kernels are tried, what is kept, and what happens to those that fail: on a fake GPU with a clock of its own."""

import json
import logging
import random
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.trials import FakeGPU

from minilora.nf4.kernel_device import Contest, Kind, Shape
from minilora.nf4.kernel_trials import MOST_TRIED, PRODUCTS, ROUNDS, Trials

MATMUL = Kind("matmul", torch.bfloat16, 64, True)
GEMV, DEQUANTIZE = MATMUL._replace(kernel="gemv"), MATMUL._replace(kernel="dequantize")
W = (4096, 4096)


def crossover(limit: int) -> FakeGPU:
    """Its fused kernels win with up to `limit` rows."""
    return FakeGPU(lambda kind, shape, M: (1e-5, 2e-5 if limit >= M else 0.5e-5))


def tried(gpu: FakeGPU, kernel: str = "matmul") -> list[int]:
    return [M for kind, _, M in gpu.tried if kind.kernel == kernel]


# --- when -------------------------------------------------------------------------------------------------------------


def test_a_kind_is_proven_once_and_a_shape_is_timed_once(tmp_path: Path) -> None:
    gpu = crossover(64)
    trials = Trials(gpu, tmp_path)
    for _ in range(3):
        for M in (17, 20, 32):
            assert trials.wins(MATMUL, W, M)
        assert trials.wins(MATMUL, (1024, 4096), 32)
        assert not trials.wins(MATMUL, W, 65)
    assert gpu.proven == [DEQUANTIZE, MATMUL]
    assert gpu.tried == [
        (DEQUANTIZE, W, 1),  # PyTorch's way to a product begins with a dequantization: by which kernel?
        (MATMUL, W, 32),
        (DEQUANTIZE, (1024, 4096), 1),
        (MATMUL, (1024, 4096), 32),
        (MATMUL, W, 128),
    ]


@pytest.mark.parametrize("order", [1, -1], ids=["from few", "from many"])
def test_what_wins_wins_with_fewer_rows_and_what_loses_loses_with_more(tmp_path: Path, order: int) -> None:
    gpu = crossover(200)
    trials = Trials(gpu, tmp_path)
    for M in list(range(2, 10_000))[::order]:
        assert trials.wins(MATMUL, W, M) == (M <= 128), M  # powers of two: 256 rows speak for 129
    assert tried(gpu) == ([2, 4, 8, 16, 32, 64, 128, 256] if order == 1 else [4096, 2048, 1024, 512, 256, 128])
    assert trials.most_rows(MATMUL, W) == 128
    gpu.tried.clear()
    assert trials.wins(MATMUL, (8192, 1), 300) is False and trials.wins(MATMUL, (8192, 1), 64) is True
    assert trials.wins(MATMUL, (8192, 1), 3) is True and tried(gpu) == [512, 64]


def test_what_wins_with_the_most_rows_that_are_tried_wins_with_any(tmp_path: Path) -> None:
    gpu = crossover(10**9)
    trials = Trials(gpu, tmp_path)
    assert trials.most_rows(MATMUL, W) == 0
    assert trials.wins(MATMUL, W, 10**6)
    assert tried(gpu) == [MOST_TRIED]
    assert trials.most_rows(MATMUL, W) >= 2**40


def test_nothing_is_tried_while_something_is_recorded(tmp_path: Path) -> None:
    gpu = crossover(64)
    trials = Trials(gpu, tmp_path)
    gpu.recording = True
    assert not trials.wins(MATMUL, W, 32) and gpu.proven == []
    gpu.recording = False
    assert trials.wins(MATMUL, W, 32)
    gpu.recording = True
    assert trials.wins(MATMUL, W, 3), "known from 32 rows"
    assert not trials.wins(MATMUL, W, 33) and not trials.wins(GEMV, W), "not known"
    assert tried(gpu) == [32] and tried(gpu, "gemv") == []
    gpu.recording = False
    assert trials.wins(MATMUL, W, 33) and trials.wins(GEMV, W), "what was not known then is tried now"


def test_threads_wait_for_the_one_that_tries(tmp_path: Path) -> None:
    gpu = crossover(64)
    together, inside = threading.Barrier(8), []
    fault = gpu.fault

    def slow(kind: Kind) -> str:
        inside.append(kind)
        time.sleep(0.05)
        assert inside == [kind], "two at a time"
        inside.clear()
        return fault(kind)

    gpu.fault = slow  # type: ignore[method-assign]
    trials, results = Trials(gpu, tmp_path), []

    def ask(i: int) -> None:
        together.wait()
        results.append(trials.wins(MATMUL if i % 2 else GEMV, W, 32 if i % 2 else 1))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8
    assert sorted(gpu.proven) == sorted([DEQUANTIZE, MATMUL, GEMV]) and len(gpu.tried) == 3


# --- how long ---------------------------------------------------------------------------------------------------------


def test_both_take_turns_and_the_median_decides(tmp_path: Path) -> None:
    kernel, pytorch = iter([9.0, 1, 1, 1, 50, 50]), iter([9.0, 2, 2, 2, 1, 1])  # the first calls are not timed
    gpu = FakeGPU()

    def contest(kind: Kind, shape: Shape, M: int, by_kernel: bool) -> Contest:
        ways = (("kernel", kernel), ("pytorch", pytorch))
        first, second = (lambda what=what, times=times: gpu.take(what, 1e-6 * next(times)) for what, times in ways)
        return Contest(first, second, lambda a, b: "")

    gpu.contest = contest  # type: ignore[method-assign]
    assert Trials(gpu, tmp_path).wins(DEQUANTIZE, W)
    assert gpu.calls == ["kernel", "pytorch"] * (1 + ROUNDS)
    (found,) = json.loads(next(tmp_path.glob("*.json")).read_text())["times"].values()
    assert found == {"1": [1.0, 2.0]}, "microseconds"


def test_what_takes_long_is_timed_less_often(tmp_path: Path) -> None:
    gpu = FakeGPU(lambda kind, shape, M: (0.02, 0.01))
    assert not Trials(gpu, tmp_path).wins(GEMV, W)
    assert gpu.calls == 2 * (2 * ["kernel", "pytorch"]), "once, and once on the clock, for each of two kinds"


@dataclass(frozen=True)
class Speed:
    """bytes/s and bfloat16 operations/s; of which the fused kernel reaches such a share."""

    bytes_per_s: float
    flops: float
    fused: float = 0.5

    def cost(self, kind: Kind, shape: Shape, M: int) -> tuple[float, float]:
        n, launch = shape[0] * shape[1], 5e-6
        packed, whole = 0.52 * n / self.bytes_per_s, 2 * n / self.bytes_per_s
        if kind.kernel == "quantize":
            return launch + 3 * whole, launch + 150 * whole  # 300 bytes an element in plain PyTorch
        if kind.kernel == "dequantize":
            return launch + packed + whole, launch + 12 * whole
        product = 2 * M * n / self.flops
        kernel = max(2 * packed, product / self.fused)
        return launch + kernel, 2 * launch + packed + whole + max(whole, product)


@pytest.mark.parametrize("speed", [Speed(3.35e12, 700e12), Speed(0.3e12, 40e12), Speed(2e12, 250e12, 0.95)], ids=str)
@pytest.mark.parametrize("order", ["few first", "many first", "any"])
def test_an_8b_model_s_shapes_cost_less_than_two_seconds(tmp_path: Path, speed: Speed, order: str) -> None:
    """An H100's speed, a T4's, and one where fused kernels are as good as cuBLAS: Llama-3-8B, and every M there is."""
    gpu = FakeGPU(speed.cost, beside=lambda pytorch: 3e-3 + 2 * pytorch)  # files, random data, and the comparison
    trials = Trials(gpu, tmp_path)
    rows = {"few first": [2**i for i in range(14)], "many first": [2**i for i in range(14)][::-1]}
    for shape in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)):
        trials.wins(Kind("quantize", torch.bfloat16, 64, False), shape)
        trials.wins(DEQUANTIZE, shape)
        trials.wins(GEMV, shape)
        for kernel in ("matmul", "backward"):
            for M in rows.get(order) or random.Random(0).sample(range(1, 10_000), 300):
                trials.wins(MATMUL._replace(kernel=kernel), shape, M)
    assert 4 * 5 <= len(gpu.tried) <= 4 * (3 + 13 + 13)
    assert gpu.clock < 2.0, f"{gpu.clock:.2f} s in {len(gpu.tried)} trials"


# --- what fails -------------------------------------------------------------------------------------------------------


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


WRONG = "PyTorch does the work of the NF4 kernel (matmul, bfloat16, blocks of 64, double quantization), which failed on"


@pytest.mark.parametrize("how", ["is wrong", "raises", "raises on the shape", "differs on the shape"])
def test_what_fails_is_named_once_and_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = crossover(10**9)

    def fails(*_: object) -> str:
        raise ValueError("no such layout\nand more")

    if how == "is wrong":
        gpu.faults["matmul"] = "off by 3 times what rounding explains"
    elif how == "raises":
        monkeypatch.setattr(gpu, "fault", lambda kind: fails() if kind == MATMUL else "")
    else:
        late = Contest(fails if "raises" in how else lambda: 1, lambda: 2, lambda a, b: "off by 9" if a != b else "")
        contest = gpu.contest
        monkeypatch.setattr(gpu, "contest", lambda kind, *about: late if kind == MATMUL else contest(kind, *about))
    trials = Trials(gpu, tmp_path)
    for M in (2, 300, 2):
        assert not trials.wins(MATMUL, W, M)
    assert not trials.wins(MATMUL, (64, 64), 2)
    assert trials.wins(GEMV, W) and trials.wins(DEQUANTIZE, W), "others are used"
    assert trials.most_rows(MATMUL, W) == 0
    (text,) = warnings(caplog)
    why = {
        "is wrong": "off by 3 times what rounding explains",
        "differs on the shape": "off by 9 (matmul, bfloat16, blocks of 64, double quantization, 4096x4096, 2 rows)",
    }.get(how, "ValueError: no such layout")
    assert text == f"{WRONG} GPU Fake 100, driver 1.2, torch 2, Triton 3: {why}"

    caplog.clear()
    again = crossover(10**9)  # another process, where it would be right
    assert not Trials(again, tmp_path).wins(MATMUL, W, 5)
    assert again.proven == [] and warnings(caplog) == [text]


def test_what_fails_on_one_shape_is_not_used_on_others_any_more(tmp_path: Path) -> None:
    gpu = crossover(10**9)
    trials = Trials(gpu, tmp_path)
    assert trials.wins(MATMUL, W, 64) and trials.wins(GEMV, W)
    gpu.contest = lambda *about: Contest(lambda: 1, lambda: 2, lambda a, b: "off")  # type: ignore[method-assign]
    trials.wins(MATMUL, (64, 64), 64)
    assert not trials.wins(MATMUL, W, 64) and trials.wins(GEMV, W)


def test_a_kernel_that_breaks_the_gpu_ends_the_process_and_the_next_one_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = crossover(10**9)

    def breaks(kind: Kind) -> str:
        gpu.broken = True
        gpu.synchronize()
        return ""

    gpu.fault = breaks  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"kernel dequantize, .* has broken the GPU .*start it again: .* left out"):
        Trials(gpu, tmp_path).wins(DEQUANTIZE, W)
    assert not Trials(crossover(10**9), tmp_path).wins(DEQUANTIZE, W)
    assert "illegal memory access" in warnings(caplog)[-1]


def test_what_others_have_broken_is_not_the_kernels_fault(tmp_path: Path) -> None:
    gpu = crossover(10**9)
    gpu.broken = True
    with pytest.raises(RuntimeError, match="illegal memory access"):
        Trials(gpu, tmp_path).wins(DEQUANTIZE, W)
    assert Trials(crossover(10**9), tmp_path).wins(DEQUANTIZE, W)


def test_without_memory_for_a_trial_pytorch_does_it_and_nothing_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = crossover(10**9)
    contest, full = gpu.contest, [True]

    def no_memory(*about: object) -> Contest:
        if full[0]:
            raise torch.OutOfMemoryError("out of memory")
        return contest(*about)  # type: ignore[arg-type]

    gpu.contest = no_memory  # type: ignore[method-assign]
    trials = Trials(gpu, tmp_path)
    assert not trials.wins(DEQUANTIZE, W)
    full[0] = False
    assert not trials.wins(DEQUANTIZE, W), "not tried again and again"
    assert Trials(gpu, tmp_path).wins(DEQUANTIZE, W) and warnings(caplog) == []


# --- processes --------------------------------------------------------------------------------------------------------

PROCESS = """
import os, sys, time
from pathlib import Path
import torch
from helpers.trials import FakeGPU
from minilora.nf4.kernel_device import Kind
from minilora.nf4.kernel_trials import Trials

folder, number, ending = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
gpu = FakeGPU()

def fault(kind):
    with (folder / "proven").open("a") as file:
        file.write(f"{kind}\\n")
    if ending == "dies":
        os._exit(9)
    time.sleep(0.05)
    return ""

gpu.fault = fault
trials = Trials(gpu, folder)
for i in range(10):
    assert trials.wins(Kind("gemv", torch.bfloat16, 64, True), (64 * (i + 1), 64 * number), 1)
"""


def process(folder: Path, number: int, ending: str = "well") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, str(folder), str(number), ending]
    return subprocess.Popen(command, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True)


def test_processes_at_once_lose_nothing_and_prove_a_kind_once(tmp_path: Path) -> None:
    running = [process(tmp_path, number) for number in (1, 2)]
    seen = 0
    while any(each.poll() is None for each in running):
        for file in tmp_path.glob("*.json"):
            seen += json.loads(file.read_text())["trying"] is not None  # always whole
        time.sleep(0.002)
    assert [each.communicate()[1] for each in running] == [""] * 2
    assert seen
    (file,) = tmp_path.glob("*.json")
    found = json.loads(file.read_text())
    assert len(found["times"]) == 2 * 2 * 10 and found["trying"] is None
    assert sorted((tmp_path / "proven").read_text().splitlines()) == sorted(found["kinds"]), "each once"


def test_a_process_that_died_in_a_trial_is_not_followed_by_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dead = process(tmp_path, 1, "dies")
    dead.communicate()
    assert dead.returncode == 9
    gpu = FakeGPU()
    trials = Trials(gpu, tmp_path)
    assert not trials.wins(DEQUANTIZE, W), "the first to be tried"
    assert gpu.proven == []
    (text,) = warnings(caplog)
    assert "(dequantize, " in text and "a process ended while it was on trial; `minilora kernels --clear`" in text
    assert trials.wins(GEMV, W), "the others are tried"
    assert not Trials(FakeGPU(), tmp_path).wins(DEQUANTIZE, W), "and so it stays"


def test_an_interrupt_leaves_no_mark(tmp_path: Path) -> None:
    gpu = FakeGPU()

    def interrupted(kind: Kind) -> str:
        raise KeyboardInterrupt

    gpu.fault = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        Trials(gpu, tmp_path).wins(DEQUANTIZE, W)
    assert Trials(FakeGPU(), tmp_path).wins(DEQUANTIZE, W)


def test_the_kinds_of_products_are_files_of_the_kernels() -> None:
    folder = Path(__file__).parents[2] / "kernels" / "nf4"
    assert all((folder / f"{name}.py").is_file() for name in (*PRODUCTS, "dequantize", "quantize"))
