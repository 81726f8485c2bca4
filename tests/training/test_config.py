"""TrainConfig: every field is documented, and a wrong value is one clear error."""

import ast
import dataclasses
import inspect

import pytest

from minilora.errors import InputError
from minilora.training import config
from minilora.training.config import TrainConfig


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("learning_rate", 0, "learning_rate must be above 0, not 0"),
        ("learning_rate", "1e-4", "learning_rate must be a number above 0, not '1e-4'"),
        ("batch_size", -1, "batch_size must be above 0, not -1"),
        ("batch_size", 2.5, "batch_size must be a whole number, not 2.5"),
        ("max_steps", 10.0, "max_steps must be a whole number, not 10.0"),
        ("batch_size", True, "batch_size must be a number"),
        ("max_steps", 0, "max_steps must be above 0, not 0"),
        ("warmup_steps", -0.1, "warmup_steps must be at least 0, not -0.1"),
        ("weight_decay", None, "weight_decay must be a number at least 0, not None"),
        ("epochs", float("nan"), "epochs must be above 0, not nan"),
        ("learning_rate", float("inf"), "learning_rate must be finite"),
        ("betas", (0.9,), r"betas must be two numbers of at least 0 and below 1, not \(0.9,\)"),
        ("betas", (0.9, 1.5), r"betas must be two numbers of at least 0 and below 1, not \(0.9, 1.5\)"),
        ("seed", -1, r"seed must be a whole number from 0 to 2\*\*32 - 1, not -1"),
        ("seed", 2**32, "seed must be a whole number"),
        ("output_dir", "", "output_dir is empty: name a folder"),
        ("packing", "False", "packing must be True or False, not 'False'"),
        ("schedule", "step", "schedule must be cosine, linear or constant, not 'step'"),
    ],
)
def test_a_wrong_value_is_named(field, value, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**{field: value})


def test_none_and_zero_where_they_mean_something():
    TrainConfig(max_steps=None, max_grad_norm=None, save_every=None, warmup_steps=0, weight_decay=0)


def test_every_field_is_documented():
    (definition,) = [n for n in ast.parse(inspect.getsource(config)).body if isinstance(n, ast.ClassDef)]
    documented = {
        field.target.id
        for field, text in zip(definition.body, definition.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
    assert documented == {field.name for field in dataclasses.fields(TrainConfig)}
