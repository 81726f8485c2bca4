"""LoKr against PEFT; its dropouts and configuration are tested with LoHa's."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.methods import Method
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lokr.layer import factorization
from torch import nn

from minilora.errors import InputError
from minilora.variants.lokr import LoKrConfig, factors

LOKR = Method(LoKrConfig, peft.LoKrConfig)


@given(dimension=st.integers(1, 3000), factor=st.one_of(st.just(-1), st.integers(1, 64)))
def test_factors_are_those_of_peft(dimension: int, factor: int) -> None:
    assert factors(dimension, factor) == factorization(dimension, factor)


@pytest.mark.parametrize(
    "values",
    [
        {"r": 2},
        {"r": 4},  # W₂ is not decomposed: its larger side is 8
        {"r": 16},
        {"r": 2, "decompose_both": True},
        {"r": 2, "decompose_factor": 3},
        {"r": 1, "init_weights": "lycoris"},
        {"r": 16, "init_weights": "lycoris"},
        {"r": 1, "init_weights": False, "decompose_both": True},
        {"r": 2, "alpha": 7, "rank_pattern": {"v_proj": 1}, "alpha_pattern": {"down_proj": 3}},
    ],
)
def test_equals_peft_on_a_llama(values: dict[str, Any]) -> None:
    LOKR.check_equals_peft(target_modules=["v_proj", "down_proj"], **values)


@pytest.mark.parametrize("init_weights", [True, "lycoris"])
@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("r", [2, 8])  # PEFT's torch.kron fails for the strides of r = 1
def test_equals_peft_on_convolutions(r: int, effective: bool, init_weights: bool | str) -> None:
    torch.manual_seed(0)
    for layer, x in [
        (nn.Conv1d(16, 48, 3, stride=2, padding=1), torch.randn(2, 16, 9)),
        (nn.Conv2d(16, 48, (3, 2), dilation=2), torch.randn(2, 16, 7, 7)),
        (nn.Conv2d(16, 48, 1, bias=False), torch.randn(2, 16, 5, 5)),
    ]:
        values = {"r": r, "target_modules": ["0"], "use_effective_conv2d": effective, "init_weights": init_weights}
        LOKR.check_equals_peft(nn.Sequential(layer), x, **values, decompose_both=True)


@pytest.mark.parametrize("values", [{"r": 2, "init_weights": "lycoris"}, {"r": 2, "decompose_both": True}])
@pytest.mark.filterwarnings("error:Unexpected keyword")  # PEFT does not know a key in adapter_config.json
def test_folders_go_both_ways(values: dict[str, Any], tmp_path: Path) -> None:
    LOKR.check_folders_both_ways(tmp_path, **values, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.mark.parametrize("factor", [0, -2])
def test_a_decompose_factor_out_of_range_is_named(factor: int) -> None:
    with pytest.raises(InputError, match=f"decompose_factor must be -1 or at least 1, not {factor}"):
        LoKrConfig(decompose_factor=factor)
