import errno
import io
import json
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from helpers.training import PADDING, tiny_base, trained

import minilora as ml
from minilora.adapters.lora_config import LoRAConfig
from minilora.app import cli
from minilora.errors import InputError
from minilora.nf4.linear import NF4Linear
from minilora.training.result import DivergedError


def run(capsys, *argv):
    """(exit code, stdout, stderr) of one call of the command."""
    code = 0
    try:
        cli.main(list(argv))
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    return code, out, err


def test_help_names_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for command in ("demo", "train", "eval", "chat", "merge", "kernels"):
        assert command in out


def test_the_version_is_the_package_s(capsys):
    assert run(capsys, "--version") == (0, f"minilora {version('minilora')}\n", "")


@pytest.mark.parametrize("command", ["demo", "train", "eval", "chat", "merge", "kernels"])
def test_help_of_a_command_explains_its_flags(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    flags = [line for line in out.splitlines() if "--" in line]
    assert (len(flags) > 4 and "--model" in out) or command in ("demo", "kernels")


def test_a_recipe_fills_the_flags_and_flags_win(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: rows.jsonl\nlora: {r: 4}\ntrain: {learning_rate: 1e-3, max_steps: 7}\n")
    command = cli.parse(["train", str(recipe), "--learning-rate", "0.5", "--target-modules", "q_proj"])
    assert (command.data, command.lora.r, command.train.max_steps) == ("rows.jsonl", 4, 7)
    assert command.train.learning_rate == 0.5
    assert command.lora.target_modules in ("q_proj", ["q_proj"])
    assert command.lora.lora_alpha == cli.Train().lora.lora_alpha  # what neither says keeps its default


@pytest.mark.parametrize(
    "argv, message",
    [
        (["train"], "no training rows: give --data FILE"),
        (["train", "no.yaml"], "no.yaml: No such file"),
        (["train", "recipe"], "recipe: No such file"),
        (["train", "rows.jsonl"], "give --data rows.jsonl"),
        (["train", "rows.parquet"], "give --data rows.parquet"),
        (["train", "--data", "no.jsonl"], "no.jsonl"),
        (["train", "--r", "0"], "LoRAConfig: a rank must be a whole number of at least 1, not 0"),
        (["train", "--batch-size", "0"], "batch_size must be above 0, not 0"),
        (["chat", "--model", "no/such/folder", "--prompt", "hi"], "no/such/folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, monkeypatch, tmp_path, argv, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert message in err and len(err.strip().splitlines()) == 1


def test_a_misspelt_flag_or_command_is_named_with_what_there_is(capsys):
    code, _, err = run(capsys, "train", "--lerning-rate", "1e-3")
    assert code == 2 and "--lerning-rate" in err and "--learning-rate FLOAT" in err
    code, _, err = run(capsys, "trian")
    assert code == 2 and "trian" in err and "demo, train, eval, chat, merge" in err


def test_options_of_any_type_are_flags_too():
    flags = ["--init-lora-weights", "eva", "--eva-config", "rho", "1.5", "whiten", "true"]
    config = cli.parse(["train", *flags]).lora.eva_config
    assert (config["rho"], config["whiten"]) == (1.5, True)


def test_chat_reads_a_pipe_without_prompting(capsys, monkeypatch):
    asked = []

    def stream(model, tokenizer, messages, **_):
        asked.append([message["content"] for message in messages])
        yield from ("an", "swer\x1b[2J")  # which must not clear the screen

    monkeypatch.setattr(cli.ModelOptions, "load", lambda self, adapter: (tiny_base(), PADDING))
    monkeypatch.setattr(cli, "stream", stream)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    code, out, err = run(capsys, "chat", "--system", "be brief")
    assert (code, out, err) == (0, "answer\\x1b[2J\n" * 2, "")
    assert asked == [["be brief", "one"], ["be brief", "one", "answer\x1b[2J", "two"]]


@pytest.mark.parametrize(
    "raised, code, message",
    [
        (InputError("the thing; the way out"), 2, "minilora: the thing; the way out"),
        (DivergedError("step 3: loss is nan"), 1, "minilora: step 3: loss is nan"),
        (OSError(errno.ENOSPC, "No space left on device", "scores.json"), 1, "No space left on device: 'scores.json'"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("resume with --resume auto"), 130, "resume with --resume auto"),
    ],
)
def test_every_expected_end_has_its_exit_code_and_no_traceback(capsys, monkeypatch, raised, code, message):
    def fail(_):
        raise raised

    monkeypatch.setattr(cli.Demo, "run", fail)
    got, _, err = run(capsys, "demo")
    assert got == code
    assert message in err and "Traceback" not in err


def test_training_draws_the_adapter_with_its_seed(tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}')
    drawn = []

    def train(model, tokenizer, rows, config, eval_rows=None):
        drawn.append(trained(model))
        return SimpleNamespace(adapter_dir=tmp_path)

    monkeypatch.setattr(cli.ModelOptions, "load", lambda self: (tiny_base(), PADDING))
    monkeypatch.setattr(cli.ml, "train", train)
    for seed in (5, 5, 6):
        torch.seed()
        cli.main(["train", "--data", str(rows), "--seed", str(seed)])
    same, again, other = drawn
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert not all(torch.equal(same[name], other[name]) for name in same)


# A change far below a step of bfloat16's own weights is erased, one of a percent of a weight only by NF4.
@pytest.mark.parametrize("in_4_bits, size, warned", [(True, 1e-3, ""), (False, 1e-6, "warning: bfloat16 would erase")])
def test_a_merge_warns_of_the_format_that_it_writes_alone(capsys, tmp_path, monkeypatch, in_4_bits, size, warned):
    def load(self, adapter):
        model = tiny_base().to(torch.bfloat16)
        mlp = model.model.layers[0].mlp
        if in_4_bits:
            mlp.up_proj = NF4Linear.from_linear(mlp.up_proj)
        ml.add_adapter(model, LoRAConfig(r=2, target_modules=["layers.0.mlp.up_proj"]))
        torch.nn.init.normal_(mlp.up_proj.adapters["default"].lora_B, std=size)
        return model, PADDING

    monkeypatch.setattr(cli.ModelOptions, "load", load)
    monkeypatch.setattr(cli.ml, "save_pretrained", lambda *_, dtype: None)
    code, out, err = run(capsys, "merge", "--adapter", "a", "--output", str(tmp_path))
    assert code == 0, err
    assert "the adapter would be lost in 1 of 1 layers" in " ".join(out.split())
    assert warned in " ".join(out.split()) and ("warning" in out) == bool(warned)


@pytest.mark.parametrize("outtype, shown", [(None, "q8_0"), ("q4_0", "q4_0"), ("bf16", "bfloat16"), ("f32", "float32")])
def test_the_table_of_a_merge_to_gguf_is_that_of_its_type(capsys, tmp_path, monkeypatch, outtype, shown):
    def load(self, adapter):
        model = tiny_base()
        ml.add_adapter(model, LoRAConfig(r=2, target_modules=["layers.0.mlp.up_proj"]))
        torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.adapters["default"].lora_B, std=1e-2)
        return model, PADDING

    written = []
    monkeypatch.setattr(cli.ModelOptions, "load", load)
    monkeypatch.setattr(cli.ml, "save_gguf", lambda *_, outtype: written.append(outtype))
    flags = ["--outtype", outtype] if outtype else []
    code, out, err = run(capsys, "merge", "--adapter", "a", "--output", str(tmp_path / "model.gguf"), *flags)
    assert code == 0, err
    rows = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    assert rows == [shown, "nf4"]
    assert written == [outtype or "q8_0"]


def test_the_installed_command_answers():
    done = subprocess.run(
        [sys.executable, "-m", "minilora.app.cli", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "minilora" in done.stdout


@pytest.mark.model
def test_train_eval_merge_and_chat_follow_each_other(capsys, tmp_path, monkeypatch):
    """The whole path a newcomer takes with their own file, on the real model, a few steps long."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "rows.jsonl"
    answers = {"red": "stop", "green": "go", "yellow": "wait"}
    rows = [{"prompt": f"The light is {light}.", "completion": answer} for light, answer in answers.items()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        "data: rows.jsonl\neval_data: rows.jsonl\n"
        "lora: {r: 8, lora_alpha: 16, target_modules: all-linear}\n"
        "train: {output_dir: lights, max_steps: 24, batch_size: 3, learning_rate: 3e-3}\n"
    )
    code, out, err = run(capsys, "train", "recipe.yaml")
    assert code == 0, err
    adapter = "lights/adapter"
    assert adapter in out and (tmp_path / adapter / "adapter_config.json").exists()

    code, out, err = run(capsys, "eval", "--data", "rows.jsonl", "--adapter", adapter, "--output", "scores.json",
                         "--max-new-tokens", "8")  # fmt: skip
    assert code == 0, err
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert scores["tuned"]["metrics"]["exact_match"] == 1.0 > scores["base"]["metrics"]["exact_match"]

    code, out, err = run(capsys, "merge", "--adapter", adapter, "--output", "merged")
    assert code == 0, err
    assert "bfloat16" in out and "warning" not in out and "load it with --quantize none" in out
    code, out, err = run(capsys, "chat", "--model", "merged", "--quantize", "none", "--prompt", "The light is green.",
                         "--max-new-tokens", "8")  # fmt: skip
    assert code == 0, err
    assert out.strip().splitlines()[-1] == "go"

    code, _, err = run(capsys, "merge", "--adapter", adapter, "--output", "other", "--outtype", "q4_1")
    assert code == 2 and "--outtype is of GGUF files" in err
    code, out, err = run(capsys, "merge", "--adapter", adapter, "--output", "lights.gguf", "--outtype", "q4_1")
    assert code == 0, err
    assert "merged model saved to lights.gguf" in out and (tmp_path / "lights.Modelfile").exists()
    code, out, err = run(capsys, "chat", "--model", "lights.gguf", "--quantize", "none", "--prompt",
                         "The light is green.", "--max-new-tokens", "8")  # fmt: skip
    assert code == 0, err
    assert out.strip().splitlines()[-1] == "go"


@pytest.mark.model
@pytest.mark.parametrize("start", ["lora_ga", "eva"])
def test_a_start_that_needs_data_gets_the_training_rows(capsys, tmp_path, monkeypatch, start):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Count to {n}.", "completion": " ".join(map(str, range(1, n + 1)))} for n in range(3, 9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = run(capsys, "train", "--data", "rows.jsonl", "--init-lora-weights", start, "--r", "2",
                         "--target-modules", r".*layers\.[01]\.mlp\.up_proj", "--max-steps", "1")  # fmt: skip
    assert code == 0, err
    config = json.loads((tmp_path / "minilora-output/adapter/adapter_config.json").read_text())
    # LoRA-GA is saved as the plain LoRA of twice the rank; EVA shares the ranks out anew
    assert config["r"] == (4 if start == "lora_ga" else 2)
    assert config["init_lora_weights"] == (True if start == "lora_ga" else "eva")
