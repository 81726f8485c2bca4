"""The log's sinks: JSON lines, progress, TensorBoard, Weights & Biases."""

import json
import mmap
import re
import sys
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.terminal import Terminal
from helpers.training import random_rows, run, tiny_model

from minilora.errors import InputError
from minilora.training.log import JsonLines, ProgressSink, Smoothed, memory_mb, read_log
from minilora.training.loss import label_tokens

STEP = {"step": 3, "epoch": 0.5, "loss": 2.0, "learning_rate": 1e-4, "grad_norm": 0.5, "tokens": 100}
STEP |= {"label_tokens": 40, "tokens_per_s": 200.0, "seconds": 1.5, "rss_mb": 2048.0}


def test_one_json_object_a_step(tmp_path):
    rows = random_rows(12)
    result = run(tiny_model(), rows, tmp_path, eval_rows=rows[:2], max_steps=4, batch_size=3, eval_every=2)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert records == result.history
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert all(set(record) == set(STEP) for record in steps)
    assert steps[-1]["epoch"] == 1
    assert sum(record["tokens"] for record in steps) == sum(len(row.input_ids) for row in rows) == result.tokens
    assert sum(record["label_tokens"] for record in steps) == label_tokens(rows)
    assert all(a["seconds"] < b["seconds"] for a, b in pairwise(steps))
    assert [record["step"] for record in records if "eval_loss" in record] == [2, 4]


def test_a_log_cut_short_keeps_its_whole_lines_and_drops_repeated_steps(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "eval_loss": 1.0}\n{"step": 3}\n{"st')
    assert [record["step"] for record in read_log(path)] == [1, 2, 2, 3]
    sink = JsonLines(path, first_step=3)
    sink.write({"step": 3, "loss": 0.5})
    sink.close()
    assert read_log(path) == [{"step": 1}, {"step": 2}, {"step": 2, "eval_loss": 1.0}, {"step": 3, "loss": 0.5}]


@pytest.mark.parametrize("line", ["{", '"step"', '{"loss": 1.0}', '{"step": "1"}'])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(InputError, match=r"log\.jsonl:2 is no record of a training log: remove the line"):
        read_log(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_is_one_clear_error(tmp_path):
    sink = JsonLines(tmp_path / "log.jsonl", first_step=1)
    sink.file.close()
    sink.file = Path("/dev/full").open("w")  # noqa: SIM115 - the sink closes it
    with pytest.raises(InputError, match=r"cannot write .*log\.jsonl: No space left on device"):
        sink.write(STEP)
    sink.close()


def test_smoothing_starts_at_the_first_value_and_follows():
    smooth = Smoothed()
    assert "loss 2.0000" in smooth.status(STEP)
    assert "200 tokens/s" in smooth.status(STEP)
    for _ in range(100):
        status = smooth.status(STEP | {"loss": 1.0, "tokens_per_s": 50.0})
    assert status == "loss 1.0000 · lr 1.0e-04 · 50 tokens/s · 2.0 GB"  # 0.9^100 of the first value: 3e-5


def test_plain_lines_without_a_terminal(tmp_path, capsys):
    rows = random_rows(8)
    run(tiny_model(), rows, tmp_path, eval_rows=rows, max_steps=50, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"step 1/50 · loss .* tokens/s · .* GB · 0:0\d so far", lines[0]), "at once"
    assert re.fullmatch(r"step 50 · held-out loss \d\.\d{4}", lines[-2])
    assert re.fullmatch(r"step 50/50 · loss .* GB · done in 0:\d\d", lines[-1])
    assert len(lines) < 10, "now and then, not every step"


def test_plain_lines_come_by_the_clock(monkeypatch, capsys):
    clock = SimpleNamespace(now=0)
    monkeypatch.setattr("minilora.progress.clock", lambda: clock.now)
    sink = ProgressSink(first_step=1, total_steps=100)
    for step in range(1, 8):
        sink.write(STEP | {"step": step})
        clock.now += 4
    sink.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/100", "4/100", "7/100", "7/100"]
    assert lines[1].endswith("6:24 left")  # 96 steps of 4 s
    assert lines[3].endswith("stopped after 0:28")


def test_a_resumed_run_is_where_it_was(monkeypatch, capsys):
    clock = SimpleNamespace(now=0)
    monkeypatch.setattr("minilora.progress.clock", lambda: clock.now)
    sink = ProgressSink(first_step=91, total_steps=100)
    for step in range(91, 101):
        clock.now += 6
        sink.write(STEP | {"step": step})
    sink.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[1].startswith("step 93/100") and lines[1].endswith("0:42 left")  # 7 steps of 6 s
    assert lines[-1].startswith("step 100/100") and lines[-1].endswith("done in 1:00")


@pytest.mark.parametrize("columns", [80, 150])
def test_a_live_bar_on_a_terminal(monkeypatch, columns):
    with Terminal(monkeypatch, columns) as terminal:
        sink = ProgressSink(first_step=3, total_steps=10)
        sink.write(STEP)
        sink.write({"step": 3, "epoch": 0.5, "eval_loss": 1.25, "eval_seconds": 0.1})
        sink.close()
    shown = terminal.text()
    bar, *_, end = (line for line in shown.splitlines() if "step 3/10" in line)
    assert "step 3/10 · loss 2.0000 · lr 1.0e-04 · 200 tokens/s · 2.0 GB" in bar
    assert "0:00 so far" in bar and "━" in bar and "…" not in shown  # nothing is cut off
    assert end.endswith("2.0 GB · stopped after 0:00")
    assert "step 3 · held-out loss 1.2500" in shown


def test_nothing_is_shown_where_progress_is_off(tmp_path, monkeypatch, capsys):
    model, rows = tiny_model(), random_rows(8)
    monkeypatch.setattr("minilora.progress.clock", count(step=60).__next__)
    run(model, rows, tmp_path, eval_rows=rows, max_steps=2, progress=False)
    assert capsys.readouterr().err == ""
    run(model, rows, tmp_path / "other", eval_rows=rows, max_steps=2, progress=True)
    assert "held-out loss: 1 of 1 batches" in capsys.readouterr().err


def test_the_bar_is_taken_down_when_training_fails(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(ProgressSink, "close", lambda self: closed.append(self))
    model = tiny_model()
    next(p for p in model.parameters() if p.requires_grad).register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(RuntimeError):
        run(model, random_rows(8), tmp_path, progress=True)
    assert len(closed) == 1
    closed[0].stage.close(finished=False)


def test_tensorboard_holds_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = random_rows(8)
    result = run(tiny_model(), rows, tmp_path, eval_rows=rows, max_steps=3, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    expected = [(r["step"], pytest.approx(r["loss"], rel=1e-6)) for r in result.history if "loss" in r]  # float32
    assert losses == expected
    assert events.Scalars("eval/loss")[0].value == pytest.approx(result.eval_loss, rel=1e-6)


def test_weights_and_biases_gets_the_same_numbers(tmp_path, monkeypatch):
    logged = []
    fake_run = SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end")
    )
    started = {}
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **options: started.update(options) or fake_run)
    )
    rows = random_rows(8)
    result = run(tiny_model(), rows, tmp_path, eval_rows=rows, max_steps=2, wandb_project="adapters")
    assert (started["project"], started["config"]["max_steps"]) == ("adapters", 2)
    assert [entry[0] for entry in logged[:-1]] == [1, 2, 2]
    assert logged[0][1]["train/loss"] == result.history[1]["loss"]
    assert logged[2][1]["eval/loss"] == result.eval_loss
    assert logged[-1] == "end"


@pytest.mark.parametrize(
    ("settings", "module", "package"),
    [({"tensorboard": True}, "torch.utils.tensorboard", "tensorboard"), ({"wandb_project": "x"}, "wandb", "wandb")],
)
def test_a_missing_package_is_named_before_training(tmp_path, monkeypatch, settings, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=f"pip install {package}"):
        run(tiny_model(), random_rows(8), tmp_path, **settings)


def test_they_are_imported_only_if_asked_for(tmp_path, monkeypatch):
    for module in ("torch.utils.tensorboard", "wandb", "rich", "rich.progress"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it would raise
    run(tiny_model(), random_rows(8), tmp_path, max_steps=1)


def test_resident_memory_grows_by_what_is_allocated():
    before = memory_mb(torch.device("cpu"))["rss_mb"]
    with mmap.mmap(-1, 64 * 2**20) as block:  # from the system, since an allocator may have kept as much from earlier
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        grown = memory_mb(torch.device("cpu"))["rss_mb"] - before
    assert 50 < grown < 100  # 64 MiB, and whatever else the process does
