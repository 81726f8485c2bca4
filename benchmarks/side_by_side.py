"""side-by-side: a training alone, and two at a time on the same cores, by how long OpenMP's threads spin.

QLoRA of SmolLM2-135M in float32 on the demo's rows under minilora's `train`, each in a process of its own with as many
threads as there are cores. A speed is that of the median step.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.measure import machine
from benchmarks.output import Result
from benchmarks.training_cases import WARMUP, Case, Task, make_task
from benchmarks.training_contenders import minilora
from benchmarks.turns import Contender, Runner
from minilora.errors import InputError
from minilora_start import SPINS

CASE, STEPS = Case("4 demo rows", None, 4, True, torch.float32), 5
SETTINGS = {"300000, libgomp's own": {"GOMP_SPINCOUNT": "300000"}}
SETTINGS |= {turns: {"GOMP_SPINCOUNT": turns} for turns in ("10000", "3000", SPINS, "300")}
SETTINGS |= {"0, passive": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}}


def run(rounds: int | None, device: torch.device) -> Result:
    """Train with every setting, alone and two at a time; `rounds` is the number of counted steps."""
    if device.type != "cpu":
        raise InputError("the benchmark 'side-by-side' is of a CPU's cores: leave --device out")
    where, task = machine(device), make_task(CASE, WARMUP + (rounds or STEPS), device)
    raw = {name: [tokens_per_s(minilora, task, setting, n) for n in (1, 2)] for name, setting in SETTINGS.items()}
    rows = [
        {
            "turns until a thread sleeps": name,
            "alone, tokens/s": f"{sum(alone):.0f}",
            "two at a time": " and ".join(f"{speed:.0f}" for speed in two),
            "both, of alone": f"{sum(two) / sum(alone):.2f}",
        }
        for name, (alone, two) in raw.items()
    ]
    settings = {"case": str(CASE), "environment": SETTINGS}
    return Result("side-by-side", "Two trainings side by side", where, settings, rows, raw, partial(_plot, raw))


def tokens_per_s(build: Callable[[Any], Contender], task: Any, setting: Mapping[str, str], n: int) -> list[float]:
    """The speed of each of n processes that train on the task's rows at the same time."""
    with mock.patch.dict(os.environ, setting):  # which the processes take over
        runners = [Runner(build, task, _no_evaluation, task.device) for _ in range(n)]
    try:
        for runner in runners:
            runner.ready()
        with ThreadPoolExecutor(n) as threads:
            return list(threads.map(partial(_speed, task), runners))
    finally:
        for runner in runners:
            runner.close()


def _speed(task: Task, runner: Runner) -> float:
    speeds = []
    for examples in task.steps():
        started = perf_counter()
        runner.turn()
        speeds.append(sum(len(example.input_ids) for example in examples) / (perf_counter() - started))
    return median(speeds[WARMUP:])


def _no_evaluation(model: nn.Module, task: Task) -> None:
    return None


def _plot(raw: Mapping[str, list[list[float]]], figure: Any) -> None:
    axes = figure.subplots()
    for left, n, label in ((-0.2, 0, "alone"), (0.2, 1, "two at a time, together")):
        axes.bar([i + left for i in range(len(raw))], [sum(speeds[n]) for speeds in raw.values()], 0.4, label=label)
    axes.set(xticks=range(len(raw)), xticklabels=list(raw), ylabel="tokens/s")
    axes.legend()
