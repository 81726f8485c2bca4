"""Which rows are trained on; `train` on rows of every kind is in test_train.py."""

import pytest
from training_helpers import PADDING

from minilora.data import Example
from minilora.errors import InputError
from minilora.training_rows import usable_examples

GOOD = Example([5, 6, 7], [-100, 6, 7], "good")
LONG = Example([5] * 9, [5] * 9, "long")
UNLABELLED = Example([5, 6], [5, -100], "unlabelled")  # nothing comes before the first token


def test_every_row_is_used_or_skipped_for_a_reason(caplog):
    examples, skipped = usable_examples([LONG, GOOD, UNLABELLED, GOOD], PADDING, max_length=8)
    assert examples == [GOOD, GOOD]
    assert [row.source for row in skipped] == ["long", "unlabelled"]
    assert "9 tokens, more than max_length=8" in skipped[0].reason
    assert "no token to learn" in skipped[1].reason
    assert "2 of 4 training rows skipped (long: 9 tokens" in caplog.text


def test_nothing_is_said_where_every_row_is_used(caplog):
    assert usable_examples((GOOD,), PADDING, max_length=3) == ([GOOD], [])
    assert not caplog.text


def test_no_row_is_an_error_that_names_which_rows():
    with pytest.raises(InputError, match="there are no held-out rows"):
        usable_examples([], PADDING, 8, "held-out")
    with pytest.raises(InputError, match="no held-out row is left: 1 of 1 held-out rows skipped"):
        usable_examples([LONG], PADDING, 8, "held-out")
    with pytest.raises(InputError, match="a path, or all dicts or all Rows, not Example and str"):
        usable_examples([GOOD, "text"], PADDING, 8)


def test_another_librarys_tokenizer_is_named():
    with pytest.raises(InputError, match=r"a SimpleNamespace is not minilora's tokenizer: .*Tokenizer\.from_folder"):
        usable_examples([{"prompt": "a", "completion": "b"}], PADDING, 8)
