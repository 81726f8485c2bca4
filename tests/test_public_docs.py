"""Every public name says what it takes, gives and refuses, in sections that a documentation site renders."""

import ast
import builtins
import dataclasses
import inspect
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

import minilora as ml
import minilora.adapters
import minilora.testing
import minilora.training
from minilora.variants import eva, lora_ga

NAMES: dict[str, Any] = {name: getattr(ml, name) for name in ml.__all__}
NAMES |= {f"nf4.{name}": getattr(ml.nf4, name) for name in ("QuantizedTensor", "quantize", "dequantize", "code")}
NAMES |= {f"adapters.{name}": getattr(minilora.adapters, name) for name in ("Adapter", "register", "LoRA")}
NAMES |= {f"training.{name}": getattr(minilora.training, name) for name in ("LoRAFA", "TrainResult")}
NAMES |= {"testing.check_variant": minilora.testing.check_variant}
NAMES |= {"variants.eva.initialize": eva.initialize, "variants.lora_ga.initialize": lora_ga.initialize}
NAMES = {name: value for name, value in NAMES.items() if not inspect.ismodule(value)}
TAKING = [name for name, value in NAMES.items() if value is not ml.InputError]


def sections(docstring: str) -> dict[str, str]:
    """Google's sections by name; what stands before the first one under ""."""
    parts = re.split(r"^(Args|Returns|Yields|Raises|Source|Example):", inspect.cleandoc(docstring), flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def items(section: str) -> dict[str, str]:
    """`name: what it is` of a section, by name; lines that are indented further go on with the one before."""
    found = re.findall(r"^    (\*{0,2}\w[\w., ]*):((?:.*\n?)(?:^ {5,}.*\n?|^\n)*)", section + "\n", re.MULTILINE)
    return {name: text for names, text in found for name in re.split(r", ", names.replace("*", ""))}


def documented_fields(cls: type) -> set[str]:
    """The fields of a dataclass that have a docstring of their own below them, in its class or one that it extends."""
    found = set()
    for each in cls.__mro__[:-1]:
        if not each.__module__.startswith("minilora"):
            continue
        body = ast.parse(inspect.cleandoc("\n" + inspect.getsource(each))).body[0].body  # type: ignore[attr-defined]
        for field, after in pairwise(body):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
                found.add(field.target.id)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_it_begins_with_one_sentence(name: str) -> None:
    first = inspect.cleandoc(NAMES[name].__doc__ or "").split("\n\n")[0]
    assert re.fullmatch(r"[^\n].*[.:](\n.*[.:])?", first, re.DOTALL), "no sentence before the first empty line"
    assert len(re.findall(r"[a-z)`\d]\. [A-Z]", first)) == 0, f"more than one sentence: {first}"


@pytest.mark.parametrize("name", TAKING)
def test_its_arguments_are_those_of_the_signature(name: str) -> None:
    value = NAMES[name]
    said = set(items(sections(value.__doc__ or "").get("Args", "")))
    taken = {each for each in inspect.signature(value).parameters if each != "self"}
    if dataclasses.is_dataclass(value):
        said |= documented_fields(value)
    assert said == taken, f"not said: {sorted(taken - said)}; not there: {sorted(said - taken)}"


@pytest.mark.parametrize("name", [name for name, value in NAMES.items() if inspect.isfunction(value)])
def test_it_says_what_it_returns_and_raises(name: str) -> None:
    value: Callable[..., Any] = NAMES[name]
    found = sections(value.__doc__ or "")
    gives = inspect.signature(value).return_annotation
    if gives not in (None, "None"):
        assert "Returns" in found or "Yields" in found or "@contextmanager" in inspect.getsource(value)
    for error in items(found.get("Raises", "")):
        assert any(hasattr(place, error) for place in (ml, ml.training, builtins))
    assert "Raises" in found or "raises" not in "".join(found.values()).lower(), "Raises is a section of its own"
