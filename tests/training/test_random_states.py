"""Random states, taken and put back through JSON and safetensors."""

import json
import random

import numpy as np
import torch

from minilora.training.random_states import (
    python_random_states,
    seed_everything,
    set_python_random_states,
    set_torch_random_states,
    torch_random_states,
)


def draws():
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]


def test_a_seed_repeats_all_draws():
    seed_everything(3)
    first = draws()
    assert draws() != first
    seed_everything(3)
    assert draws() == first
    seed_everything(4)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_draws_go_on_where_the_states_were_taken():
    seed_everything(0)
    draws()  # the Gaussians come in pairs: the second of each is part of the state
    states, tensors = json.loads(json.dumps(python_random_states())), torch_random_states()
    expected = draws()
    seed_everything(1)
    set_python_random_states(states)
    set_torch_random_states(tensors)
    assert draws() == expected
