"""Every piece of work that may take longer than some seconds says how far it is: none may fall silent."""

import json
import re
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers.chat import CHATML, assistant, tiny, user
from helpers.training import LLAMA, random_rows, run, tiny_base, tiny_model

import minilora as ml
import minilora.testing
from minilora.formats import fetch
from minilora.formats.fetch import Wheel
from minilora.models.config import ModelConfig
from minilora.models.transformer import Transformer
from minilora.text.tokenizer import Tokenizer
from minilora.training.loss import language_model_loss
from minilora.variants import eva, lora_ga

BATCHES = [torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def chat(adapter: bool = False) -> tuple[Transformer, Tokenizer]:
    """A random model, with an adapter if asked for, and a tokenizer."""
    tokenizer = tiny(CHATML, eos_token="<|im_end|>")
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_hf(LLAMA | {"vocab_size": len(tokenizer), "max_position_embeddings": 512}))
    if adapter:
        ml.add_adapter(model, ml.LoRAConfig(r=2, target_modules="all-linear"))
    return model, tokenizer


def conversations(folder: Path) -> Path:
    rows = [{"messages": [user(f"a bee {i}"), assistant("the north")]} for i in range(3)]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def load(folder: Path) -> None:
    model, tokenizer = chat()
    ml.save_pretrained(model, tokenizer, folder / "model")
    ml.load(folder / "model")


def train(folder: Path) -> None:
    rows = random_rows(6)
    run(tiny_model(), rows, folder, eval_rows=rows, max_steps=2, progress=True)


def start_from_data(start: str, folder: Path) -> None:
    model = tiny_base()
    ml.add_adapter(model, ml.LoRAConfig(r=2, target_modules="all-linear", init_lora_weights=start))
    {"eva": eva, "lora_ga": lora_ga}[start].initialize(model, BATCHES, forward=language_model_loss)


def lora_ga_in_parts(folder: Path) -> None:
    model = tiny_base()
    ml.add_adapter(model, ml.LoRAConfig(r=2, target_modules="all-linear", init_lora_weights="lora_ga"))
    lora_ga.initialize(model, BATCHES, layers_at_once=10, forward=language_model_loss)


def combine(folder: Path) -> None:
    model = tiny_model()
    ml.combine_adapters(model, ["default"], [0.5], "mixed", method="svd")


def check_variant(folder: Path) -> None:
    with patch.object(minilora.testing, "CHECKS", minilora.testing.CHECKS[:2]):
        minilora.testing.check_variant(ml.IA3Config(feedforward_modules=[]))


# what is done, and the stages that it has, in their order
STAGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "load": (load, ["Saving the model", "Loading the model"]),
    "save_gguf": (lambda folder: ml.save_gguf(*chat(), folder / "model.gguf", outtype="f16"), ["Writing model.gguf"]),
    "load_rows": (lambda folder: ml.load_rows(conversations(folder)), ["Reading"]),
    "train": (train, ["step", "held-out loss"]),
    "train on texts": (
        lambda folder: ml.train(
            *chat(adapter=True), conversations(folder), ml.TrainConfig(output_dir=str(folder / "out"), max_steps=1)
        ),
        ["Reading", "Rendering", "Tokenizing", "step"],
    ),
    "add_adapter": (
        lambda folder: ml.add_adapter(
            tiny_base(), ml.LoRAConfig(r=2, target_modules="all-linear", init_lora_weights="pissa")
        ),
        ["Making adapters"],
    ),
    "eva": (lambda folder: start_from_data("eva", folder), ["EVA"]),
    "lora_ga": (lambda folder: start_from_data("lora_ga", folder), ["LoRA-GA, gradients", "LoRA-GA, decompositions"]),
    "lora_ga in parts": (
        lora_ga_in_parts,
        [f"LoRA-GA, part {i} of 2, {what}" for i in (1, 2) for what in ("gradients", "decompositions")],
    ),
    "merge": (lambda folder: ml.merge(tiny_model()), ["Merging"]),
    "unload": (lambda folder: ml.unload(tiny_model(nf4=True), merge=True), ["Merging"]),
    "merge_report": (lambda folder: ml.merge_report(tiny_model()), ["Comparing formats"]),
    "merge_to_nf4": (lambda folder: ml.merge_to_nf4(tiny_model(), BATCHES), ["Looking at inputs", "Rounding to NF4"]),
    "merge_to_lora": (lambda folder: ml.merge_to_lora(tiny_model(), 2), ["Fitting a LoRA"]),
    "combine_adapters": (combine, ["Combining adapters"]),
    "generate": (
        lambda folder: ml.generate(*chat(), ["a bee", "the north"], max_new_tokens=3, progress="answering"),
        ["answering"],
    ),
    "evaluate": (
        lambda folder: ml.evaluate(*chat(), conversations(folder), max_new_tokens=3),
        ["Reading", "Rendering", "Tokenizing", "answering, loss", "answering"],
    ),
    "compare": (
        lambda folder: ml.compare(*chat(adapter=True), conversations(folder), max_new_tokens=3),
        ["base, loss", "base", "tuned, loss", "tuned"],
    ),
    "general_ability": (
        lambda folder: ml.general_ability(*chat()),
        ["general ability, questions", "general ability, perplexity"],
    ),
    "check_variant": (check_variant, ["Trying IA3Config"]),
}


@pytest.mark.parametrize("name", STAGES)
def test_each_stage_says_where_it_is_and_that_it_is_done(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work, stages = STAGES[name]
    monkeypatch.setattr("minilora.progress.clock", count(step=60).__next__)  # every look at it, a minute has passed
    work(tmp_path)
    lines = capsys.readouterr().err.splitlines()
    under_way = [re.fullmatch(r"(.*?)(:| \d+/\d+ ·) .* · [\d:]+ (so far|left)", line) for line in lines]
    assert list(dict.fromkeys(match[1] for match in under_way if match and match[1] in stages)) == stages
    for stage in stages:
        assert any(re.match(rf"{stage}[: ].* · done in [\d:]+$", line) for line in lines), stage


def test_a_download_says_how_much_has_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """pip's place is taken by what downloads as it does, into a temporary folder, and then says why it failed."""
    monkeypatch.setattr("minilora.progress.clock", count(step=60).__next__)
    monkeypatch.setattr(fetch, "SECONDS_BETWEEN_LOOKS", 0.02)
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))
    seen = tmp_path / "seen"
    pip = f"""
import pathlib, tempfile, time
folder = pathlib.Path(tempfile.mkdtemp(prefix="pip-unpack-"))
(folder / "toy.whl").write_bytes(bytes(300_000))
deadline = time.monotonic() + 20
while not pathlib.Path({str(seen)!r}).exists() and time.monotonic() < deadline:
    time.sleep(0.01)
print("no room left")
raise SystemExit(3)
"""
    look = fetch._bytes_below

    def looking(folder: Path) -> int:
        size = look(folder)
        if size >= 300_000:
            seen.touch()
        return size

    monkeypatch.setattr(fetch, "_bytes_below", looking)
    run = fetch._run
    monkeypatch.setattr(fetch, "_run", lambda command, *rest: run([sys.executable, "-c", pip], *rest))
    with pytest.raises(ml.InputError, match="no room left"):
        fetch.wheel_file(Wheel("toy", "1.0", "", 1.0, {"toy.txt": ""}), "toy.txt")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Fetching toy 1.0 (1.0 MB) from PyPI ..."
    assert any(re.match(r"Fetching toy: 30% · [\d:]+ (so far|left)$", line) for line in lines)
    assert re.match(r"Fetching toy: 30% · stopped after", lines[-1])
