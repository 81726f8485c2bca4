"""general_ability: perplexity is transformers', an answer counts when a person would count it, the data is sound."""

import importlib
import json
import math
from typing import Any

import pytest
import torch
from helpers.chat import CHATML, tiny
from helpers.models import CONFIGS, SHAPE, our_model, transformers_model

from minilora.evaluation.general_ability import general_ability, is_right, normalized, passages, perplexity, questions
from minilora.formats.load import load

module = importlib.import_module("minilora.evaluation.general_ability")  # the package may give the function this name


@pytest.fixture(scope="module")
def tiny_chat() -> tuple[Any, Any]:
    """A random model in transformers and its tokenizer."""
    tokenizer = tiny(CHATML, eos_token="<|im_end|>")
    return transformers_model(type(CONFIGS["llama"])(**SHAPE | {"vocab_size": len(tokenizer)})), tokenizer


def test_perplexity_is_that_of_transformers(tiny_chat: tuple[Any, Any]) -> None:
    theirs, tokenizer = tiny_chat
    texts = [text[:n] for text, n in zip(passages(), (200, 90, 300), strict=False)]
    total = count = 0.0
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text)])
        total += (ids.shape[1] - 1) * theirs(ids, labels=ids).loss.item()
        count += ids.shape[1] - 1
    # two float32 forwards; an error in the loss (1e-5 relative, see test_evaluate) times a loss of about 10
    assert perplexity(our_model(theirs), tokenizer, texts) == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.parametrize(
    ("text", "accepted", "right"),
    [
        ("The capital is PARIS.", ["Paris"], True),
        ("Parisian", ["Paris"], False),
        ("It is 42.", ["42", "forty-two"], True),
        ("Forty-two!", ["42", "forty-two"], True),
        ("It is 142", ["42"], False),
        ("It is 4.5", ["5"], False),
        ("It is 5.4 or so", ["5"], False),
        ("They are 5, or so.", ["5"], True),
        ("Water is H₂O", ["H2O"], True),
        ("plants take in carbon\ndioxide (CO2)", ["carbon dioxide"], True),
        ("São Paulo", ["Sao Paulo"], True),
        ("", ["Paris"], False),
    ],
)
def test_an_answer_counts_as_a_whole_word_in_any_spelling(text: str, accepted: list[str], right: bool) -> None:
    assert is_right(text, accepted) is right


def test_the_questions_are_forty_and_do_not_give_their_answers_away() -> None:
    asked = questions()
    assert len({question for question, _ in asked}) == len(asked) == 40
    for question, accepted in asked:
        assert accepted
        assert not is_right(question, accepted), f"repeating {question!r} would count as right"
        assert is_right(f"It is {accepted[-1]}.", accepted)
        assert all(normalized(answer) for answer in accepted)


def test_the_scores_are_those_of_the_answers(tiny_chat: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fourth question is answered, the others are not."""
    theirs, tokenizer = tiny_chat
    asked = questions()

    def generate(model: Any, tokenizer: Any, conversations: list[Any], **_: Any) -> list[str]:
        assert [conversation[0]["content"] for conversation in conversations] == [question for question, _ in asked]
        return [f"Well, {accepted[0]}." if i % 4 == 0 else "Well." for i, (_, accepted) in enumerate(asked)]

    monkeypatch.setattr(module, "generate", generate)
    monkeypatch.setattr(module, "passages", lambda: ["the weather in the north"])
    result = general_ability(our_model(theirs), tokenizer)
    assert result.accuracy == 0.25
    assert result.interval[0] < 0.25 < result.interval[1]
    assert [answer.right for answer in result.answers] == [i % 4 == 0 for i in range(40)]
    assert set(result.summary().values()) == {result.perplexity, 0.25}
    assert json.loads(json.dumps(result.to_dict()))["n_questions"] == 40


@pytest.mark.model
def test_smollm2_has_room_to_gain_and_to_lose() -> None:
    model, tokenizer = load("smollm2-135m-instruct")
    tokens = sum(len(tokenizer.encode(text)) for text in passages())
    assert 1200 <= tokens <= 2000
    before = general_ability(model, tokenizer)
    assert 0.4 <= before.accuracy <= 0.75
    with torch.no_grad():  # the overconfidence that a bad fine-tuning brings: all logits four times as large
        model.model.norm.weight.mul_(4)
    assert perplexity(model, tokenizer, passages()) > 1.1 * before.perplexity
