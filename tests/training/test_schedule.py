"""The learning-rate schedule against transformers' schedules of the same names."""

import math

import pytest
import torch

from minilora.training.config import TrainConfig
from minilora.training.schedule import learning_rate_factor


@pytest.mark.parametrize("warmup_steps", [0, 7, 0.1])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_are_those_of_transformers(schedule, warmup_steps):
    optimization = pytest.importorskip("transformers.optimization")
    config = TrainConfig(schedule=schedule, warmup_steps=warmup_steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = math.ceil(0.1 * 33) if warmup_steps == 0.1 else warmup_steps
    name = "constant_with_warmup" if schedule == "constant" else schedule
    reference = optimization.get_scheduler(name, optimizer, warmup, num_training_steps=33)
    for step in range(34):
        assert learning_rate_factor(config, step, 33) == pytest.approx(reference.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        reference.step()
