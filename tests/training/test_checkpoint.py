"""Checkpoints: whole or not there at all, and every random state in them."""

import copy
import errno
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.training import random_rows, run, timeless_log, tiny_model
from safetensors.torch import load_file, save_file

from minilora.errors import InputError
from minilora.training import checkpoint
from minilora.training.checkpoint import (
    check_tensors,
    checksums,
    latest_checkpoint,
    read_checkpoint,
    restore,
    restore_parameters,
    save_checkpoint,
)
from minilora.training.fingerprint import fingerprint


def write_failing(monkeypatch, failing_call):
    """Let one call of save_file write half of its file and then run out of disk."""
    calls, save_file = [], checkpoint.save_file

    def fail(tensors, path, *arguments, **options):
        calls.append(path)
        save_file(tensors, path, *arguments, **options)
        if len(calls) == failing_call:
            path.write_bytes(path.read_bytes()[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)


def test_a_full_disk_leaves_the_checkpoint_before_good(tmp_path, monkeypatch):
    settings = {"max_steps": 6, "save_every": 2, "keep_last": 1}
    run(tiny_model(dropout=0.2), random_rows(30), tmp_path / "straight", **settings)
    with monkeypatch.context() as patch:
        write_failing(patch, failing_call=2)
        with pytest.raises(InputError, match=r"cannot write .*checkpoint-000004: .*No space left.*; what was saved"):
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
    with pytest.raises(InputError, match=r"cannot write .*checkpoint-000004: .*No space left"):
        run(tiny_model(), rows, tmp_path, max_steps=4, save_every=2, resume=str(tmp_path / "checkpoint-000002"))
    assert (tmp_path / "checkpoint-000004" / "trainer_state.safetensors").read_bytes() == before


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_rename_that_fails_leaves_the_same_checkpoint_good(tmp_path, monkeypatch, error):
    """Between the two of them there is no folder of that name."""
    rows, settings = random_rows(30), {"max_steps": 4, "save_every": 2}
    run(tiny_model(), rows, tmp_path, **settings)
    before = (tmp_path / "checkpoint-000004" / "trainer_state.safetensors").read_bytes()
    replace = Path.replace

    def fail(path, target):
        if path.name == ".checkpoint-000004.tmp":
            raise error
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt):
        run(tiny_model(), rows, tmp_path, **settings, resume=str(tmp_path / "checkpoint-000002"))
    assert (tmp_path / "checkpoint-000004" / "trainer_state.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


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


# --- tensors and states that are not what was saved -------------------------------------------------------------------


def everything(model):
    """What a refused call must leave as it was."""
    states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    flags = [(name, p.requires_grad, p.dtype, p.grad is None) for name, p in model.named_parameters()]
    layers = [module.active for module in model.modules() if hasattr(module, "adapters")]
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return [states, flags, layers, [module.training for module in model.modules()]], tensors


def assert_unchanged(model, before):
    (flags, tensors), (now, tensors_now) = before, everything(model)
    assert now == flags
    assert all(torch.equal(tensor, tensors_now[name]) for name, tensor in tensors.items())


def without(key):
    return lambda tensors: tensors.pop(key)


def changed(key, change):
    return lambda tensors: tensors.update({key: change(tensors[key])})


A = "model.layers.1.mlp.up_proj.adapters.default.lora_A"
TENSOR_DAMAGE = [
    (without(f"parameter.{A}"), f"parameter.{A} is missing"),
    (changed(f"parameter.{A}", lambda t: t[:, 1:].contiguous()), f"parameter.{A} is float32 .*, and was saved as"),
    (changed(f"parameter.{A}", lambda t: t * math.nan), f"parameter.{A} does not have the values"),
    (without("random.cpu"), "random.cpu is missing"),
    (changed("random.cpu", lambda t: t[:-1]), "random.cpu is uint8"),
]
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq", "step"), "adamw_8bit": ("state1", "absmax2", "step")}


def moment_damage(name):
    B = A.replace("lora_A", "lora_B")  # which LoRA-FA trains too
    first, second, count = (f"optimizer.{key}.{B}" for key in MOMENTS[name])
    return [
        (without(first), f"{first} is missing"),
        (without(count), f"{count} is missing"),
        (changed(second, lambda t: t.double()), f"{second} is float64"),
        (changed(first, lambda t: t.flatten()[1:].contiguous()), f"{first} is"),
        (lambda tensors: tensors.update({f"{first}x": tensors[first].clone()}), f"{first}x was not saved there"),
    ]


@pytest.mark.parametrize(
    "settings",
    [{}, {"optimizer": "adamw_8bit"}, {"loraplus_lr_ratio": 16}, {"lora_fa": True}],
    ids=["AdamW", "8 bits", "LoRA+", "LoRA-FA"],
)
def test_tensors_that_are_not_those_saved_are_named_and_change_nothing(tmp_path, settings):
    name = settings.get("optimizer", "adamw")
    if name != "adamw":
        pytest.importorskip("bitsandbytes")
    rows, settings = random_rows(16), {"max_steps": 4, "save_every": 2} | settings
    run(tiny_model(r=128), rows, tmp_path, **settings)  # moments of 4096 numbers and more are kept in 8 bits
    path = tmp_path / "checkpoint-000004" / "trainer_state.safetensors"
    whole = load_file(path)
    model = tiny_model(r=128).eval()
    before = everything(model)
    for damage, message in TENSOR_DAMAGE + moment_damage(name):
        tensors = dict(whole)
        damage(tensors)
        save_file(tensors, path)
        refusal = f"cannot resume from .*checkpoint-000004: trainer_state.safetensors is damaged: {message}"
        with pytest.raises(InputError, match=refusal) as error:
            run(model, rows, tmp_path, resume="auto", **settings)
        assert "\n" not in str(error.value)
        assert_unchanged(model, before)
    save_file(whole, path)
    run(model, rows, tmp_path, resume="auto", **settings)


def in_json(*path, value):
    def change(state):
        for key in path[:-1]:
            state = state[key]
        if value is None:
            del state[path[-1]]
        else:
            state[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (in_json("random", "python", value=[3, [1, 2], None]), "the random state of Python is damaged"),
        (in_json("random", "numpy", 0, value=[1, 2]), "the random state of NumPy is damaged"),
        (in_json("random", "numpy", value=None), "the random state of NumPy is damaged"),
        (in_json("progress", "step", value="four"), "trainer_state.json is damaged: TypeError: step is 'four'"),
        (in_json("progress", "steps", value=4), "trainer_state.json is damaged"),
        (in_json("run", "settings", value=None), "trainer_state.json is damaged: KeyError: 'settings'"),
        (in_json("run", value=[]), "trainer_state.json is damaged"),
        (in_json("tensors", value=None), "KeyError: 'tensors'"),
        (in_json("tensors", value=[]), "AttributeError: 'list' object"),
        (in_json("tensors", "random.cpu", value=["uint8"]), "ValueError: not enough values"),
        (in_json("tensors", "random.cpu", value=7), "TypeError: 'int' object"),
    ],
)
def test_a_state_that_cannot_be_set_is_named_and_changes_nothing(tmp_path, damage, message):
    rows = random_rows(16)
    run(tiny_model(), rows, tmp_path, max_steps=2)
    path = tmp_path / "checkpoint-000002" / "trainer_state.json"
    state = json.loads(path.read_text())
    whole = copy.deepcopy(state["tensors"])
    damage(state)
    path.write_text(json.dumps(state))
    model = tiny_model()
    before = everything(model)
    with pytest.raises(InputError, match=f"cannot resume from .*checkpoint-000002: {message}") as error:
        run(model, rows, tmp_path, max_steps=2, resume="auto")
    assert "\n" not in str(error.value)
    assert_unchanged(model, before)
    if state.get("tensors") != whole:
        with pytest.raises(InputError, match="cannot take the best parameters from"):
            restore_parameters(tmp_path, 2, {})


def test_the_best_parameters_are_taken_from_a_whole_checkpoint_only(tmp_path):
    settings = {"eval_every": 1, "early_stopping_patience": 1, "max_steps": 2, "eval_rows": random_rows(4)}
    result = run(tiny_model(), random_rows(16), tmp_path, **settings)
    path = tmp_path / f"checkpoint-{result.best_step:06d}" / "trainer_state.safetensors"
    tensors = load_file(path)
    save_file(tensors | {f"parameter.{A}": tensors[f"parameter.{A}"] + 1}, path)
    model = tiny_model()
    parameters = dict(model.named_parameters())
    start = parameters[A].clone()
    with pytest.raises(InputError, match=f"best parameters from .*: trainer_state.safetensors is damaged: .*{A}"):
        restore_parameters(tmp_path, result.best_step, {A: parameters[A]})
    assert torch.equal(parameters[A], start)


def test_every_random_state_comes_back(tmp_path):
    model = tiny_model()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values())
    started_with = fingerprint(model, "default", parameters, {}, [], [])
    for draw in (random.random, np.random.standard_normal, lambda: torch.rand(())):
        draw()  # an odd number of normal draws: NumPy keeps the second of a pair for later
    random.gauss(0, 1)
    state = checkpoint.Progress(step=3)
    path = save_checkpoint(tmp_path, model, "default", parameters, optimizer, state, started_with, keep_last=1)

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
    saved = read_checkpoint(path, started_with)
    assert saved.progress == state
    restore(saved, model, "default", parameters, optimizer)
    assert draws() == expected


def test_nothing_is_pickled(tmp_path):
    run(tiny_model(), random_rows(16), tmp_path, max_steps=2)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".jsonl", ".safetensors", ".md"}
    json.loads((tmp_path / "checkpoint-000002" / "trainer_state.json").read_text())


# --- checksums: what is the same passes, and what is not is named -----------------------------------------------------

TENSORS = {
    "matrix": torch.arange(6.0).view(2, 3),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "bytes": torch.tensor([1, 2, 255], dtype=torch.uint8),
    "count": torch.tensor(7),
    "nothing": torch.zeros(0, 4),
}


def test_what_a_file_gives_back_is_what_was_saved(tmp_path):
    save_file(TENSORS, tmp_path / "file")
    check_tensors(load_file(tmp_path / "file"), json.loads(json.dumps(checksums(TENSORS))), "file")
    check_tensors({"matrix": TENSORS["matrix"].T.contiguous().T}, checksums({"matrix": TENSORS["matrix"]}), "file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"half": None}, "half is missing"),
        ({"another": torch.zeros(1)}, "another was not saved there"),
        ({"matrix": TENSORS["matrix"].T}, r"matrix is float32 \[3, 2\], and was saved as float32 \[2, 3\]"),
        ({"matrix": TENSORS["matrix"].double()}, r"matrix is float64 \[2, 3\], and was saved as float32 \[2, 3\]"),
        ({"half": torch.tensor([1.5, float("nan")]).bfloat16()}, "half does not have the values that were saved"),
        ({"count": torch.tensor(8)}, "count does not have the values"),
    ],
)
def test_what_differs_is_named(change, message):
    changed = {name: tensor for name, tensor in (TENSORS | change).items() if tensor is not None}
    with pytest.raises(InputError, match=f"^file is damaged: {message}"):
        check_tensors(changed, checksums(TENSORS), "file")
