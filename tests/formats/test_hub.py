"""Hub ids, offline: a folder in the layout of the Hub's cache stands for what a download would leave there."""

import fnmatch
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.chat import CHATML, tiny
from helpers.models import CONFIGS, transformers_model

from minilora.errors import InputError
from minilora.formats.hub import PATTERNS
from minilora.formats.load import load
from minilora.text.tokenizer_files import save_tokenizer

LOAD = """
import sys
from minilora import load
from minilora.errors import InputError
for name in sys.argv[1:]:
    try:
        model, tokenizer = load(name, quantize=None, dtype="bfloat16")
        print(model.model.norm.weight.float().sum().item(), len(tokenizer))
    except InputError as error:
        print("InputError:", error)
"""


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """models--owner--tiny with its files under blobs/, linked from snapshots/<commit>/, as huggingface_hub has it."""
    repository = tmp_path / "models--owner--tiny"
    snapshot, blobs = repository / "snapshots" / "c0ffee", repository / "blobs"
    transformers_model(CONFIGS["llama"]).save_pretrained(snapshot)
    save_tokenizer(tiny(CHATML), snapshot)
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(os.path.relpath(blobs / str(number), snapshot))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")
    return tmp_path


def test_a_model_in_the_cache_loads_without_a_network_and_another_is_an_error(cache: Path) -> None:
    # In a process of its own: huggingface_hub reads these variables when it is imported.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    command = [sys.executable, "-c", LOAD, "owner/tiny", "owner/absent"]
    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120)
    here, absent = run.stdout.splitlines()
    expected = transformers_model(CONFIGS["llama"]).model.norm.weight.bfloat16().float().sum().item()
    assert here == f"{expected} {len(tiny(CHATML))}"
    assert absent.startswith(
        "InputError: owner/absent is not a folder here, and the Hugging Face Hub does not give it: "
    )


def test_only_weights_configuration_and_tokenizer_are_asked_for() -> None:
    def wanted(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in PATTERNS)

    for name in ("config.json", "model.safetensors", "model-00001-of-00030.safetensors", "tokenizer.json"):
        assert wanted(name)
    for name in (
        "pytorch_model.bin",
        "consolidated.safetensors",
        "onnx/model.onnx",
        "models/transformer.py",
        "original/params.json",
    ):
        assert not wanted(name)


def test_a_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "owner" / "tiny"
    transformers_model(CONFIGS["llama"]).save_pretrained(folder)
    save_tokenizer(tiny(CHATML), folder)
    monkeypatch.chdir(tmp_path)
    assert load("owner/tiny", dtype=torch.float32)[0].config.vocab_size == 97
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(InputError, match="model_type 't5'"):
        load("owner/tiny")
