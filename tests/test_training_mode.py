"""A model made ready to train, and put back; what each mode computes is in test_train.py and test_offload.py."""

import pytest
import torch
from training_helpers import tiny_model

from minilora.errors import InputError
from minilora.train import TrainConfig
from minilora.training_mode import training_mode


@pytest.mark.parametrize("was_training", [True, False])
def test_the_model_is_put_back_after_an_error_too(was_training):
    model = tiny_model().train(was_training)
    with pytest.raises(ZeroDivisionError), training_mode(model, TrainConfig(gradient_checkpointing=True)):
        assert model.training
        assert model.gradient_checkpointing
        raise ZeroDivisionError
    assert model.training == was_training
    assert not model.gradient_checkpointing


def test_a_model_that_cannot_recompute_is_refused_and_unchanged():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2)).eval()
    config = TrainConfig(gradient_checkpointing=True)
    with (
        pytest.raises(InputError, match="Sequential has no gradient checkpointing: set gradient_checkpointing to"),
        training_mode(model, config),
    ):
        pass
    assert not model.training
