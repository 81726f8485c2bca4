import json
from importlib import import_module

import pytest
import torch
from helpers.training import random_rows

from minilora.app import demo
from minilora.app.bfcl import load_bfcl
from minilora.app.demo import BASE, FEW_SHOT, MERGED, TUNED, DemoConfig, run_demo, short_rows
from minilora.app.demo_estimate import Speeds, in_words
from minilora.data.examples import encode_rows
from minilora.errors import InputError
from minilora.evaluation.general_ability import GeneralAbility, passages, questions
from minilora.formats.load import load
from minilora.training.config import TrainConfig
from minilora.training.interrupt import TrainingInterrupted


@pytest.fixture
def short_answers(monkeypatch):
    """A demo in less time: shorter answers, and fewer rows beside the test's."""
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 20)
    monkeypatch.setattr(demo, "REHEARSAL_TOKENS", 16)
    monkeypatch.setattr(demo, "VALIDATION_ROWS", 4)
    asked, read = questions()[:8], passages()[:2]
    regression_check = import_module(
        "minilora.evaluation.general_ability"
    )  # the name minilora.general_ability is the function's
    monkeypatch.setattr(regression_check, "questions", lambda: asked)
    monkeypatch.setattr(regression_check, "passages", lambda: read)


def config(folder, **settings):
    return DemoConfig(
        test_rows=4,
        train=TrainConfig(output_dir=str(folder), learning_rate=2e-3, batch_size=4, max_length=100, **settings),
    )


@pytest.mark.model
def test_the_demo_leaves_what_it_promises(tmp_path, short_answers, capsys):
    report = run_demo(config(tmp_path, max_steps=4))
    out = capsys.readouterr().out
    assert list(report.scores) == [BASE, FEW_SHOT, TUNED, MERGED]
    assert report.scores[TUNED].loss < 0.8 * report.scores[BASE].loss  # four steps teach the format already
    assert all(label in out for label in report.scores)

    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["scores"][TUNED]["loss"] == report.scores[TUNED].loss
    assert len(metrics["scores"][BASE]["predictions"]) == 4
    assert (tmp_path / "log.jsonl").read_text().count('"grad_norm"') == 4
    assert "data:image/png" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "adapter/adapter_config.json").exists()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    import minilora as ml

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokens = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "merged").encode("One function call, please.")])
    ours, _ = ml.load(str(tmp_path / "merged"), quantize=None, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(tokens).logits
        # float32 sums in another order: logits of magnitude 20 agree to some 1e-5 of it
        torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.model
@pytest.mark.parametrize("speed, small, offered", [(500.0, False, False), (100.0, False, True), (100.0, True, False)])
def test_it_says_how_long_it_takes_and_offers_less_where_that_is_long(monkeypatch, capsys, speed, small, offered):
    _, tokenizer = load(demo.MODEL)
    rows = {name: short_rows(split, tokenizer, 100) for name, split in load_bfcl().items()}
    monkeypatch.setattr(demo, "measured_speeds", lambda *args: Speeds(speed, 10 * speed, speed))
    asked = DemoConfig(small=small)
    asked = asked.made_small() if small else asked
    demo.announce(asked, None, tokenizer, rows)
    said = " ".join(capsys.readouterr().err.split())
    examples = encode_rows(rows["train"], tokenizer, asked.train.max_length).examples
    seconds = Speeds(speed, 10 * speed, speed).seconds(demo.work(asked, examples))
    assert f"about {in_words(seconds)} from here" in said and (seconds > 600) == (speed == 100 and not small)
    assert ("`minilora demo --small` takes about" in said) == offered


def test_epochs_are_counted_as_the_trainer_counts_them():
    examples = random_rows(10)
    by_steps, by_epochs = (
        DemoConfig(train=TrainConfig(batch_size=4, eval_every=2, **length))
        for length in ({"max_steps": 6}, {"epochs": 2})
    )
    assert demo.work(by_epochs, examples) == demo.work(by_steps, examples)  # 10 rows are three steps of 4


def test_without_a_row_to_score_on_there_is_no_demo():
    with pytest.raises(InputError, match="test_rows must be at least 1, not 0"):
        DemoConfig(test_rows=0)


def test_the_small_demo_takes_what_is_smaller():
    small = DemoConfig().made_small()
    assert (small.test_rows, small.train.max_steps, small.train.eval_every) == (32, 48, 48)
    smaller = DemoConfig(test_rows=4, train=TrainConfig(max_steps=5)).made_small()
    assert (smaller.test_rows, smaller.train.max_steps, smaller.train.eval_every) == (4, 5, 5)
    assert smaller.made_small() == smaller


def test_what_is_rehearsed_is_not_what_the_regression_check_asks():
    from importlib.resources import files

    rehearsed = (
        files("minilora.app").joinpath("data_files/rehearsal_prompts.txt").read_text(encoding="utf-8").splitlines()
    )
    assert len(set(rehearsed)) == len(rehearsed) > 40
    assert not {text.lower() for text in rehearsed} & {question.lower() for question, _ in questions()}


@pytest.mark.model
def test_an_interrupted_demo_says_how_to_go_on(tmp_path, short_answers, monkeypatch):
    def interrupted(*args, **kwargs):
        raise TrainingInterrupted(tmp_path / "checkpoint-000003", 3, 120)

    monkeypatch.setattr(demo, "train", interrupted)
    monkeypatch.setattr(demo, "rehearsal_rows", lambda *args: [])
    monkeypatch.setattr(demo, "scored", lambda *args, **kwargs: None)
    monkeypatch.setattr(demo, "announce", lambda *args: None)
    monkeypatch.setattr(demo, "general_ability", lambda *args: GeneralAbility(1.0, 1.0, (0.0, 1.0), 1, []))
    with pytest.raises(KeyboardInterrupt, match="--resume auto"):
        run_demo(config(tmp_path, max_steps=120))


def test_a_folder_that_is_taken_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-000003").mkdir()
    monkeypatch.setattr(demo, "load", None)  # nothing is loaded
    with pytest.raises(InputError, match="checkpoint-000003 is there already"):
        run_demo(config(tmp_path, max_steps=120))


@pytest.mark.model
def test_short_rows_are_those_the_trainer_will_not_skip():
    _, tokenizer = load(demo.MODEL, quantize=None, dtype=torch.bfloat16)
    rows = load_bfcl()["validation"]
    kept = short_rows(rows, tokenizer, 100)
    assert 0 < len(kept) < len(rows)
    for row in rows:
        assert (row in kept) == (len(tokenizer.encode(tokenizer.apply_chat_template(row.messages))) <= 100)
