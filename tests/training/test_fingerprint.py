"""A run's fingerprint: what training changes is not in it, and all that decides the run is. More in test_train.py."""

import json

import torch
from helpers.training import random_rows, tiny_model

from minilora.training.fingerprint import differences, fingerprint
from minilora.training.optimizer import parameters_to_train


def taken(model, settings=None):
    return fingerprint(model, "default", parameters_to_train(model, "default"), settings or {}, random_rows(3), [])


def test_training_does_not_change_it():
    model = tiny_model(init_lora_weights="pissa")  # which keeps buffers beside its parameters
    before = taken(model)
    with torch.no_grad():
        for tensor in (*parameters_to_train(model, "default").values(), *adapter_buffers(model)):
            tensor.add_(1)
    assert differences(json.loads(json.dumps(before)), taken(model)) == []


def adapter_buffers(model):
    found = [tensor for name, tensor in model.named_buffers() if ".adapters." in name]
    assert found
    return found


def test_a_changed_weight_of_the_base_is_another_model():
    model = tiny_model()
    before = taken(model)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    assert differences(before, taken(model)) == ["the base model is another"]
    assert differences(before, taken(model, {"seed": 1}))[0] == "seed was None and is 1"
