"""The training benchmark on a model of two tiny layers: its contenders train alike. Speed itself is never asserted."""

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from itertools import count

import pytest
import torch
from helpers.training import LLAMA
from torch import nn

from minilora.errors import InputError
from minilora.models.config import ModelConfig
from minilora.models.transformer import Transformer
from minilora.progress import with_progress
from minilora.training.loss import label_tokens

CPU = torch.device("cpu")
# Every width a multiple of NF4's block of 64: bitsandbytes' CPU kernel for inference needs it.
TINY = LLAMA | {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": False}


def tiny_case(benchmarks, *, quantize=False, dtype=torch.float32, gradient_checkpointing=False, also=()):
    Case = benchmarks.training_cases.Case
    return Case("tiny", 20, 2, quantize, dtype, gradient_checkpointing, learning_rate=2e-3, shape=TINY, also=also)


# --- turns -----------------------------------------------------------------------------------------------------------


def count_steps(file):
    """A contender that writes down the number of every step before it takes it."""
    from benchmarks.turns import Contender

    model = nn.Linear(1, 1)

    def train():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in (1, 2, 3):
            file.write_text(str(step))
            model(torch.ones(1)).sum().backward()
            optimizer.step()
        return [1.0, 2.0, 3.0]

    return Contender(model, train)


def refuse(_):
    raise InputError("not today")


def take_long(_):
    for _ in with_progress(range(3), 3, "Loading"):
        pass
    raise InputError("not today")


def break_down(_):
    raise KeyError("wheel")


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)


def evaluate(model, file):
    return float(model.weight.requires_grad)


def test_a_turn_is_one_step_of_the_optimizer(benchmarks, tmp_path):
    file = tmp_path / "step"
    runner = benchmarks.turns.Runner(count_steps, file, evaluate, CPU)
    try:
        runner.ready()
        assert not file.exists()
        for step in "123":
            runner.turn()
            time.sleep(0.05)  # in which a process that does not wait would be at its next step
            assert file.read_text() == step
        trained = runner.finish()
    finally:
        runner.close()
    assert (trained.losses, trained.held_out_loss) == ([1.0, 2.0, 3.0], 1.0)
    assert 0 < trained.loaded_mb <= trained.peak_mb


@pytest.mark.parametrize(("build", "message"), [(refuse, "not today"), (break_down, "KeyError: 'wheel'")])
def test_what_goes_wrong_is_told(benchmarks, build, message):
    ours, theirs = multiprocessing.Pipe()
    benchmarks.turns._serve(theirs, build, None, evaluate, CPU)
    assert ours.recv() == (message, None)


def test_how_far_a_turn_is_only_one_process_shows(benchmarks, monkeypatch, capsys):
    monkeypatch.setattr("minilora.progress.clock", count(step=60).__next__)
    with pytest.raises(InputError):
        take_long(None)
    assert "Loading" in capsys.readouterr().err
    ours, theirs = multiprocessing.Pipe()
    benchmarks.turns._serve(theirs, take_long, None, evaluate, CPU)
    assert ours.recv() == ("not today", None) and capsys.readouterr().err == ""


def test_a_process_that_is_killed_is_told(benchmarks):
    runner = benchmarks.turns.Runner(die, None, evaluate, CPU)
    try:
        with pytest.raises(InputError, match="its process ended without a word, as when memory runs out"):
            runner.ready()
    finally:
        runner.close()


# --- contenders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["TRL", "minilora", "minilora, transformers' class"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": True}, {"dtype": torch.bfloat16}, {"dtype": torch.bfloat16, "quantize": True}],
    ids=["fp32", "fp32 checkpointing", "bf16", "QLoRA bf16"],
)
def test_every_contender_trains_as_peft_does(benchmarks, name, settings):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("trl" if name == "TRL" else "peft")
    case = tiny_case(benchmarks, **settings)
    task = benchmarks.training_cases.make_task(case, 8, CPU)
    contenders = benchmarks.training_contenders.CONTENDERS["cpu"] | benchmarks.training_contenders.ALSO
    theirs, ours = (contenders[contender](task) for contender in ("PEFT", name))
    trained = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (theirs.model, ours.model)]
    assert trained[0] == trained[1] > 0
    expected = theirs.train()
    moved = max(p.abs().max() for name, p in theirs.model.named_parameters() if "lora_B" in name)
    assert len(expected) == 8 and moved > 5e-3, "B began at zero, and seven steps of about 1e-3 changed it"
    # float32: eight steps of rounding. bfloat16: 8 significant bits, averaged over some 40 tokens
    assert ours.train() == pytest.approx(expected, rel=1e-5 if case.dtype == torch.float32 else 2e-3)


def test_padding_is_on_the_right_and_not_learned(benchmarks):
    from minilora.data.examples import Example

    batch = benchmarks.training_contenders.padded([Example([5, 6, 7], [-100, 6, 7]), Example([8], [-100])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("missing", ["peft", "transformers", "bitsandbytes", "trl", "datasets"])
def test_a_missing_package_is_named(benchmarks, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=f"^{missing} is not installed: pip install {missing}$"):
        benchmarks.training_contenders.needed(missing)


# --- cases -----------------------------------------------------------------------------------------------------------


def test_the_floor_counts_every_product_once(benchmarks):
    """Against PyTorch's own count of a step's products, with attention's and those that no one needs taken out."""
    from torch.utils.flop_counter import FlopCounterMode

    pytest.importorskip("peft")
    task = benchmarks.training_cases.make_task(tiny_case(benchmarks), 1, CPU)
    model = benchmarks.training_contenders.peft_model(task)
    # the first layer's input has no gradient of its own, and on a large model that is no difference
    model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_())
    x = torch.tensor([row.input_ids for row in task.rows])
    with FlopCounterMode(display=False) as counter:
        model(input_ids=x).logits.sum().backward()
    counted = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if str(op) == "aten.mm")
    head = 4 * TINY["vocab_size"] * TINY["hidden_size"]  # at every position there, at labelled ones here
    least = benchmarks.training_cases.least_flops(ModelConfig.from_hf(TINY), task.rows)
    assert least == counted - head * (x.numel() - label_tokens(task.rows))


@pytest.mark.parametrize(("name", "parameters"), [("LLAMA_1B", 1.236e9), ("LLAMA_8B", 8.030e9)])
def test_shapes_of_the_gpu_have_llama_s_size(benchmarks, name, parameters):
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_hf(getattr(benchmarks.training_cases, name)))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-3)  # as Meta's cards say


@pytest.mark.model
@pytest.mark.parametrize("length", [None, 100])
def test_rows_of_the_demo_and_cut_ones(benchmarks, length):
    cases = benchmarks.training_cases
    task = cases.make_task(cases.Case("demo", length, 2, False, torch.float32), 3, CPU)
    assert len(task.rows) == 6
    lengths = {len(row.input_ids) for row in task.rows}
    learned = [sum(label != -100 for label in row.labels) / (len(row.labels) - 1) for row in task.rows]
    if length is None:
        assert max(lengths) <= cases.DEMO_LENGTH and max(learned) < 1 and len(task.held_out) == cases.HELD_OUT_ROWS
    else:
        with pytest.raises(InputError, match=r"^demo, LoRA, fp32: there are rows for \d+ steps, not for 9999$"):
            cases.make_task(task.case, 9999, CPU)
        assert lengths == {length} and set(learned) == {1.0} and not task.held_out


# --- from end to end --------------------------------------------------------------------------------------------------


def test_train_from_end_to_end(benchmarks, monkeypatch, tmp_path, capfd):
    """Four processes in turns; TRL's refuses, and is left out with its reason."""
    pytest.importorskip("peft")
    train_step = benchmarks.train_step
    case = tiny_case(benchmarks, also=("minilora, transformers' class",))
    contenders = benchmarks.training_contenders.CONTENDERS["cpu"]
    monkeypatch.setitem(train_step.CASES, "cpu", [case, tiny_case(benchmarks, dtype=torch.bfloat16)])
    monkeypatch.setitem(train_step.CONTENDERS, "cpu", {**contenders, "TRL": refuse})
    speeds = benchmarks.nf4_cases.Speeds(1e10, {torch.float32: 5e10, torch.bfloat16: 1e11})
    monkeypatch.setattr(train_step, "measured_speeds", lambda device: speeds)
    monkeypatch.setattr("minilora.progress.clock", count(step=60).__next__)
    result = train_step.run(2, CPU, only="FP32")
    lines = capfd.readouterr().err
    for stage in (
        "tiny, LoRA, fp32, starting: 3 of 4",
        "tiny, LoRA, fp32: 5 of 6",
        "tiny, LoRA, fp32, finishing: 2 of 3",
    ):
        assert f"\n{stage}" in f"\n{lines}"
    assert re.search(r"^train: 1 of 1 configurations · done in", lines, re.MULTILINE)
    assert (result.benchmark, result.notes) == ("train-fp32", ["tiny, LoRA, fp32: without TRL: not today"])
    assert [(row["configuration"], row["contender"]) for row in result.rows] == [
        ("tiny, LoRA, fp32", "PEFT"),
        ("tiny, LoRA, fp32", "minilora"),
        ("tiny, LoRA, fp32", "minilora, transformers' class"),
    ]
    raw = result.raw["tiny, LoRA, fp32"]
    assert raw["tokens"] == [40, 40] and [len(seconds) for seconds in raw["seconds"].values()] == [2, 2, 2]
    theirs, *ours = (trained["losses"] for trained in raw["trained"].values())
    assert len(theirs) == 3 and all(losses == pytest.approx(theirs, rel=1e-5) for losses in ours)
    json_path, png_path = benchmarks.output.write(result, tmp_path)
    assert json.loads(json_path.read_text())["raw"] == result.raw
    assert png_path.read_bytes().startswith(b"\x89PNG")


def test_what_is_compared(benchmarks):
    turns, train_step = benchmarks.turns, benchmarks.train_step
    measured = train_step.Measured(
        tokens=[100, 300],
        least_seconds=[0.5, 1.5],
        seconds={"PEFT": [2.0, 6.0], "minilora": [1.0, 2.0]},
        trained={
            "PEFT": turns.Trained([4.0, 2.0], 1.0, 200.0, 3.0),
            "minilora": turns.Trained([4.0, 2.002], 1.0, 90.0, 3.1),
        },
    )
    assert measured.tokens_per_s("minilora") == [100, 150]
    assert measured.ratio("minilora").median == 2.5  # of 2 and 3, not of the medians
    assert measured.share_of_floor("PEFT") == 0.25
    assert measured.loss_difference("minilora") == pytest.approx(1e-3)
    row = train_step._row("case", "minilora", measured)
    assert (row["peak, MiB"], row["loss, off PEFT's"], row["held-out"]) == ("90 (45%)", "1e-03", "3.1000")


def test_a_choice_of_nothing_is_refused(benchmarks, capsys):
    with pytest.raises(InputError, match="runs on cpu and cuda, not on mps"):
        benchmarks.train_step.run(1, torch.device("mps"))
    with pytest.raises(InputError, match=r"no configuration has '8 x 512' in its name; there are . demo rows, LoRA"):
        benchmarks.train_step.run(1, CPU, only="8 x 512")
    with pytest.raises(SystemExit):
        benchmarks.__main__.main(["merge", "--only", "bf16"])
    assert "--only chooses configurations of 'train'" in capsys.readouterr().err
