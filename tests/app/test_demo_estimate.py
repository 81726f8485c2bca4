from itertools import count

import pytest
import torch
from helpers.training import random_rows, tiny_base

from minilora.adapters.attach import adapter_names
from minilora.adapters.lora_config import LoRAConfig
from minilora.app import demo_estimate
from minilora.app.demo_estimate import NEW_TOKENS, Speeds, Work, in_words, measured_speeds

LORA = LoRAConfig(r=2, target_modules="all-linear")


def test_each_kind_of_work_has_its_speed():
    work = Work(trained=100, read=100, written=6)
    assert Speeds(training=50, reading=100, writing=2).seconds(work) == 100 / 50 + 100 / 100 + 6 / 2


def test_speeds_are_tokens_by_the_seconds_of_a_second_call(monkeypatch):
    ticks = count()
    clock = iter([0, 2, 10, 11, 20, 25, 30, 34])  # reading 2 s, a token each 1 s, with four more 5 s, a step 4 s
    monkeypatch.setattr(demo_estimate.time, "perf_counter", lambda: next(clock))
    rows = random_rows(6)
    calls = []
    monkeypatch.setattr(demo_estimate, "mean_nll", lambda *args: calls.append(next(ticks)))
    speeds = measured_speeds(tiny_base(), LORA, rows, batch_size=2, answers=5)
    tokens = sum(len(row.input_ids) for row in rows[:2])
    assert (speeds.training, speeds.reading, speeds.writing) == (tokens / 4, tokens / 2, 5 * NEW_TOKENS / (5 - 1))
    assert len(calls) == 2, "the first call is not counted"


@pytest.mark.parametrize("nf4", [False, True])
def test_the_model_is_left_as_it_was(nf4):
    model = tiny_base(nf4=nf4).eval().requires_grad_(False)
    before, ids = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.arange(9)[None]
    expected = model(ids)
    speeds = measured_speeds(model, LORA, random_rows(6), batch_size=4, answers=3)
    assert min(speeds.training, speeds.reading, speeds.writing) > 0
    assert adapter_names(model) == [] and not model.training
    assert torch.equal(model(ids), expected)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "seconds, words", [(3, "10 seconds"), (44, "40 seconds"), (100, "2 minutes"), (480, "8 minutes")]
)
def test_in_words(seconds, words):
    assert in_words(seconds) == words
