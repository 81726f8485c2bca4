"""The training loop: against transformers + PEFT, against itself split and resumed, and on bad input."""

import json
import math
import os
import random
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.training import (
    LLAMA,
    PADDING,
    random_rows,
    run,
    timeless_log,
    tiny_base,
    tiny_model,
    trained,
)

from minilora import variants
from minilora.adapters.attach import adapter_names, add_adapter, disable_adapters
from minilora.adapters.lora_config import LoRAConfig
from minilora.adapters.merge import merge
from minilora.data.batches import batches, collate, pack
from minilora.data.examples import Example
from minilora.data.rows import load_rows
from minilora.errors import InputError
from minilora.formats.peft import load_adapter
from minilora.models.transformer import Transformer
from minilora.text.tokenizer import Tokenizer
from minilora.training.config import TrainConfig
from minilora.training.interrupt import TrainingInterrupted
from minilora.training.log import read_log
from minilora.training.loss import held_out_loss, language_model_loss
from minilora.training.result import DivergedError
from minilora.training.train import train


def losses(result):
    return [record["loss"] for record in result.history if "loss" in record]


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_twenty_steps_equal_transformers_and_peft(tmp_path, packing):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    model = Transformer(tiny_model().config)
    model.load_state_dict(base.state_dict())
    add_adapter(model, LoRAConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    reference = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    theirs = dict(reference.named_parameters())
    for path, layer in model.named_modules():
        for weight in ("lora_A", "lora_B"):
            if hasattr(layer, "adapters"):
                ours = getattr(layer.adapters["default"], weight)
                ours.data.copy_(theirs[f"base_model.model.{path}.{weight}.default.weight"])

    rows, steps = random_rows(40), 20
    settings = {"max_steps": steps, "batch_size": 8, "weight_decay": 0.01, "warmup_steps": 3, "max_grad_norm": 0.2}
    result = run(model, rows, tmp_path, packing=packing, **settings)

    trainable = [parameter for parameter in reference.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.01)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 3, steps)
    order = [indices for epoch in range(4) for indices in batches(rows, 8, 0, epoch, group_by_length=not packing)]
    expected, norms = [], []
    for indices in order[:steps]:
        batch = collate([rows[i] for i in indices], 0)
        loss = reference(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trainable, 0.2).item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert max(norms) > 0.2, "clipping is part of what is compared"
    assert expected[-1] < expected[0]
    # float32 sums in another order (GEMM, attention, loss), carried through 20 steps of AdamW
    torch.testing.assert_close(torch.tensor(losses(result)), torch.tensor(expected), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        torch.tensor([record["grad_norm"] for record in result.history if "loss" in record]),
        torch.tensor(norms),
        rtol=1e-4,
        atol=0,
    )


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_step_is_the_same_however_it_is_split(tmp_path, batch_size):
    """Rows of 4 to 40 tokens: averaging the passes' means, the usual mistake, would be far off."""
    rows = random_rows(24, longest=40)
    # With eps = 1 AdamW's update is smooth in the gradient; with 1e-8 it is its sign, which rounding can flip.
    settings = {"max_steps": 6, "eps": 1.0, "learning_rate": 0.5, "weight_decay": 0.0}
    whole, split = tiny_model().double(), tiny_model().double()  # in which the order of a sum hardly shows
    start = trained(whole)
    one = run(whole, rows, tmp_path / "one", batch_size=6, **settings)
    many = run(
        split, rows, tmp_path / "many", batch_size=batch_size, gradient_accumulation_steps=6 // batch_size, **settings
    )
    torch.testing.assert_close(losses(many), losses(one), rtol=1e-12, atol=0)
    for name, parameter in trained(whole).items():
        moved = (parameter - start[name]).abs().max().item()
        assert moved > 0
        # float64 sums of the gradient in another order, relative to how far the parameter moved
        torch.testing.assert_close(trained(split)[name], parameter, rtol=0, atol=1e-11 * moved)


def test_the_accumulated_gradient_is_that_of_one_big_batch(tmp_path, monkeypatch):
    rows = random_rows(8, longest=40)
    model = tiny_model()
    batch = collate(rows, 0)
    logits = model(batch.input_ids, batch.attention_mask)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()

    seen = {}
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self: seen.update({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}),
    )
    run(model, rows, tmp_path, max_steps=1, batch_size=1, gradient_accumulation_steps=8, max_grad_norm=None)
    for name, gradient in expected.items():
        # float32 sums in another order, relative to the largest entry
        torch.testing.assert_close(seen[name], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("nf4", [False, True], ids=["float32", "NF4"])
def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path, nf4):
    rows = random_rows(16)
    plain, recomputed = (tiny_model(nf4=nf4, dropout=0.2) for _ in range(2))
    start = trained(plain)
    blocks_run = []
    recomputed.model.layers[0].register_forward_pre_hook(lambda *_: blocks_run.append(1))
    run(plain, rows, tmp_path / "plain", max_steps=4)
    run(recomputed, rows, tmp_path / "recomputed", max_steps=4, gradient_checkpointing=True)
    assert len(blocks_run) == 2 * 4, "each block ran forward twice a step"
    assert not recomputed.gradient_checkpointing, "the model is as it was"
    for name, parameter in trained(plain).items():
        assert not torch.equal(parameter, start[name])
        assert torch.equal(trained(recomputed)[name], parameter), "same operations, same dropout"


def test_gradient_checkpointing_of_a_transformers_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    rows, results = random_rows(16), []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
        add_adapter(model, LoRAConfig(target_modules="all-linear"))
        run(model, rows, tmp_path / str(recompute), max_steps=4, gradient_checkpointing=recompute)
        results.append(trained(model))
    for name, parameter in results[0].items():
        if "lora_B" in name:
            assert parameter.abs().max() > 0
        assert torch.equal(results[1][name], parameter)


def test_adapters_are_float32_masters_on_a_bfloat16_model(tmp_path):
    model = tiny_model(nf4=True).to(torch.bfloat16)
    result = run(model, random_rows(16), tmp_path, max_steps=8, learning_rate=1e-2)
    assert {parameter.dtype for parameter in trained(model).values()} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if not p.requires_grad} == {torch.bfloat16}
    rounded = [p.bfloat16().float().equal(p) for p in trained(model).values()]
    assert not any(rounded), "updates below bfloat16's resolution are kept"
    assert losses(result)[-1] < losses(result)[0]


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_in_the_mode_it_had(tmp_path, training):
    model = tiny_model().train(training)
    run(model, random_rows(16), tmp_path, eval_rows=random_rows(2), max_steps=2)
    assert {module.training for module in model.modules()} == {training}


def test_gradients_from_before_do_not_count(tmp_path):
    clean, used = tiny_model(), tiny_model()
    for parameter in used.parameters():
        parameter.grad = torch.ones_like(parameter)
    run(clean, random_rows(16), tmp_path / "clean", max_steps=2)
    run(used, random_rows(16), tmp_path / "used", max_steps=2)
    assert all(torch.equal(a, b) for a, b in zip(trained(clean).values(), trained(used).values(), strict=True))


def test_only_the_named_adapter_trains(tmp_path):
    model = tiny_model()
    add_adapter(model, LoRAConfig(r=2, target_modules=["q_proj"]), "second")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(
        model,
        PADDING,
        random_rows(16),
        TrainConfig(output_dir=str(tmp_path), progress=False, max_steps=4),
        adapter="second",
    )
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("q_proj.adapters.second.lora_" in name for name in changed)


def test_seeds(tmp_path):
    results = []
    for i, seed in enumerate((0, 0, 1)):
        model = tiny_model(dropout=0.3)
        run(model, random_rows(24), tmp_path / str(i), max_steps=4, seed=seed)
        draws = torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])
        results.append(torch.cat([p.flatten() for p in trained(model).values()] + [draws]))
    assert torch.equal(results[0], results[1]), "the same parameters, and all three generators where they were"
    assert not torch.equal(results[0], results[2])


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_every_few_steps_and_at_the_end(tmp_path):
    model, held_out = tiny_model(dropout=0.3), random_rows(5, seed=9)
    result = run(model, random_rows(24), tmp_path, eval_rows=held_out, max_steps=7, eval_every=3)
    evaluations = [(record["step"], record["eval_loss"]) for record in result.history if "eval_loss" in record]
    assert [step for step, _ in evaluations] == [3, 6, 7]
    assert result.eval_loss == evaluations[-1][1] == held_out_loss(model, held_out, 0)
    assert result.best_step == min(evaluations, key=lambda pair: pair[1])[0]


def test_evaluation_does_not_disturb_training(tmp_path):
    quiet, evaluated = tiny_model(dropout=0.3), tiny_model(dropout=0.3)
    run(quiet, random_rows(24), tmp_path / "quiet", max_steps=6)
    run(evaluated, random_rows(24), tmp_path / "evaluated", eval_rows=random_rows(5), max_steps=6, eval_every=1)
    assert all(torch.equal(a, b) for a, b in zip(trained(quiet).values(), trained(evaluated).values(), strict=True))


def test_early_stopping_takes_the_best_parameters_back(tmp_path):
    """Random held-out rows cannot be learned: with a high learning rate their loss soon rises."""
    model, held_out = tiny_model(), random_rows(8, seed=9)
    settings = {"eval_every": 2, "early_stopping_patience": 3, "keep_last": 1, "save_every": 1, "max_steps": 200}
    result = run(model, random_rows(16), tmp_path, eval_rows=held_out, **settings)
    evaluations = {record["step"]: record["eval_loss"] for record in result.history if "eval_loss" in record}
    assert result.stopped_early
    assert result.best_step == result.steps - 3 * 2 == min(evaluations, key=evaluations.get)
    assert result.eval_loss == evaluations[result.best_step] == held_out_loss(model, held_out, 0)
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == [f"checkpoint-{result.best_step:06d}", f"checkpoint-{result.steps:06d}"]

    again = tiny_model()
    resumed = run(again, random_rows(16), tmp_path, eval_rows=held_out, resume="auto", **settings)
    assert (resumed.steps, resumed.eval_loss, resumed.stopped_early) == (result.steps, result.eval_loss, True)
    assert all(torch.equal(a, b) for a, b in zip(trained(again).values(), trained(model).values(), strict=True))


# --- resuming ---------------------------------------------------------------------------------------------------------

HARD = {  # 7 steps an epoch, so that both 5 and 10 lie inside one
    "max_steps": 10,
    "batch_size": 2,
    "gradient_accumulation_steps": 3,
    "group_by_length": True,
    "eval_every": 2,
    "save_every": 5,
    "keep_last": 9,
}


def hard_run(folder, nf4=False, **settings):
    model = tiny_model(dropout=0.3, nf4=nf4)
    torch.manual_seed(torch.initial_seed() + 1)  # whatever random state a new process has
    result = run(model, random_rows(41), folder, eval_rows=random_rows(5, seed=9), **(HARD | settings))
    return model, result


def assert_same_run(folder, other):
    """Parameters, optimizer, random states (all in the last checkpoint) and the log, bit for bit."""
    last = "checkpoint-000010/trainer_state.safetensors"
    assert (folder / last).read_bytes() == (other / last).read_bytes()
    assert timeless_log(folder) == timeless_log(other)
    adapter = "adapter/adapter_model.safetensors"
    assert (folder / adapter).read_bytes() == (other / adapter).read_bytes()


@pytest.mark.parametrize(
    ("nf4", "packing"), [(False, True), (False, False), (True, True)], ids=["float32", "float32 padded", "NF4"]
)
def test_five_steps_and_five_resumed_are_ten(tmp_path, nf4, packing):
    hard_run(tmp_path / "straight", nf4, packing=packing)
    hard_run(tmp_path / "resumed", nf4, packing=packing)
    for step in range(6, 11):
        shutil.rmtree(tmp_path / "resumed" / f"checkpoint-{step:06d}", ignore_errors=True)
    _, result = hard_run(tmp_path / "resumed", nf4, packing=packing, resume="auto")
    assert result.steps == 10
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


def test_resuming_from_a_named_checkpoint_writes_over_the_later_ones(tmp_path):
    hard_run(tmp_path / "straight")
    hard_run(tmp_path / "resumed")
    hard_run(tmp_path / "resumed", resume=str(tmp_path / "resumed" / "checkpoint-000005"))
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


def test_resuming_a_finished_run_gives_its_result_again(tmp_path):
    model, result = hard_run(tmp_path)
    again, repeated = hard_run(tmp_path, resume="auto")
    assert (repeated.steps, repeated.tokens, repeated.loss) == (result.steps, result.tokens, result.loss)
    assert all(torch.equal(a, b) for a, b in zip(trained(again).values(), trained(model).values(), strict=True))


def test_resuming_stays_in_the_folder_of_the_run(tmp_path):
    run(tiny_model(), random_rows(8), tmp_path / "first", max_steps=2)
    with pytest.raises(InputError, match=r"set output_dir to .*first"):
        run(tiny_model(), random_rows(8), tmp_path / "second", resume=str(tmp_path / "first" / "checkpoint-000002"))


def test_auto_starts_anew_where_there_is_no_checkpoint(tmp_path):
    assert run(tiny_model(), random_rows(8), tmp_path, max_steps=2, resume="auto").steps == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 5e-3}, "learning_rate was 0.01 and is 0.005"),
        ({"max_steps": 12}, "max_steps was 4 and is 12"),
        ({"packing": False}, "packing was True and is False"),
        ({"betas": (0.9, 0.95)}, r"betas was \[0.9, 0.999\] and is \[0.9, 0.95\]"),
        ({"rows": random_rows(16, seed=1)}, "the training rows are not the same"),
        ({"eval_rows": random_rows(4, seed=1)}, "the held-out rows are not the same"),
        ({"model": {"seed": 1}}, "the base model is another"),
        ({"model": {"dropout": 0.1}}, "lora_dropout was 0.0 and is 0.1"),
        ({"model": {"lora_alpha": 16}}, "lora_alpha was 8 and is 16"),
        (
            {"model": {"r": 8}},
            r"r was 4 and is 8; 28 trained parameters differ, such as .*: \[4, 48\] before, \[8, 48\]",
        ),
    ],
)
def test_resuming_another_run_names_what_differs(tmp_path, change, named):
    settings = {"max_steps": 4, "rows": random_rows(16), "eval_rows": random_rows(4), "model": {}}
    run(tiny_model(), folder=tmp_path, **{k: v for k, v in settings.items() if k != "model"})
    settings |= change
    model = tiny_model(**settings.pop("model"))
    with pytest.raises(InputError, match=named):
        run(model, folder=tmp_path, resume="auto", **settings)


def test_resuming_where_rows_are_no_longer_packed_is_refused(tmp_path, monkeypatch):
    """As with another kind of attention in a transformers model: grouped by length, rows come in another order."""
    settings = {"max_steps": 2, "rows": random_rows(16)}
    run(tiny_model(), folder=tmp_path, **settings)
    monkeypatch.setattr(sys.modules["minilora.training.train"], "can_pack", lambda model: False)
    with pytest.raises(InputError, match="packing was True and is False"):
        run(tiny_model(), folder=tmp_path, resume="auto", **settings)


def test_a_new_run_does_not_overwrite_an_old_one(tmp_path):
    run(tiny_model(), random_rows(8), tmp_path, max_steps=2)
    with pytest.raises(InputError, match=r'checkpoint-000002 is there already: continue it with resume="auto"'):
        run(tiny_model(), random_rows(8), tmp_path, max_steps=2)


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


def interrupt_at(monkeypatch, step, number=signal.SIGINT, times=1):
    """Send the signal in the middle of a step: while its first batch is put together."""
    calls = []

    def pack_and_signal(examples):
        calls.append(1)
        if len(calls) == (step - 1) * HARD["gradient_accumulation_steps"] + 1:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return pack(examples)

    monkeypatch.setattr(sys.modules["minilora.training.train"], "pack", pack_and_signal)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_interrupted_training_is_saved_and_goes_on(tmp_path, monkeypatch, capsys, number):
    hard_run(tmp_path / "straight")
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, number)
        with pytest.raises(KeyboardInterrupt) as interrupted:
            hard_run(tmp_path / "resumed")
    assert isinstance(interrupted.value, TrainingInterrupted)
    assert interrupted.value.checkpoint == tmp_path / "resumed" / "checkpoint-000003"
    assert f"step 3 of 10 is saved in {interrupted.value.checkpoint}" in str(interrupted.value)
    assert "--resume auto" in str(interrupted.value)
    assert "stopping after this step" in capsys.readouterr().err
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    hard_run(tmp_path / "resumed", resume="auto")
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


def test_a_second_interrupt_stops_at_once(tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 3, times=2)
    with pytest.raises(KeyboardInterrupt) as interrupted:
        hard_run(tmp_path)
    assert not isinstance(interrupted.value, TrainingInterrupted)
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] == 2


# --- divergence -------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_nan_names_step_rows_and_checkpoint(tmp_path):
    model = tiny_model()
    rows = []
    for row in random_rows(12):
        ids = [token for token in row.input_ids if token != 63] or [5, 6]
        rows.append(Example(ids, ids, row.source))
    order = batches(rows, 4, 0, 0, True)
    poisoned = order[2][1]  # the third step's second row
    rows[poisoned] = Example([63, *rows[poisoned].input_ids[1:]], rows[poisoned].labels, rows[poisoned].source)
    with torch.no_grad():
        model.model.embed_tokens.weight = torch.nn.Parameter(
            model.model.embed_tokens.weight.clone(), requires_grad=False
        )  # no longer the head's: only the row that reads token 63 is poisoned
        model.model.embed_tokens.weight[63] = math.nan
    states = []
    model.model.embed_tokens.register_forward_pre_hook(lambda *_: states.append(trained(model)))
    settings = {"batch_size": 1, "gradient_accumulation_steps": 4, "save_every": 1}
    with pytest.raises(DivergedError) as diverged:
        run(model, rows, tmp_path, **settings)
    message = str(diverged.value)
    assert "step 3: the loss is nan" in message
    assert "A lower learning_rate" in message
    assert rows[poisoned].source + ";" in message, "that row"
    assert not any(
        f"{rows[i].source}," in message or f"{rows[i].source};" in message for i in order[2] if i != poisoned
    )
    assert str(tmp_path / "checkpoint-000002") in message
    assert all(torch.equal(p, states[-1][name]) and p.isfinite().all() for name, p in trained(model).items())


def test_a_gradient_that_is_infinite_stops_too(tmp_path):
    model = tiny_model()
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * math.inf)
    start, rows = trained(model), random_rows(8)
    with pytest.raises(
        DivergedError,
        match=r"step 1: the gradient norm is (nan|inf) on the rows .*no checkpoint.* Look at .* the model's weights",
    ) as error:
        run(model, rows, tmp_path, batch_size=8)
    assert all(row.source in str(error.value) for row in rows)
    assert all(torch.equal(p, start[name]) for name, p in trained(model).items())
    assert all(p.grad is None for p in model.parameters()), "nor is it left for whoever trains next"


# --- bad input --------------------------------------------------------------------------------------------------------


def no_adapter(model):
    return Transformer(model.config)


def norm_unfrozen(model):
    model.model.norm.weight.requires_grad_()
    return model


def merged(model):
    merge(model)
    return model


@pytest.mark.parametrize(
    ("spoil", "settings", "message"),
    [
        (no_adapter, {}, "no adapter named 'default'"),
        (norm_unfrozen, {}, "model.norm.weight is trainable, but the folder of adapter 'default' has no place for it"),
        (merged, {}, r"merged into the weights: call unmerge\(model\) first"),
        (None, {"rows": []}, "there are no training rows"),
        (None, {"eval_rows": []}, "there are no held-out rows"),
        (
            None,
            {"rows": [Example([5, 6, 7], [-100] * 3, "a.jsonl:3")]},
            "no training row is left: .*a.jsonl:3: no token to learn",
        ),
        (None, {"max_length": 3}, "no training row is left: 8 of 8 .*more than max_length=3"),
        (None, {"eval_every": 5}, "eval_every needs eval_rows"),
        (None, {"early_stopping_patience": 5}, "set eval_every too"),
        (None, {"rows": [*random_rows(1), {"text": "a"}]}, "a path, or all dicts or all Rows, not Example and dict"),
        (None, {"resume": "nowhere"}, "there is no checkpoint folder nowhere"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, spoil, settings, message):
    model = tiny_model()
    model = spoil(model) if spoil else model
    with pytest.raises(InputError, match=message) as error:
        run(model, **({"rows": random_rows(8), "folder": tmp_path} | settings))
    assert "\n" not in str(error.value)


def test_training_with_adapters_switched_off_is_an_error(tmp_path):
    model = tiny_model()
    with pytest.raises(InputError, match="leave disable_adapters before training"), disable_adapters(model):
        run(model, random_rows(8), tmp_path)


# In a transformers model that recomputes, any loss has a gradient: the embedding's output is made to need one.
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("own", [True, False])
def test_an_adapter_that_takes_no_part_in_the_loss_is_an_error(tmp_path, own, recompute):
    transformers = pytest.importorskip("transformers")
    model = tiny_model() if own else transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    model.spare = torch.nn.Linear(4, 4).requires_grad_(False)
    add_adapter(model, LoRAConfig(target_modules=["spare"]), "spare")
    config = TrainConfig(output_dir=str(tmp_path), progress=False, gradient_checkpointing=recompute)
    with pytest.raises(InputError, match="does not depend on adapter 'spare': its layers take no part in it"):
        train(model, PADDING, random_rows(8), config, adapter="spare")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adamw_8bit"}, "needs bitsandbytes"),
        ({"optimizer": "paged_adamw_8bit"}, "does not work on cpu"),
        ({"lora_fa": True}, "LoRA-FA needs an A that does not start at zero; model.embed_tokens"),
        ({"gradient_checkpointing": True, "offload_activations": True}, "on cpu leave it out"),
        ({"tensorboard": True}, "pip install tensorboard"),
        ({"wandb_project": "p"}, "pip install wandb"),
        ({"output_dir": "/dev/null/run"}, "output_dir /dev/null/run cannot be written to: Not a directory"),
        ({"resume": "auto", "learning_rate": 1e-3}, "learning_rate was 0.01 and is 0.001"),
    ],
)
def test_what_is_refused_changes_nothing(tmp_path, monkeypatch, settings, message):
    """Not which adapter is active, nor what trains, nor dtypes, gradients and modes."""
    rows = random_rows(8)
    if "resume" in settings:
        run(two_adapters(), rows, tmp_path, max_steps=2)
    for package in ("bitsandbytes", "bitsandbytes.optim", "torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    model = two_adapters()
    before, states = snapshot(model), torch.get_rng_state()
    with pytest.raises(InputError, match=message):
        run(model, rows, tmp_path, **{"max_steps": 2} | settings)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), states)


def two_adapters():
    """In bfloat16, the adapter that is not trained is the active one, and one layer is in a mode of its own."""
    model = tiny_base()
    add_adapter(model, LoRAConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    add_adapter(model, LoRAConfig(r=2, target_modules=["q_proj"]), "second")
    model.bfloat16().train()
    model.model.layers[0].eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    return model


def snapshot(model):
    return [
        [(name, p.requires_grad, p.dtype, p.grad is None, p.tolist()) for name, p in model.named_parameters()],
        [(module.training, getattr(module, "active", None)) for module in model.modules()],
    ]


def test_skipped_rows_are_reported(tmp_path, caplog):
    rows = [*random_rows(10, longest=20), Example([5] * 30, [5] * 30, "rows.jsonl:99"), Example([5, 6], [5, -100], "z")]
    result = run(tiny_model(), rows, tmp_path, max_length=25, max_steps=1)
    assert [(row.source, row.reason.split(",")[0].split(":")[0]) for row in result.skipped] == [
        ("rows.jsonl:99", "30 tokens"),
        ("z", "no token to learn"),
    ]
    assert "2 of 12 training rows skipped (rows.jsonl:99: 30 tokens, more than max_length=25; z: " in caplog.text


def test_the_folder_of_results(tmp_path):
    from minilora.formats.peft import load_adapter

    model = tiny_model()
    result = run(model, random_rows(16), tmp_path, max_steps=5, save_every=2, keep_last=2)
    assert result.adapter_dir == tmp_path / "adapter"
    assert result.checkpoint == tmp_path / "checkpoint-000005"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter",
        "checkpoint-000004",
        "checkpoint-000005",
        "log.jsonl",
    ]
    for folder in (result.adapter_dir, result.checkpoint):
        other = Transformer(model.config)
        other.load_state_dict(
            {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if "lora_" not in k}
        )
        load_adapter(other, folder)
        assert adapter_names(other) == ["default"]
        ids = torch.arange(3, 20)[None]
        assert torch.equal(other(ids), model(ids))


def test_rows_come_as_a_path_dicts_or_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    dicts = [{"prompt": f"a b c{i} ", "completion": f"d e f{i}"} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in dicts))
    results = []
    for i, rows in enumerate((path, str(path), dicts, load_rows(path))):
        config = TrainConfig(output_dir=str(tmp_path / str(i)), max_steps=2, progress=False)
        results.append(train(tiny_model(), character_tokenizer(), rows, config))
    assert all(losses(result) == losses(results[0]) for result in results)


def character_tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    characters = {character: i for i, character in enumerate("\0 abcdef0123456789")}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(characters, unk_token="\0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return Tokenizer(backend, {"eos_token": "\0"})


@pytest.mark.parametrize("start", ["eva", "lora_ga"])
def test_an_adapter_whose_start_needs_data_is_not_trained_without(tmp_path, start):
    model = tiny_model(init_lora_weights=start)
    rows = random_rows(4)
    with pytest.raises(InputError, match=rf"has seen no data: call minilora\.variants\.{start}\.initialize\("):
        run(model, rows, tmp_path, max_steps=1)
    batches = [torch.randint(0, LLAMA["vocab_size"], (4, 16)) for _ in range(2)]
    getattr(variants, start).initialize(model, batches, forward=language_model_loss)
    run(model, rows, tmp_path, max_steps=1)
    if start == "eva":  # the start of a loaded one was found before it was saved
        loaded = tiny_base()
        load_adapter(loaded, tmp_path / "adapter")
        run(loaded, rows, tmp_path / "again", max_steps=1)
