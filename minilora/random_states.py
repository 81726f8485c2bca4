"""The random states of Python, NumPy and torch: seeded, taken and put back, so that runs repeat and resume."""

import random
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "python_random_states",
    "seed_everything",
    "set_python_random_states",
    "set_torch_random_states",
    "torch_random_states",
]


def seed_everything(seed: int) -> None:
    """Seed all of them."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # of every GPU too


def torch_random_states() -> dict[str, Tensor]:
    """Those of the CPU and of every GPU: uint8 tensors by name."""
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"random.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_torch_random_states(tensors: Mapping[str, Tensor]) -> None:
    """Go on where `torch_random_states` was called, on as many GPUs as there were."""
    torch.set_rng_state(tensors["random.cpu"])
    with suppress(KeyError):  # a checkpoint made with fewer GPUs, or none
        for i in range(torch.cuda.device_count()):
            torch.cuda.set_rng_state(tensors[f"random.cuda.{i}"], i)


def python_random_states() -> dict[str, Any]:
    """Those of Python and of NumPy, as JSON."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    return {"python": random.getstate(), "numpy": [np.asarray(keys).tolist(), position, has_gauss, gauss]}


def set_python_random_states(states: Mapping[str, Any]) -> None:
    """Go on where `python_random_states` was called."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
