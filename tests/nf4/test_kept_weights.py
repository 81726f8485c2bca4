"""Dequantized weights kept for a while: the same bytes, made once, and within the free memory."""

import dataclasses
import gc
import threading
from pathlib import Path

import pytest
import torch
from helpers.training import random_rows, run, timeless_log, tiny_base, tiny_model, trained
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from minilora import machine
from minilora.evaluation.generate import generate_tokens
from minilora.nf4 import kept_weights
from minilora.nf4.kept_weights import keeping_weights, kept_weight, weights_that_fit
from minilora.nf4.linear import NF4Linear
from minilora.training.log import read_log

DTYPE = torch.float32


free_memory = kept_weights._free_memory


@pytest.fixture(autouse=True)
def enough_memory(monkeypatch):
    monkeypatch.setattr(kept_weights, "_free_memory", lambda: 2**30)


def layers(n=2):
    torch.manual_seed(0)
    return [NF4Linear.from_linear(nn.Linear(64, 64)) for _ in range(n)]


def test_inside_the_with_a_weight_is_made_once():
    first, second = (layer.quantized() for layer in layers())
    assert kept_weight(first, DTYPE) is None
    with keeping_weights():
        W = kept_weight(first, DTYPE)
        assert kept_weight(first, DTYPE) is W
        assert torch.equal(W, layers()[0].dequantize(DTYPE))
        assert torch.equal(kept_weight(second, DTYPE), layers()[1].dequantize(DTYPE))
        assert kept_weight(first, torch.bfloat16).dtype == torch.bfloat16
        reshaped = dataclasses.replace(first, shape=(32, 128))  # over the same memory
        assert torch.equal(kept_weight(reshaped, DTYPE), W.view(32, 128))
    assert kept_weight(first, DTYPE) is None
    assert not kept_weights._kept.weights


def test_products_are_the_same_and_read_the_kept_weight():
    layer = layers(1)[0]
    x = torch.randn(3, 64)
    expected = layer(x)
    with keeping_weights():
        assert torch.equal(layer(x), expected)
        kept_weight(layer.quantized(), DTYPE).zero_()
        assert not layer(x)[:, :].sub(layer.bias).any(), "this product is with the kept weight"
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("written", ["weight", "absmax", "nested_absmax", "offset"])
@pytest.mark.parametrize("replaced", [False, True])
def test_what_is_written_to_is_another_weight(written, replaced):
    layer, other = layers()
    x = torch.randn(3, 64)
    with keeping_weights():
        before = layer(x)
        if replaced:
            setattr(layer, written, getattr(other, written))
        else:
            getattr(layer, written).copy_(getattr(other, written))
        now = layer(x)
    assert not torch.equal(now, before)
    assert torch.equal(now, layer(x))


def test_statistics_made_in_inference_mode_are_not_trusted():
    """Nothing tells when they are written to."""
    layer, other = layers()
    x = torch.randn(3, 64)
    with torch.inference_mode():
        layer.absmax = layer.absmax.clone()
    with keeping_weights():
        layer(x)
        with torch.inference_mode():
            layer.absmax.copy_(other.absmax)
        kept = layer(x)
    assert torch.equal(kept, layer(x))


def test_withs_may_overlap():
    q = layers(1)[0].quantized()
    first, second = keeping_weights(), keeping_weights()
    first.__enter__()
    second.__enter__()
    W = kept_weight(q, DTYPE)
    first.__exit__(None, None, None)
    assert kept_weight(q, DTYPE) is W
    second.__exit__(None, None, None)
    assert kept_weight(q, DTYPE) is None


def test_an_abandoned_generator_may_end_while_a_weight_is_made(monkeypatch):
    """As the garbage collector may have it, which runs in whatever thread and line makes objects."""
    monkeypatch.setattr(kept_weights, "_kept", kept_weights._Kept())  # whose lock a failure would leave taken
    dequantize = kept_weights.codec.dequantize
    W = []

    def abandoned():
        with keeping_weights():
            yield

    def collect(q, *args, **kwargs):
        gc.collect()
        return dequantize(q, *args, **kwargs)

    def make():
        generator = abandoned()
        next(generator)
        generator, cycle = None, [generator]
        cycle.append(cycle)
        del cycle
        W.append(kept_weight(layers(1)[0].quantized(), DTYPE))

    monkeypatch.setattr(kept_weights.codec, "dequantize", collect)
    thread = threading.Thread(target=make, daemon=True)
    gc.disable()
    try:
        thread.start()
        thread.join(timeout=20)
    finally:
        gc.enable()
    assert not thread.is_alive()
    assert torch.equal(W[0], layers()[0].dequantize(DTYPE))
    assert (kept_weights._kept.users, kept_weights._kept.weights) == (0, {}), "nothing outlives the last `with`"


def test_a_model_made_in_inference_mode_generates():
    expected = generate_tokens(tiny_base(nf4=True), [[3, 4, 5]], max_new_tokens=3)
    with torch.inference_mode():
        model = tiny_base(nf4=True)
    assert generate_tokens(model, [[3, 4, 5]], max_new_tokens=3) == expected


def test_a_compiled_layer_is_not_compiled_anew():
    layer, x = layers(1)[0], torch.randn(3, 64)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, backend=graphs)
    expected = compiled(x)
    with keeping_weights():
        assert torch.equal(compiled(x), expected)
        with keeping_weights():
            compiled(x)
    assert graphs.frame_count == 1


def test_half_of_the_free_memory_is_taken_and_no_more(monkeypatch):
    monkeypatch.setattr(kept_weights, "_free_memory", lambda: 2 * 64 * 64 * 4)
    first, second = (layer.quantized() for layer in layers())
    with keeping_weights():
        assert kept_weight(first, DTYPE) is not None
        assert kept_weight(second, DTYPE) is None
    with keeping_weights():
        assert kept_weight(second, DTYPE) is not None


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux tells how much memory is free")
@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_less_than_the_machine(monkeypatch, tmp_path, version):
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "of no group")
    without = free_memory()
    assert without > 2**20
    folder, limit, used, total = (
        (tmp_path, "memory.max", "memory.current", "")
        if version == 2
        else (tmp_path / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    )
    folder.mkdir(exist_ok=True)
    (folder / used).write_text("5000\n")
    (folder / "memory.stat").write_text(f"anon 7\n{total}active_file 9\n{total}inactive_file 300\nslab 1\n")
    for written, free in (("6000", 1300), ("4000", 0)):
        (folder / limit).write_text(f"{written}\n")
        assert free_memory() == free
    (folder / limit).write_text("max\n" if version == 2 else f"{2**63 - 4096}\n")
    assert free_memory() > 2**20, "no limit"


def test_what_will_fit_is_what_is_kept(monkeypatch):
    small, large = NF4Linear.from_linear(nn.Linear(64, 64)), NF4Linear.from_linear(nn.Linear(64, 128))
    weights = [(layer.quantized(), DTYPE) for layer in (small, large, small)]
    assert weights_that_fit(weights) == (0, 0)
    monkeypatch.setattr(kept_weights, "_free_memory", lambda: 4 * (64 * 64 + 64 * 128))
    with keeping_weights(share=0.5):
        assert weights_that_fit(weights[:2]) == (1, 64 * 64 * 4)
        assert [kept_weight(*weight) is not None for weight in weights[:2]] == [True, False]
        assert weights_that_fit(weights[:2]) == (1, 64 * 64 * 4), "also when it is kept already"
    with keeping_weights(share=1.0):
        assert weights_that_fit(weights[:2]) == (2, 4 * (64 * 64 + 64 * 128))
        assert all(kept_weight(*weight) is not None for weight in weights)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_dequantizes_once_and_learns_the_same(monkeypatch, tmp_path, capsys, checkpointing):
    made = []
    dequantize = kept_weights.codec.dequantize
    monkeypatch.setattr(kept_weights.codec, "dequantize", lambda q, *a, **k: made.append(q) or dequantize(q, *a, **k))
    parameters, counts = [], []
    for keep in (True, False):
        model = tiny_model(nf4=True)
        settings = {"max_steps": 3, "batch_size": 4, "gradient_checkpointing": checkpointing, "eval_every": 2}
        run(model, random_rows(8), tmp_path / str(keep), random_rows(3), keep_weights=keep, progress=True, **settings)
        parameters.append(trained(model))
        counts.append(len(made))
        made.clear()
    kept, dequantized = parameters
    assert all(torch.equal(kept[name], dequantized[name]) for name in kept)
    in_4_bits = sum(isinstance(module, NF4Linear) for module in model.modules())
    assert counts[0] == in_4_bits and counts[1] > 5 * in_4_bits
    assert timeless_log(tmp_path / "True") == timeless_log(tmp_path / "False")
    about, without = (read_log(tmp_path / name / "log.jsonl")[0] for name in ("True", "False"))
    assert about["kept_weights"] == about["nf4_weights"] == in_4_bits and without["kept_weights"] == 0
    assert about["kept_weights_mb"] * 2**20 == 2 * sum(
        module.in_features * module.out_features for module in model.modules() if isinstance(module, NF4Linear)
    )  # bfloat16
    said = f"{in_4_bits} of {in_4_bits} NF4 weights stay dequantized between steps"
    assert capsys.readouterr().err.count(said) == 1


def test_generate_dequantizes_once_a_call_and_gives_the_same_tokens(monkeypatch):
    model = tiny_model(nf4=True)
    made = []
    dequantize = kept_weights.codec.dequantize

    def count(q, *args, **kwargs):
        made.append(q.codes.data_ptr())
        return dequantize(q, *args, **kwargs)

    monkeypatch.setattr(kept_weights.codec, "dequantize", count)
    prompts = [[3, 4, 5], [6, 7]]
    kept = generate_tokens(model, prompts, max_new_tokens=5)
    in_4_bits = sum(isinstance(module, NF4Linear) for module in model.modules())
    assert len(made) == len(set(made)) == in_4_bits
    monkeypatch.setattr(kept_weights, "_free_memory", lambda: 0)
    made.clear()
    assert generate_tokens(model, prompts, max_new_tokens=5) == kept
    assert len(made) == 5 * in_4_bits, "without memory, at every token"
