"""The rows of `minilora train`: in every form of the recipe and of the flags, and nothing left out in silence."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers.training import PADDING, tiny_base

import minilora as ml
from minilora.app import cli
from minilora.app.run_rows import rows_of_a_run
from minilora.errors import InputError


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """a.jsonl with 40 rows, more/b.jsonl with 8, more/c.jsonl with 4."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more").mkdir()
    for name, n in {"a.jsonl": 40, "more/b.jsonl": 8, "more/c.jsonl": 4}.items():
        rows = [{"text": f"{name} {i}"} for i in range(n)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def given_to_train(monkeypatch, *argv):
    """The training and the held-out rows that `minilora train` comes to."""
    given = []

    def train(model, tokenizer, rows, config, eval_rows=None):
        given.extend([rows, eval_rows])
        return SimpleNamespace(adapter_dir="here")

    monkeypatch.setattr(cli.ModelOptions, "load", lambda self: (tiny_base(), PADDING))
    monkeypatch.setattr(cli.ml, "train", train)
    cli.main(["train", *argv])
    return given


@pytest.mark.parametrize(
    "recipe, flags, n",
    [
        ("data: a.jsonl", ["--data", "a.jsonl"], 40),
        ("data: more/*.jsonl", ["--data", "more/*.jsonl"], 12),
        ("data: [a.jsonl, 'more/*.jsonl']", ["--data", "a.jsonl", "more/*.jsonl"], 52),
        ("data: {a.jsonl: 0.25, more/*.jsonl: 2}", ["--data", "a.jsonl", "0.25", "more/*.jsonl", "2"], 34),
        ("data: {a.jsonl: 1}", ["--data", "a.jsonl", "1"], 40),
        ("data: a.jsonl\nmax_rows: 7", ["--data", "a.jsonl", "--max-rows", "7"], 7),
    ],
)
def test_recipe_and_flags_say_the_same(monkeypatch, capsys, tmp_path, recipe, flags, n):
    (tmp_path / "recipe.yaml").write_text(recipe + "\neval_data: [more/b.jsonl, more/c.jsonl]\n")
    from_recipe = given_to_train(monkeypatch, "recipe.yaml")
    from_flags = given_to_train(monkeypatch, *flags, "--eval-data", "more/b.jsonl", "more/c.jsonl")
    assert from_recipe == from_flags
    assert [len(rows) for rows in from_flags] == [n, 12]


def test_bad_rows_are_left_out_where_that_is_asked_for(monkeypatch, capsys, caplog, tmp_path):
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"text": ""}\nnonsense\n')
    with pytest.raises(SystemExit):
        cli.main(["train", "--data", "a.jsonl"])
    assert "2 of 42 rows cannot be used: a.jsonl:41: the text is empty" in capsys.readouterr().err
    for data in (["a.jsonl"], ["a.jsonl", "1"]):
        rows, _ = given_to_train(monkeypatch, "--data", *data, "--skip-bad-rows")
        assert len(rows) == 40
        assert "2 rows cannot be used and are left out (a.jsonl:41: the text is empty; a.jsonl:42: " in caplog.text
        caplog.clear()


def test_a_part_is_held_out_and_of_the_rest_the_first_are_taken(caplog):
    rows, held_out = rows_of_a_run({"a.jsonl": 0.5, "more/*.jsonl": 1}, None, split=0.2, max_rows=10)
    mixed = ml.mix_rows({"a.jsonl": 0.5, "more/*.jsonl": 1})
    train, expected = ml.split_rows(mixed, 0.2)
    assert (rows, held_out) == (train[:10], expected)
    assert caplog.messages[:3] == [
        "a.jsonl: 20 rows of 40, by its weight of 0.5",
        f"split=0.2: {len(expected)} rows are held out, {len(train)} are left to train on",
        f"max_rows=10: the first 10 of {len(train)} rows are trained on",
    ]


def test_nothing_is_said_where_nothing_is_left_out(caplog):
    rows, held_out = rows_of_a_run("a.jsonl", None, split=None, max_rows=40)
    assert (len(rows), held_out, caplog.messages) == (40, None, [])


def test_the_command_says_it_on_standard_error(tmp_path):
    argv = ["train", "--data", "a.jsonl", "0.5", "--split", "0.2", "--max-rows", "3", "--model", "no/such/folder"]
    done = subprocess.run([sys.executable, "-m", "minilora", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    said = done.stderr.splitlines()
    assert said[0] == "a.jsonl: 20 rows of 40, by its weight of 0.5"
    assert said[1].startswith("split=0.2: ") and said[2].startswith("max_rows=3: the first 3 of ")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"split": 0.1, "eval_data": "a.jsonl"}, "split and eval_data both say which rows are held out"),
        ({"split": 1.5}, "between 0 and 1, such as 0.05, not 1.5"),
        ({"max_rows": 0}, "max_rows must be at least 1, not 0"),
        ({"data": {"a.jsonl": -1}}, "a.jsonl: a weight is a number above 0, not -1"),
        ({"data": ["a.jsonl", "no/*"]}, "no file fits no/*"),
        ({"data": "more"}, "more is a folder; name its files, such as 'more/*.jsonl'"),
        ({"eval_data": "no.jsonl"}, "no.jsonl: cannot be read: No such file"),
    ],
)
def test_what_cannot_be_meant_is_said(settings, words):
    with pytest.raises(InputError) as caught:
        rows_of_a_run(**{"data": "a.jsonl", "eval_data": None, "split": None, "max_rows": None} | settings)
    assert words in str(caught.value)


def test_eval_takes_several_files(monkeypatch, tmp_path):
    given = []

    def compare(model, tokenizer, rows, few_shot_rows, max_new_tokens):
        given.extend([rows, few_shot_rows])
        raise InputError("enough")

    monkeypatch.setattr(cli.ModelOptions, "load", lambda self, adapter: (tiny_base(), PADDING))
    monkeypatch.setattr(cli.ml, "compare", compare)
    with pytest.raises(SystemExit):
        cli.main(["eval", "--data", "a.jsonl", "more/*", "--few-shot-data", "more/b.jsonl", "--adapter", "a"])
    assert [len(rows) for rows in given] == [52, 4]
