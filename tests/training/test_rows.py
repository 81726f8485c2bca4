"""Which rows are trained on; `train` on rows of every kind is in training/test_train.py."""

import pytest
import torch
from helpers.training import LLAMA, PADDING, VOCABULARY, tiny_base
from transformers import LlamaConfig, LlamaForCausalLM

from minilora.data.examples import Example
from minilora.errors import InputError
from minilora.training.config import TrainConfig
from minilora.training.rows import refuse_unreadable, usable_examples

GOOD = Example([5, 6, 7], [-100, 6, 7], "good")
LONG = Example([5] * 9, [5] * 9, "long")
UNLABELLED = Example([5, 6], [5, -100], "unlabelled")  # nothing comes before the first token


def test_every_row_is_used_or_skipped_for_a_reason(caplog):
    examples, skipped = usable_examples([LONG, GOOD, UNLABELLED, GOOD], PADDING, TrainConfig(max_length=8))
    assert examples == [GOOD, GOOD]
    assert [row.source for row in skipped] == ["long", "unlabelled"]
    assert "9 tokens, more than max_length=8" in skipped[0].reason
    assert "no token to learn" in skipped[1].reason
    assert "2 of 4 training rows skipped (long: 9 tokens" in caplog.text


def test_nothing_is_said_where_every_row_is_used(caplog):
    assert usable_examples((GOOD,), PADDING, TrainConfig(max_length=3)) == ([GOOD], [])
    assert not caplog.text


def test_no_row_is_an_error_that_names_which_rows():
    with pytest.raises(InputError, match="there are no held-out rows"):
        usable_examples([], PADDING, TrainConfig(), "held-out")
    with pytest.raises(InputError, match="no held-out row is left: 1 of 1 held-out rows skipped"):
        usable_examples([LONG], PADDING, TrainConfig(max_length=8), "held-out")
    with pytest.raises(InputError, match="a path, or all dicts or all Rows, not Example and str"):
        usable_examples([GOOD, "text"], PADDING, TrainConfig())


def test_another_librarys_tokenizer_is_named():
    with pytest.raises(InputError, match=r"a SimpleNamespace is not minilora's tokenizer: .*read_tokenizer"):
        usable_examples([{"prompt": "a", "completion": "b"}], PADDING, TrainConfig())


@pytest.mark.parametrize(
    ("ids", "labels", "token"),
    [([5, VOCABULARY], [-100, 6], VOCABULARY), ([5, 6], [-100, VOCABULARY], VOCABULARY), ([5, -3], [-100, 6], -3)],
)
def test_a_token_that_the_model_does_not_know_is_named(ids, labels, token):
    for model in (tiny_base(), LlamaForCausalLM(LlamaConfig(**LLAMA))):
        refuse_unreadable(model, [GOOD, UNLABELLED, Example([0, VOCABULARY - 1], [-100, VOCABULARY - 1])])
        with pytest.raises(InputError, match=f"bad.jsonl:2 has token {token}, the model knows {VOCABULARY}: the tok"):
            refuse_unreadable(model, [GOOD, Example(ids, labels, "bad.jsonl:2")])


def test_a_model_without_an_embedding_is_not_asked():
    refuse_unreadable(torch.nn.Sequential(torch.nn.Linear(2, 2)), [GOOD])


def test_a_row_longer_than_the_model_takes_is_named():
    row = Example([5] * (LLAMA["max_position_embeddings"] + 1), [5] * (LLAMA["max_position_embeddings"] + 1), "a:1")
    for model in (tiny_base(), LlamaForCausalLM(LlamaConfig(**LLAMA))):
        with pytest.raises(InputError, match="a:1 has 129 tokens, the model takes 128: max_length=128 skips it"):
            refuse_unreadable(model, [GOOD, row])
