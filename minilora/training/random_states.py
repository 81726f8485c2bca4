"""The random states of Python, NumPy and torch: seeded, taken and put back, so that runs repeat and resume."""

import random
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilora.errors import InputError


def seed_everything(seed: int) -> None:
    """Seed all of them."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # of every GPU too


def torch_random_states() -> dict[str, Tensor]:
    """Those of the CPU and of every GPU: uint8 tensors by name."""
    states = {"random.cpu": torch.get_rng_state()}
    for kind, gpus in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        if gpus.is_available():
            states |= {f"random.{kind}.{i}": state for i, state in enumerate(gpus.get_rng_state_all())}
    if torch.backends.mps.is_available():
        states["random.mps.0"] = torch.mps.get_rng_state()
    return states


def set_torch_random_states(tensors: Mapping[str, Tensor]) -> None:
    """Go on where `torch_random_states` was called, on as many GPUs as there were."""
    torch.set_rng_state(tensors["random.cpu"])
    with suppress(KeyError):  # a checkpoint made with fewer GPUs, or none
        for kind, gpus in (("cuda", torch.cuda), ("xpu", torch.xpu)):
            for i in range(gpus.device_count()):
                gpus.set_rng_state(tensors[f"random.{kind}.{i}"], i)
        if torch.backends.mps.is_available():
            torch.mps.set_rng_state(tensors["random.mps.0"])


def python_random_states() -> dict[str, Any]:
    """Those of Python and of NumPy, as JSON."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    return {"python": random.getstate(), "numpy": [np.asarray(keys).tolist(), position, has_gauss, gauss]}


def set_python_random_states(states: Mapping[str, Any]) -> None:
    """Go on where `python_random_states` was called."""
    _set_python(random, states)
    _set_numpy(np.random, states)


def _set_python(generator: Any, states: Mapping[str, Any]) -> None:
    version, internal, gauss = states["python"]
    generator.setstate((version, tuple(internal), gauss))


def _set_numpy(generator: Any, states: Mapping[str, Any]) -> None:
    keys, position, has_gauss, gauss = states["numpy"]
    generator.set_state(("MT19937", keys, position, has_gauss, gauss))


def check_random_states(states: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError where these are not what the other functions gave; they are tried on other generators."""
    for name, trial in (
        ("Python", lambda: _set_python(random.Random(), states)),
        ("NumPy", lambda: _set_numpy(np.random.RandomState(), states)),
        ("torch", lambda: torch.Generator().set_state(tensors["random.cpu"])),
    ):
        try:
            trial()
        except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise InputError(f"the random state of {name} is damaged: {type(error).__name__}: {error}") from None
