import importlib
import json
import random
import sys
import types
from collections import defaultdict

import pytest

from minilora.app import bfcl
from minilora.app.bfcl import accepts, load_bfcl, parse_call, score, signature, split_of
from minilora.formats.fetch import BFCL, wheel_file

FUNCTION = {
    "name": "book",
    "parameters": {
        "properties": {
            "city": {"type": "string"},
            "nights": {"type": "integer"},
            "price": {"type": "float"},
            "class": {"type": "string", "enum": ["eco", "first"]},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["city", "nights"],
    },
}


@pytest.fixture(scope="module")
def splits():
    return load_bfcl()


@pytest.fixture(scope="module")
def reference_checker():
    """BFCL's own checker, imported from the pinned wheel. Its tables of model names and its Java and JavaScript
    converters import half the world and are not reached from Python rows: empty modules stand in for them."""
    wheel_file(BFCL, "bfcl_eval/data/BFCL_v4_simple_python.json")
    (wheel,) = wheel_file(BFCL, "bfcl_eval/data/BFCL_v4_simple_python.json").parents[2].glob("*.whl")
    models = types.ModuleType("bfcl_eval.constants.model_config")
    models.MODEL_CONFIG_MAPPING = defaultdict(lambda: types.SimpleNamespace(underscore_to_dot=False))
    stand_ins = {models.__name__: models}
    for language in ("java", "js"):
        name = f"bfcl_eval.eval_checker.ast_eval.type_convertor.{language}_type_converter"
        stand_ins[name] = types.ModuleType(name)
        setattr(stand_ins[name], f"{language}_type_converter", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(wheel))
        for name, module in stand_ins.items():
            patch.setitem(sys.modules, name, module)
        checker = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker").ast_checker
        python = importlib.import_module("bfcl_eval.constants.enums").Language.PYTHON

        def check(meta, arguments):
            name = meta["function"]["name"]
            answer = [{name: arguments}]
            return checker([meta["function"]], answer, [{name: meta["accepted"]}], python, "simple", "any")["valid"]

        yield check
        for name in [name for name in sys.modules if name.startswith("bfcl_eval")]:
            del sys.modules[name]


def changed(value, rng):
    """A value near the accepted one: other case, other type, other length, or the same."""
    match value:
        case bool():
            return not value
        case int() | float():
            return rng.choice([value + 1, float(value), int(value), str(value)])
        case str():
            return rng.choice([value.upper(), value + ".", value + " x", 5, [value], value.replace("'", '"')])
        case list():
            return rng.choice([value + value[:1], value[:-1], [changed(item, rng) for item in value]])
        case dict():
            fewer = dict(list(value.items())[:-1])
            return rng.choice([{k: changed(v, rng) for k, v in value.items()}, fewer, {**value, "extra": 1}])
        case _:
            return value


def test_scoring_equals_bfcl_on_every_row_and_on_answers_near_the_accepted_ones(splits, reference_checker):
    rng = random.Random(0)
    verdicts = {True: 0, False: 0}
    for row in (row for split in splits.values() for row in split):
        call = json.loads(row.messages[-1]["content"])
        for attempt in range(4):
            arguments = dict(call["arguments"])
            for name in list(arguments) if attempt else ():
                if rng.random() < 0.4:
                    arguments[name] = changed(arguments[name], rng)
                elif rng.random() < 0.1:
                    del arguments[name]
            for name, options in row.meta["accepted"].items() if attempt else ():
                if name not in arguments and rng.random() < 0.3:
                    arguments[name] = bfcl._first_value(options)
            expected = reference_checker(row.meta, arguments)
            text = json.dumps({"name": call["name"], "arguments": arguments})
            assert accepts(row.meta, text) == expected, (row.source, arguments)
            verdicts[expected] += 1
    assert min(verdicts.values()) > 1000  # both verdicts were compared often


def test_splits_are_disjoint_and_nearly_everything_is_used(splits):
    ids = [row.meta["id"] for split in splits.values() for row in split]
    assert len(ids) == len(set(ids))
    assert len(ids) > 0.93 * 1911  # the rows of the four categories; 121 repeat an earlier request
    assert 0.10 < len(splits["test"]) / len(ids) < 0.16  # 12%, give or take the hash's chance
    assert all(split_of(row.meta["id"]) == name for name, split in splits.items() for row in split)


def test_the_first_rows_of_a_split_are_of_every_category(splits):
    categories = {row.source.rstrip("0123456789-").rstrip("_") for row in splits["test"][:128]}
    assert categories == set(bfcl.CATEGORIES)


def test_no_request_of_the_test_is_trained_on(splits):
    """BFCL asks some things twice under two ids (simple_python_100 and a row of "multiple"): that would be a leak."""

    def request(row):
        return row.messages[1]["content"].partition("\n")[2].strip().lower()

    trained = {request(row) for row in splits["train"] + splits["validation"]}
    assert not [row.source for row in splits["test"] if request(row) in trained]


def test_signature_shows_types_optional_arguments_and_short_enumerations():
    assert (
        signature(FUNCTION)
        == 'book(city: string, nights: integer, price?: float, class?: "eco"|"first", tags?: string[])'
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "[]",
        "null",
        '{"name": "book"}',
        '{"name": "book", "arguments": []}',
        '{"name": "book", "arguments": {}, "more": 1}',
        '{"name": "book", "arguments": {}} and more',
        '{"name": 3, "arguments": {}}',
        "[" * 100_000,
    ],
)
def test_what_is_not_one_call_is_no_call(text):
    assert parse_call(text) is None


def test_score_tells_a_valid_call_from_a_right_one(splits):
    row = splits["train"][0]
    assert score(row.messages[-1]["content"], row) == {"valid JSON": True, "exact match": True}
    assert score('{"name": "other", "arguments": {}}', row) == {"valid JSON": True, "exact match": False}
