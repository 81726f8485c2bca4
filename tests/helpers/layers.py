"""A layer of every kind, with an input."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from minilora.nf4 import NF4Linear

# float32 sums of a few dozen products, in the layer's order and in that of another routine
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


def layers() -> list[Any]:
    torch.manual_seed(0)
    ids, x = torch.tensor([[1, 0, 4], [2, 2, 3]]), torch.randn(2, 3, 64)
    scaled = Gemma3TextScaledWordEmbedding(5, 8, 0, embed_scale=8**0.5)
    return [
        pytest.param(nn.Linear(64, 5), x, id="linear"),
        pytest.param(nn.Linear(64, 5, bias=False), x, id="linear without bias"),
        pytest.param(Conv1D(5, 64), x, id="transformers Conv1D"),
        pytest.param(NF4Linear.from_linear(nn.Linear(64, 5)), x, id="NF4"),
        pytest.param(nn.Embedding(5, 8), ids, id="embedding"),
        pytest.param(nn.Embedding(5, 8, padding_idx=0), ids, id="embedding with padding"),
        pytest.param(scaled, ids, id="Gemma's scaled embedding"),
        pytest.param(nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 7, 7), id="convolution"),
    ]
