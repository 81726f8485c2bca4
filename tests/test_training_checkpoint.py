"""Checkpoints: whole or not there at all, and every random state in them."""

import errno
import json
import random

import numpy as np
import pytest
import torch
from training_helpers import random_rows, run, timeless_log, tiny_model

from minilora import training_checkpoint
from minilora.errors import InputError
from minilora.training_checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint


def write_failing(monkeypatch, failing_call):
    """Let one call of save_file write half of its file and then run out of disk."""
    calls, save_file = [], training_checkpoint.save_file

    def fail(tensors, path, *arguments, **options):
        calls.append(path)
        save_file(tensors, path, *arguments, **options)
        if len(calls) == failing_call:
            path.write_bytes(path.read_bytes()[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(training_checkpoint, "save_file", fail)


def test_a_full_disk_leaves_the_checkpoint_before_good(tmp_path, monkeypatch):
    settings = {"max_steps": 6, "save_every": 2, "keep_last": 1}
    run(tiny_model(dropout=0.2), random_rows(30), tmp_path / "straight", **settings)
    with monkeypatch.context() as patch:
        write_failing(patch, failing_call=2)
        with pytest.raises(OSError, match="No space left"):
            run(tiny_model(dropout=0.2), random_rows(30), tmp_path / "full", **settings)
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["checkpoint-000002", "log.jsonl"]
    run(tiny_model(dropout=0.2), random_rows(30), tmp_path / "full", resume="auto", **settings)
    state = "checkpoint-000006/trainer_state.safetensors"
    assert (tmp_path / "full" / state).read_bytes() == (tmp_path / "straight" / state).read_bytes()
    assert timeless_log(tmp_path / "full") == timeless_log(tmp_path / "straight")


def test_a_failed_rewrite_leaves_the_same_checkpoint_good(tmp_path, monkeypatch):
    rows = random_rows(30)
    run(tiny_model(), rows, tmp_path, max_steps=4, save_every=2)
    before = (tmp_path / "checkpoint-000004" / "trainer_state.safetensors").read_bytes()
    write_failing(monkeypatch, failing_call=1)
    with pytest.raises(OSError, match="No space left"):
        run(tiny_model(), rows, tmp_path, max_steps=4, save_every=2, resume=str(tmp_path / "checkpoint-000002"))
    assert (tmp_path / "checkpoint-000004" / "trainer_state.safetensors").read_bytes() == before


def test_what_a_kill_in_the_middle_left_behind_is_no_checkpoint(tmp_path):
    rows = random_rows(30)
    run(tiny_model(), rows, tmp_path, max_steps=2, save_every=2)
    (tmp_path / ".checkpoint-000004.tmp").mkdir()
    (tmp_path / ".checkpoint-000004.tmp" / "trainer_state.json").write_text("{")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-000002"


def test_checkpoints_are_ordered_by_number(tmp_path):
    for name in ("checkpoint-999999", "checkpoint-1000000", "checkpoint-000010", "checkpoint-best"):
        (tmp_path / name).mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1000000"
    assert latest_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("name", ["trainer_state.json", "trainer_state.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut short", "garbage"])
def test_a_damaged_checkpoint_is_one_clear_error(tmp_path, name, damage):
    rows = random_rows(16)
    run(tiny_model(), rows, tmp_path, max_steps=2)
    path = tmp_path / "checkpoint-000002" / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "cut short" else b"[1, 2]")
    with pytest.raises(InputError, match=r"cannot resume from .*checkpoint-000002") as error:
        run(tiny_model(), rows, tmp_path, max_steps=2, resume="auto")
    assert "\n" not in str(error.value)


def test_every_random_state_comes_back(tmp_path):
    model = tiny_model()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values())
    fingerprint = training_checkpoint.fingerprint(model, "default", parameters, {}, [], [])
    for draw in (random.random, np.random.standard_normal, lambda: torch.rand(())):
        draw()  # an odd number of normal draws: NumPy keeps the second of a pair for later
    random.gauss(0, 1)
    state = training_checkpoint.Progress(step=3)
    path = save_checkpoint(tmp_path, model, "default", parameters, optimizer, state, fingerprint, keep_last=1)

    def draws():
        return (
            random.gauss(0, 1),
            random.random(),
            np.random.standard_normal(),
            np.random.rand(),
            torch.rand(3).tolist(),
        )

    expected = draws()
    draws()
    assert load_checkpoint(path, model, "default", parameters, optimizer, fingerprint) == state
    assert draws() == expected


def test_nothing_is_pickled(tmp_path):
    run(tiny_model(), random_rows(16), tmp_path, max_steps=2)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".jsonl", ".safetensors", ".md"}
    json.loads((tmp_path / "checkpoint-000002" / "trainer_state.json").read_text())
