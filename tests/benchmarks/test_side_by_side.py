"""The benchmark of two trainings at a time, on contenders that wait. Speed itself is never asserted."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.training import random_rows
from torch import nn

from minilora.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture
def side_by_side(benchmarks):
    return benchmarks.side_by_side


@dataclass
class Meeting:
    """Two steps, the first not counted, that end once both processes are in them."""

    folder: Path
    device: torch.device = CPU

    def steps(self):
        return [random_rows(1), random_rows(1)]


def meet(task):
    from benchmarks.turns import Contender

    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)

    def train():
        for step in range(2):
            (task.folder / f"{step} {os.getpid()}").write_text(os.environ["GOMP_SPINCOUNT"])
            waiting_since = time.monotonic()
            while len(list(task.folder.glob(f"{step} *"))) < 2:
                if time.monotonic() - waiting_since > 30:
                    raise InputError(f"step {step} was not taken at the same time")
                time.sleep(0.01)
            optimizer.step()
        return []

    return Contender(nn.Linear(1, 1), train)


def test_trainings_run_at_the_same_time_under_the_setting(side_by_side, tmp_path):
    before = dict(os.environ)
    speeds = side_by_side.tokens_per_s(meet, Meeting(tmp_path), {"GOMP_SPINCOUNT": "77"}, 2)
    assert len(speeds) == 2 and min(speeds) > 0
    assert [path.read_text() for path in tmp_path.iterdir()] == ["77"] * 4
    assert dict(os.environ) == before


def test_it_is_of_a_cpu(side_by_side):
    with pytest.raises(InputError, match="leave --device out"):
        side_by_side.run(1, torch.device("cuda"))
