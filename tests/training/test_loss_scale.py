"""float16: gradients too small for it arrive, those too large are made again, and nothing else changes."""

import json
import math
from importlib import import_module

import pytest
import torch
from helpers.training import random_rows, run, tiny_model, trained
from torch import nn

from minilora.errors import InputError
from minilora.nf4.linear import NF4Linear
from minilora.training.checkpoint import GROWTH_INTERVAL, Progress
from minilora.training.loss_scale import FIRST_SCALE, needs_loss_scale
from minilora.training.result import DivergedError

TRAINING = import_module("minilora.training.train")  # the name minilora.train is the function's
ROWS = random_rows(16)
SETTINGS = {
    "max_steps": 6,
    "batch_size": 8,
    "eps": 1e-3,
    "learning_rate": 1e-2,
}  # eps: an update smooth in the gradient


def moved(model, tmp_path, **settings):
    start = trained(model)
    result = run(model, ROWS, tmp_path, **SETTINGS | settings)
    return {name: parameter - start[name] for name, parameter in trained(model).items()}, result


def difference(one, other):
    """Of all parameters' changes together, relative to the second."""
    one, other = (torch.cat([change.flatten() for change in changes.values()]).double() for changes in (one, other))
    return ((one - other).norm() / other.norm()).item()


def label_tokens(result):
    return [record["label_tokens"] for record in result.history if "loss" in record]


def small_gradients(model):
    """All that the blocks get back is 2⁻¹⁴ of what it would be; float16's smallest number is 2⁻²⁴."""
    model.model.layers[-1].register_forward_hook(lambda module, x, y: y.register_hook(lambda g: 2**-14 * g) and None)
    return model


def test_which_models_need_it():
    assert not needs_loss_scale(tiny_model()) and not needs_loss_scale(tiny_model(nf4=True))
    assert needs_loss_scale(tiny_model().half())
    assert needs_loss_scale(nn.Sequential(NF4Linear.from_linear(nn.Linear(64, 64), compute_dtype=torch.float16)))


def test_a_float16_model_learns_what_float32_learns(tmp_path):
    exact, _ = moved(tiny_model(), tmp_path / "float32")
    rounded, result = moved(tiny_model().half(), tmp_path / "float16")
    assert all(math.isfinite(record["loss"]) for record in result.history if "loss" in record)
    # some dozen roundings of 2⁻¹¹ on the way to a gradient, and AdamW divides it by its own size
    assert difference(rounded, exact) < 0.02


def test_gradients_that_float16_has_no_number_for_arrive(tmp_path, monkeypatch):
    exact, _ = moved(small_gradients(tiny_model()), tmp_path / "float32", eps=1e-9)
    scaled, _ = moved(small_gradients(tiny_model().half()), tmp_path / "scaled", eps=1e-9)
    monkeypatch.setattr(TRAINING, "FIRST_SCALE", 1.0)
    unscaled, _ = moved(small_gradients(tiny_model().half()), tmp_path / "unscaled", eps=1e-9)
    assert difference(scaled, exact) < 0.1 < 0.5 < difference(unscaled, exact)


def test_a_scale_that_is_too_large_is_lowered_and_the_step_made_again(tmp_path, monkeypatch):
    """A power of two rounds nothing: from whatever scale a run starts, it learns the same of the same rows."""
    expected, one = moved(tiny_model().half(), tmp_path / "one")
    monkeypatch.setattr(TRAINING, "FIRST_SCALE", 2.0**40)
    found, other = moved(tiny_model().half(), tmp_path / "other")
    assert [r["label_tokens"] for r in one.history if "loss" in r] == [
        r["label_tokens"] for r in other.history if "loss" in r
    ]
    assert difference(found, expected) < 0.01  # but where a number is below float16's normal ones, 6e-5


def test_the_scale_goes_through_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(TRAINING, "FIRST_SCALE", 2.0**40)
    whole = tiny_model(dropout=0.2).half()
    run(whole, ROWS, tmp_path / "whole", **SETTINGS)
    parted = tiny_model(dropout=0.2).half()
    run(parted, ROWS, tmp_path / "parted", save_every=3, **SETTINGS)
    again = tiny_model(dropout=0.2, seed=0).half()
    run(again, ROWS, tmp_path / "parted", resume=str(tmp_path / "parted/checkpoint-000003"), save_every=3, **SETTINGS)
    assert all(torch.equal(trained(again)[name], parameter) for name, parameter in trained(whole).items())


def test_an_infinite_loss_is_no_matter_of_the_scale(tmp_path):
    model = tiny_model().half()
    with torch.no_grad():
        model.model.norm.weight.fill_(6e4)
    with pytest.raises(DivergedError, match="step 1: the loss is"):
        run(model, ROWS, tmp_path, **SETTINGS)


def test_the_scale_grows_after_many_good_steps_only():
    progress = Progress(loss_scale=FIRST_SCALE)
    for _ in range(GROWTH_INTERVAL - 1):
        progress.add_step(1, 0.0)
    assert progress.loss_scale == FIRST_SCALE
    progress.add_step(1, 0.0)
    assert progress.loss_scale == 2 * FIRST_SCALE
    progress.lower_loss_scale()
    assert (progress.loss_scale, progress.steps_at_scale) == (FIRST_SCALE, 0)

    one = Progress()  # of bfloat16 and float32
    for _ in range(GROWTH_INTERVAL):
        one.add_step(1, 0.0)
    assert one.loss_scale == 1


@pytest.mark.parametrize("scale", [0.0, -2.0, 0.5, math.inf, math.nan])
def test_a_scale_that_no_run_can_have_is_damage(tmp_path, scale):
    run(tiny_model().half(), ROWS, tmp_path, **SETTINGS)
    state = tmp_path / "checkpoint-000006/trainer_state.json"
    content = json.loads(state.read_text())
    content["progress"]["loss_scale"] = scale
    state.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"cannot resume from .* is damaged: TypeError: loss_scale is"):
        run(tiny_model().half(), ROWS, tmp_path, resume="auto", **SETTINGS)
