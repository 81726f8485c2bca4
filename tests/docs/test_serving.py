"""The guide docs/serving.md: its Python blocks are one program, llama.cpp and transformers included."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.chat import CHATML, tiny
from helpers.training import LLAMA

import minilora as ml
from minilora.models.config import ModelConfig
from minilora.models.transformer import Transformer

pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
GUIDE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def test_the_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a model of two tiny blocks, taught for longer: every reader of every file says what minilora says."""
    tokenizer = tiny(CHATML, eos_token="<|im_end|>")

    def load_tiny(name: str, quantize: str) -> Any:
        assert (name, quantize) == ("smollm2-135m-instruct", "nf4")
        torch.manual_seed(0)
        return Transformer(ModelConfig.from_hf(LLAMA | {"vocab_size": 340, "intermediate_size": 64})), tokenizer

    monkeypatch.setattr(ml, "load", load_tiny)
    monkeypatch.chdir(tmp_path)
    program = "".join(re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL))
    exec(program.replace("max_steps=24", "max_steps=80"), {})  # the repository's own page
    *_, ours, llama_cpp, with_lora, transformers = [line for line in capsys.readouterr().out.splitlines() if line]
    assert ours == llama_cpp == with_lora == transformers == "go"
