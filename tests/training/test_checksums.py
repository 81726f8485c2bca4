"""Checksums of tensors: what is the same passes, and what is not is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora.errors import InputError
from minilora.training.checksums import check_tensors, checksums

TENSORS = {
    "matrix": torch.arange(6.0).view(2, 3),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "bytes": torch.tensor([1, 2, 255], dtype=torch.uint8),
    "count": torch.tensor(7),
    "nothing": torch.zeros(0, 4),
}


def test_what_a_file_gives_back_is_what_was_saved(tmp_path):
    save_file(TENSORS, tmp_path / "file")
    check_tensors(load_file(tmp_path / "file"), json.loads(json.dumps(checksums(TENSORS))), "file")
    check_tensors({"matrix": TENSORS["matrix"].T.contiguous().T}, checksums({"matrix": TENSORS["matrix"]}), "file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"half": None}, "half is missing"),
        ({"another": torch.zeros(1)}, "another was not saved there"),
        ({"matrix": TENSORS["matrix"].T}, r"matrix is float32 \[3, 2\], and was saved as float32 \[2, 3\]"),
        ({"matrix": TENSORS["matrix"].double()}, r"matrix is float64 \[2, 3\], and was saved as float32 \[2, 3\]"),
        ({"half": torch.tensor([1.5, float("nan")]).bfloat16()}, "half does not have the values that were saved"),
        ({"count": torch.tensor(8)}, "count does not have the values"),
    ],
)
def test_what_differs_is_named(change, message):
    changed = {name: tensor for name, tensor in (TENSORS | change).items() if tensor is not None}
    with pytest.raises(InputError, match=f"^file is damaged: {message}"):
        check_tensors(changed, checksums(TENSORS), "file")
