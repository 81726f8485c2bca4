"""The guide docs/merging.md: its code blocks are one program, and its table is the benchmark's."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.chat import CHATML, tiny
from helpers.training import LLAMA, quantized

import minilora as ml
from minilora.models.config import ModelConfig
from minilora.models.transformer import Transformer
from minilora.nf4.linear import NF4Linear

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "merging.md").read_text(encoding="utf-8")


def test_the_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a model of two tiny blocks: SmolLM2's own would take minutes."""
    load, tokenizer = ml.load, tiny(CHATML, eos_token="<|im_end|>")

    def load_tiny(name: str, quantize: str) -> Any:
        assert (name, quantize) == ("smollm2-135m-instruct", "nf4")
        torch.manual_seed(0)
        return quantized(Transformer(ModelConfig.from_hf(LLAMA | {"vocab_size": 340}))), tokenizer

    monkeypatch.setattr(ml, "load", load_tiny)
    monkeypatch.chdir(tmp_path)
    program = "".join(re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL))
    names: dict[str, Any] = {}
    exec(program, names)  # the repository's own page
    printed = capsys.readouterr().out
    assert "What a merge keeps of the adapters" in printed and "nf4: keeps" in printed
    assert json.loads(names["text"])["rows"]
    assert 0 < max(names["lost"].values()) < 1
    assert not any(layer.merged for layer in names["model"].modules() if hasattr(layer, "merged"))
    merged, _ = load("merging/merged", quantize=None)
    assert not any(isinstance(module, NF4Linear) for module in merged.modules())
    in_4_bits, _ = load("merging/nf4")
    assert sum(isinstance(module, NF4Linear) for module in in_4_bits.modules()) == 14
    assert (tmp_path / "merging/small/adapter_model.safetensors").exists()


def test_the_table_is_the_benchmarks() -> None:
    rows = json.loads((ROOT / "benchmarks/results/merge-cpu.json").read_text(encoding="utf-8"))["rows"]
    section = GUIDE.partition("<!-- measured -->")[2].partition("<!-- /measured -->")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    header, _, *table = cells
    assert set(header) <= set(rows[0])
    assert table == [[row[name] for name in header] for row in rows]
