import re
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.app.recipe import read_recipe
from minilora.errors import InputError


@dataclass(frozen=True)
class Inner:
    rate: float = 2.0
    names: str | list[str] | None = "all"
    pattern: dict[str, int] = field(default_factory=dict)
    pair: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class Outer:
    data: str = ""
    count: int = 1
    on: bool | str = True
    kind: Literal["a", "b"] = "a"
    inner: Inner = field(default_factory=lambda: Inner(rate=5.0))


def read(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return read_recipe(path, Outer())


def test_a_recipe_lies_over_the_defaults_section_by_section(tmp_path):
    config = read(
        tmp_path, "data: rows.jsonl\ninner:\n  names: [q_proj, v_proj]\n  pattern: {q_proj: 4}\n  pair: [0, 0.5]"
    )
    assert config == Outer(data="rows.jsonl", inner=Inner(5.0, ["q_proj", "v_proj"], {"q_proj": 4}, (0.0, 0.5)))


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "'0.001'"])
def test_a_number_without_a_dot_is_a_number(tmp_path, text):
    """YAML 1.1 reads 1e-3 as a string: a learning rate that everybody writes."""
    assert read(tmp_path, f"inner: {{rate: {text}}}").inner.rate == 0.001


@pytest.mark.parametrize(
    "text, message",
    [
        ("cuont: 3", "unknown key 'cuont'; did you mean 'count'?"),
        ("inner: {zzz: 3}", "inner: unknown key 'zzz'; known keys: rate, names"),
        ("count: three", "count must be int, not 'three'"),
        ("count: 1.5", "count must be int, not 1.5"),
        ("count: true", "count must be int, not True"),
        ("kind: c", "kind must be 'a' or 'b', not 'c'"),
        ("inner: {names: 3}", "names must be str or list[str] or nothing, not 3"),
        ("inner: 3", "inner: expected `key: value` lines, found 3"),
        ("inner: {pair: [1, 2, 3]}", "pair must be tuple[float, float], not [1, 2, 3]"),
        ("- a\n- b", "expected `key: value` lines"),
        ("a: [", "is not a YAML file"),
        ("!!python/object/apply:os.system ['echo no']", "is not a YAML file"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, text, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read(tmp_path, text)
    assert "recipe.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_recipe_is_the_default_and_a_missing_one_an_error(tmp_path):
    assert read(tmp_path, "# nothing yet\n") == Outer()
    with pytest.raises(InputError, match=r"no\.yaml: No such file"):
        read_recipe(tmp_path / "no.yaml", Outer())


@settings(deadline=None, max_examples=40)
@given(rate=st.floats(allow_nan=False, allow_infinity=False), count=st.integers(), data=st.text(max_size=20))
def test_what_yaml_writes_comes_back(tmp_path_factory, rate, count, data):
    import yaml

    text = yaml.safe_dump({"inner": {"rate": rate}, "count": count, "data": data})
    config = read(tmp_path_factory.mktemp("recipe"), text)
    assert (config.inner.rate, config.count, config.data) == (rate, count, data)
