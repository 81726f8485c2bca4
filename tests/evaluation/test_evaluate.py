"""evaluate: losses are transformers', intervals and p values follow from their definitions, pairs stay paired."""

import json
import math
from itertools import product
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from helpers.chat import CHATML, TOOL_CONVERSATION, assistant, system, tiny, user
from helpers.models import CONFIGS, SHAPE, our_model, transformers_model
from hypothesis import given
from hypothesis import strategies as st

from minilora.adapters.attach import add_adapter
from minilora.adapters.lora_config import LoRAConfig
from minilora.data.examples import encode_rows
from minilora.data.rows import Row, as_rows, load_rows
from minilora.errors import InputError
from minilora.evaluation.evaluate import (
    BASE,
    FEW_SHOT,
    TUNED,
    Comparison,
    compare,
    evaluate,
    exact_match,
    held_out_loss,
    interval,
    mcnemar,
    wilson,
    with_examples,
    with_system,
)
from minilora.evaluation.generate import generate
from minilora.models.transformer import Transformer
from minilora.text.tokenizer import Tokenizer

CONVERSATIONS = [
    [user("a bee"), assistant("the weather")],
    [user("the weather in the north"), assistant("is as it is")],
    [user("a"), assistant("be"), user("and the weather?"), assistant("be a bee")],
    [user("as"), assistant("a")],
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny(CHATML, eos_token="<|im_end|>")


@pytest.fixture(scope="module")
def theirs(tokenizer: Tokenizer) -> Any:
    return transformers_model(type(CONFIGS["llama"])(**SHAPE | {"vocab_size": len(tokenizer)}))


@pytest.fixture
def model(theirs: Any) -> Transformer:
    return our_model(theirs)


@pytest.fixture
def rows() -> list[Row]:
    return as_rows([{"messages": conversation} for conversation in CONVERSATIONS])


def with_an_adapter(model: Transformer, std: float = 0.1) -> Transformer:
    add_adapter(model, LoRAConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std)
    return model


def transformers_loss(theirs: Any, tokenizer: Tokenizer, rows: list[Row]) -> float:
    """transformers' own loss, row by row without padding, weighted by labelled tokens."""
    total = count = 0.0
    for example in encode_rows(rows, tokenizer).examples:
        labels = torch.tensor([example.labels])
        n = int((labels[:, 1:] != -100).sum())
        total += n * theirs(torch.tensor([example.input_ids]), labels=labels).loss.item()
        count += n
    return total / count


# ------------------------------------------------------------------------------------------------ loss


@pytest.mark.parametrize("shared", [None, "a bee, the weather, " * 10])
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_the_loss_is_that_of_transformers(
    model: Transformer, theirs: Any, tokenizer: Tokenizer, rows: list[Row], shared: str | None, batch_size: int | None
) -> None:
    """With and without a long system prompt that all rows share."""
    if shared is not None:
        rows = [with_system(row, shared) for row in rows]
    loss = held_out_loss(model, tokenizer, rows, batch_size)
    # two float32 forwards of three layers: a few roundings of 6e-8 in logits of size 10
    assert loss == pytest.approx(transformers_loss(theirs, tokenizer, rows), rel=1e-5)


def test_the_loss_of_plain_texts_that_begin_alike_counts_their_beginning(
    model: Transformer, theirs: Any, tokenizer: Tokenizer
) -> None:
    """Every token but the first is labelled, so that nothing may be shared."""
    rows = as_rows([{"text": "the weather " * 20 + end} for end in ("is", "as", "a bee")])
    expected = transformers_loss(theirs, tokenizer, rows)
    assert held_out_loss(model, tokenizer, rows) == pytest.approx(expected, rel=1e-5)


def test_a_row_longer_than_the_model_is_an_error_that_names_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    theirs = transformers_model(
        type(CONFIGS["llama"])(**SHAPE | {"vocab_size": len(tokenizer)}, max_position_embeddings=24)
    )
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a bee", "a bee " * 40)))
    with pytest.raises(InputError, match=r"rows\.jsonl:2: \d+ tokens"):
        held_out_loss(our_model(theirs), tokenizer, load_rows(path))


# ------------------------------------------------------------------------------------------------ one model


def test_evaluate_scores_what_generate_answers(model: Transformer, tokenizer: Tokenizer, rows: list[Row]) -> None:
    expected = generate(model, tokenizer, [conversation[:-1] for conversation in CONVERSATIONS], 12)
    # a row whose reference is what the model says, white space aside, is the one exact match
    rows[1] = as_rows([{"messages": [*CONVERSATIONS[1][:-1], assistant(f"  {expected[1]}\n")]}])[0]
    scores = evaluate(model, tokenizer, rows, max_new_tokens=12, batch_size=3)
    assert [prediction.text for prediction in scores.predictions] == expected
    assert [prediction.scores for prediction in scores.predictions] == [{"exact_match": i == 1} for i in range(4)]
    assert scores.metrics == {"exact_match": 0.25}
    assert scores.intervals == {"exact_match": wilson(1, 4)}
    assert scores.n == 4
    assert scores.loss == held_out_loss(model, tokenizer, rows, 3)
    third = scores.predictions[2]
    assert (third.prompt, third.expected, third.source) == ("and the weather?", "be a bee", "row 3")


def test_rows_come_as_a_path_dicts_or_rows(
    model: Transformer, tokenizer: Tokenizer, rows: list[Row], tmp_path: Path
) -> None:
    dicts = [{"messages": conversation} for conversation in CONVERSATIONS]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in dicts))
    expected = evaluate(model, tokenizer, rows, few_shot=rows[:2], max_new_tokens=4)
    for same in (path, str(path), dicts, tuple(rows), iter(rows)):
        scores = evaluate(model, tokenizer, same, few_shot=rows[:2], max_new_tokens=4)
        assert (scores.loss, scores.metrics) == (expected.loss, expected.metrics)
    few = compare(with_an_adapter(model), tokenizer, path, few_shot_rows=path, max_new_tokens=4)
    assert few.scores[FEW_SHOT].n == len(CONVERSATIONS)
    for wrong, kinds in (([rows[0], dicts[0]], "Row and dict"), (None, "NoneType")):
        with pytest.raises(InputError, match=f"held-out rows must be a path, or all dicts or all Rows, not {kinds}"):
            evaluate(model, tokenizer, wrong)


def test_another_librarys_model_or_tokenizer_is_named(
    model: Transformer, theirs: Any, tokenizer: Tokenizer, rows: list[Row]
) -> None:
    with pytest.raises(InputError, match="a LlamaForCausalLM is not minilora's own model: score what it generates"):
        evaluate(theirs, tokenizer, rows)
    for call in (lambda: evaluate(model, object(), rows), lambda: generate(model, object(), "a bee")):
        with pytest.raises(InputError, match=r"a object is not minilora's tokenizer: take that of ml\.load"):
            call()


def test_a_metric_may_give_several_scores(model: Transformer, tokenizer: Tokenizer, rows: list[Row]) -> None:
    def metric(text: str, row: Row) -> dict[str, bool | float]:
        return {"length": float(len(text)), "right": row.messages[0]["content"] == "a bee"}

    scores = evaluate(model, tokenizer, rows, metric=metric, max_new_tokens=6)
    lengths = [len(prediction.text) for prediction in scores.predictions]
    assert scores.metrics == {"length": sum(lengths) / 4, "right": 0.25}
    assert scores.intervals == {"length": interval([float(n) for n in lengths]), "right": wilson(1, 4)}


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (["right", "wrong"], "row 1: the metric gave 'right': it must give a bool or a number"),
        ([1.0, None], "row 2: the metric gave None"),
        ([{"a": 1.0}, {"b": 1.0}], r"row 2: the metric scored \['b'\], and \['a'\] of the first row"),
    ],
)
def test_a_metric_that_gives_no_score_is_named_with_its_row(
    model: Transformer, tokenizer: Tokenizer, rows: list[Row], scores: list[Any], message: str
) -> None:
    given_scores = iter(scores)
    with pytest.raises(InputError, match=message):
        evaluate(model, tokenizer, rows[:2], metric=lambda text, row: next(given_scores), max_new_tokens=2)


def test_a_system_prompt_stands_in_place_of_the_rows_own(
    model: Transformer, tokenizer: Tokenizer, rows: list[Row]
) -> None:
    prompted = [as_rows([{"messages": [system("a bee"), *c]}])[0] for c in CONVERSATIONS]
    instead = evaluate(model, tokenizer, [with_system(row, "no") for row in rows], max_new_tokens=6, system="a bee")
    direct = evaluate(model, tokenizer, prompted, max_new_tokens=6)
    assert [p.text for p in instead.predictions] == [p.text for p in direct.predictions]
    assert instead.loss == direct.loss != evaluate(model, tokenizer, rows, max_new_tokens=6).loss


def test_a_new_system_prompt_moves_the_context_with_the_messages() -> None:
    old = Row([user("a"), assistant("b"), user("c"), assistant("d")], context=2)
    new = with_system(old, "s")
    assert new.messages is not None
    assert [m["content"] for m in new.messages[new.context :]] == ["c", "d"]
    assert with_system(new, "t").context == new.context == 3
    assert with_system(Row([user("a"), assistant("b")]), "s").context == 0


def test_rows_without_a_text_to_compare_are_errors(model: Transformer, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="row 1: a plain text has no answer"):
        evaluate(model, tokenizer, [{"text": "a bee"}])
    with pytest.raises(InputError, match="there are no held-out rows"):
        evaluate(model, tokenizer, [])
    with pytest.raises(InputError, match="there are no few-shot rows"):
        evaluate(model, tokenizer, [{"prompt": "a", "completion": "a bee"}], few_shot=[])
    call = Row(TOOL_CONVERSATION[:2], source="rows.jsonl:7")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model is not asked where a row cannot be scored"))
    with pytest.raises(InputError, match=r"rows\.jsonl:7: its answer has no text"):
        evaluate(model, tokenizer, [call])
    with pytest.raises(InputError, match=r"rows\.jsonl:7: its answer has no text"):
        exact_match("", call)


def test_a_pair_without_a_chat_template_is_one_text(theirs: Any) -> None:
    tokenizer = tiny()
    model = our_model(theirs)
    pair = {"prompt": "the weather", "completion": " in the north"}
    scores = evaluate(model, tokenizer, [pair], max_new_tokens=6)
    assert scores.predictions[0].text == generate(model, tokenizer, "the weather", 6)
    assert scores.loss == pytest.approx(transformers_loss(theirs, tokenizer, as_rows([pair])), rel=1e-5)


# ------------------------------------------------------------------------------------------------ three models


def test_compare_scores_base_few_shot_and_tuned_on_the_same_rows(
    model: Transformer, tokenizer: Tokenizer, rows: list[Row], theirs: Any
) -> None:
    def long(text: str, row: Row) -> bool:
        return len(text) > 8

    examples = [{"messages": CONVERSATIONS[0]}]
    without = evaluate(model, tokenizer, rows, metric=long, max_new_tokens=6)
    prompted = evaluate(model, tokenizer, rows, metric=long, max_new_tokens=6, few_shot=examples)
    with_an_adapter(model)
    tuned = evaluate(model, tokenizer, rows, metric=long, max_new_tokens=6)
    comparison = compare(model, tokenizer, rows, few_shot_rows=examples, metric=long, max_new_tokens=6)
    assert comparison.scores == {BASE: without, FEW_SHOT: prompted, TUNED: tuned}
    assert without.loss != tuned.loss != prompted.loss
    assert evaluate(model, tokenizer, rows, metric=long, max_new_tokens=6) == tuned, "the adapter is on again"
    for name in (BASE, FEW_SHOT):
        found = comparison.differences[name]["long"]
        pairs = zip(tuned.predictions, comparison.scores[name].predictions, strict=True)
        won = [a.scores["long"] - b.scores["long"] for a, b in pairs]
        assert (found.won, found.lost) == (won.count(1), won.count(-1))
        assert found.difference == pytest.approx(sum(won) / 4)
        assert found.p == mcnemar(found.won, found.lost)
    assert set(compare(model, tokenizer, rows, max_new_tokens=2).scores) == {BASE, TUNED}


def test_a_comparison_is_json(model: Transformer, tokenizer: Tokenizer, rows: list[Row]) -> None:
    comparison: Comparison = compare(with_an_adapter(model), tokenizer, rows, max_new_tokens=2)
    read = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert read["scores"][TUNED]["loss"] == comparison.scores[TUNED].loss
    assert read["scores"][TUNED]["predictions"][0]["expected"] == "the weather"
    assert read["differences"][BASE]["exact_match"]["p"] == 1.0


def test_nothing_to_compare_is_an_error(model: Transformer, tokenizer: Tokenizer, rows: list[Row]) -> None:
    with pytest.raises(InputError, match="no adapter"):
        compare(model, tokenizer, rows)


def test_examples_are_earlier_turns_whose_answers_do_not_count(
    model: Transformer, tokenizer: Tokenizer, rows: list[Row]
) -> None:
    examples = [Row([system("Be long."), *CONVERSATIONS[0]]), Row(CONVERSATIONS[2])]
    turns = [*CONVERSATIONS[0], *CONVERSATIONS[2]]
    for before, context in ([], 0), ([system("Be brief.")], 0), ([system("Be brief.")], 3), ([], 2):
        row = Row([*before, user("a"), assistant("b"), user("c"), assistant("d")], context=context)
        prompted = with_examples(row, examples)
        assert prompted.messages == [*before, *turns, *(row.messages or [])[len(before) :]]
        scored = [m["content"] for m in prompted.messages[prompted.context :] if m["role"] == "assistant"]
        assert scored == (["d"] if context else ["b", "d"])
    scores = evaluate(model, tokenizer, rows, few_shot=examples, max_new_tokens=6)
    direct = [
        Row([*turns, *c], context=len(turns), source=row.source) for c, row in zip(CONVERSATIONS, rows, strict=True)
    ]
    assert scores == evaluate(model, tokenizer, direct, max_new_tokens=6)


# ------------------------------------------------------------------------------------------------ statistics


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_the_interval_of_the_score_test(case: tuple[int, int]) -> None:
    """Its ends are the p₀ at which the observed share lies 1.96 standard errors of p₀ away."""
    successes, n = case
    z = NormalDist().inv_cdf(0.975)
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            # both sides are products of numbers near 1 in double precision; near 0 they cancel to about 1e-12
            assert abs(successes / n - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n), rel=1e-6, abs=1e-9)
    assert (low == 0) == (successes == 0)
    assert (high == 1) == (successes == n)


@pytest.mark.parametrize("n", range(9))
def test_mcnemar_counts_the_outcomes_of_fair_coins(n: int) -> None:
    """All 2ⁿ of them, at least as far from n/2 as the one seen."""
    for won in range(n + 1):
        extreme = [outcome for outcome in product((0, 1), repeat=n) if abs(sum(outcome) - n / 2) >= abs(won - n / 2)]
        assert mcnemar(won, n - won) == len(extreme) / 2**n


def test_a_score_that_is_no_share_has_its_standard_error() -> None:
    values = [1.0, 4.0, 7.0, 8.0]
    low, high = interval(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    half = NormalDist().inv_cdf(0.975) * float(tensor.std()) / 2
    assert (low, high) == pytest.approx((5 - half, 5 + half))
