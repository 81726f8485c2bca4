"""The demo's task: answer a request with one JSON function call (Berkeley Function-Calling Leaderboard).

A BFCL row holds a question, the functions on offer and, for every argument, the list of accepted values.
We show the called function as a signature and ask for one call:

    user       math.hypot(x: integer, y: integer, z?: integer)
               What is the hypotenuse of a triangle with legs 4 and 5?
    assistant  {"name": "math.hypot", "arguments": {"x": 4, "y": 5}}

Source: Patil et al., "The Berkeley Function Calling Leaderboard" (ICML 2025); the data is Apache-2.0.
"""

import hashlib
import json
import re
from typing import Any

from minilora.data import Row
from minilora.evaluation import answer_of
from minilora.formats import BFCL, wheel_file

CATEGORIES = ("simple_python", "live_simple", "multiple", "live_multiple")
SYSTEM_PROMPT = "Reply with one JSON function call."
LONGEST_ENUMERATION = 60  # characters; a longer one is shown as its type
JSON_TYPES = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}


def load_bfcl() -> dict[str, list[Row]]:
    """BFCL's single-call rows as "train", "validation" and "test", split and sorted by a hash of their id.

    A row's `meta` holds `id`, `function` (name and parameters) and `accepted` (argument -> accepted values).
    Left out are the few rows whose accepted answers contradict their own function, and every request that an
    earlier row made already: BFCL repeats some under another id, and a repeat in the test would be a leak.
    """
    splits: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    seen: set[str] = set()
    for name in (f"BFCL_v4_{category}.json" for category in CATEGORIES):
        for question, answer in zip(_lines(name), _lines(f"possible_answer/{name}"), strict=True):
            row = to_row(question, answer["ground_truth"][0])
            request = _request(question).strip().lower()
            if request not in seen and accepts(row.meta, answer_of(row)):
                splits[split_of(question["id"])].append(row)
            seen.add(request)
    return {name: sorted(rows, key=lambda row: _percentile(row.source)) for name, rows in splits.items()}


def _request(question: dict[str, Any]) -> str:
    return "\n".join(message["content"] for message in question["question"][0])


def _lines(name: str) -> list[dict[str, Any]]:
    text = wheel_file(BFCL, f"bfcl_eval/data/{name}").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def split_of(row_id: str) -> str:
    """ "test" (12%), "validation" (8%) or "train" (80%): stable whatever else is in the data."""
    percentile = _percentile(row_id)
    return "test" if percentile < 12 else "validation" if percentile < 20 else "train"


def _percentile(row_id: str) -> float:
    """A number from 0 to 100 that depends on the id alone, and mixes the categories."""
    return 100 * int(hashlib.sha256(row_id.encode()).hexdigest(), 16) / 2**256


def to_row(question: dict[str, Any], truth: dict[str, dict[str, list[Any]]]) -> Row:
    """A BFCL question and its accepted answer as a chat row: signature and request in, one JSON call out."""
    ((name, accepted),) = truth.items()
    function = next(f for f in question["function"] if f["name"] == name)
    call = {"name": name, "arguments": reference_arguments(function, accepted)}
    messages = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": f"{signature(function)}\n{_request(question)}"},
        {"role": "assistant", "content": json.dumps(call, ensure_ascii=False)},
    ]
    meta = {"id": question["id"], "function": function, "accepted": accepted}
    return Row(messages=messages, source=question["id"], meta=meta)


def signature(function: dict[str, Any]) -> str:
    """`name(arg: type, optional?: type)`, with enumerated values in place of the type."""
    parameters = function["parameters"]
    shown = [
        f"{name}{'' if name in parameters['required'] else '?'}: {_type(spec)}"
        for name, spec in parameters["properties"].items()
    ]
    return f"{function['name']}({', '.join(shown)})"


def _type(spec: dict[str, Any]) -> str:
    values = "|".join(json.dumps(value, ensure_ascii=False) for value in spec.get("enum", []))
    if 0 < len(values) <= LONGEST_ENUMERATION:
        return values
    if spec["type"] in ("array", "tuple"):
        return f"{spec.get('items', {}).get('type', 'any')}[]"
    return str(spec["type"])


def reference_arguments(function: dict[str, Any], accepted: dict[str, list[Any]]) -> dict[str, Any]:
    """The shortest accepted arguments: the first accepted value of each, left out where it may be.

    BFCL marks an argument that may be left out by an accepted value of "".
    """
    required = function["parameters"]["required"]
    order = [name for name in function["parameters"]["properties"] if name in accepted]
    return {name: _first_value(accepted[name]) for name in order if name in required or "" not in accepted[name]}


def _first_value(options: list[Any]) -> Any:
    value = _first(options)
    if isinstance(value, list):
        return [_reference_object(item) if isinstance(item, dict) else item for item in value]
    return _reference_object(value) if isinstance(value, dict) else value


def _reference_object(accepted: dict[str, list[Any]]) -> dict[str, Any]:
    """An accepted object holds, one level deep, a list of accepted values for each key."""
    return {key: _first(options) for key, options in accepted.items() if "" not in options}


def _first(options: list[Any]) -> Any:
    return next((option for option in options if option != ""), "")


# ------------------------------------------------------------------------------------------------ scoring


def score(text: str, row: Row) -> dict[str, bool | float]:
    """{"valid JSON": the text is one JSON call and nothing else, "exact match": BFCL accepts it}."""
    return {"valid JSON": parse_call(text) is not None, "exact match": accepts(row.meta, text)}


def parse_call(text: str) -> tuple[str, dict[str, Any]] | None:
    """(name, arguments) if the whole text is one JSON object with just these two, else None."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):  # the second: a model stuck on "[[[["
        return None
    match call:
        case {"name": str(name), "arguments": dict(arguments), **rest} if not rest:
            return name, arguments
    return None


def accepts(meta: dict[str, Any], text: str) -> bool:
    """Whether BFCL's rules accept `text`: right name, every required argument, every value on its list.

    Strings are compared without case, spaces and the characters , . / - _ * ^ as BFCL does; an integer passes
    for a float; an argument may be missing only where "" is among its accepted values.
    """
    call = parse_call(text)
    if call is None or call[0] != meta["function"]["name"]:
        return False
    arguments, accepted, parameters = call[1], meta["accepted"], meta["function"]["parameters"]
    if any(name not in arguments for name in parameters["required"]):
        return False
    if any(name not in accepted or name not in parameters["properties"] for name in arguments):
        return False
    return all(
        _accepted_value(arguments[name], options, parameters["properties"][name]["type"])
        if name in arguments
        else "" in options
        for name, options in accepted.items()
    )


def _accepted_value(value: Any, options: list[Any], declared: str) -> bool:
    if declared == "float" and type(value) is int:
        value = float(value)
    given = [option for option in options if option != ""]
    # BFCL also takes a value of the accepted answers' own type: a variable's name in place of a number.
    if type(value) is not JSON_TYPES[declared] and not (given and type(value) is type(given[0])):
        return False
    return any(_same(value, option) for option in options)


def _same(value: Any, option: Any) -> bool:
    if isinstance(value, dict) and isinstance(option, dict):
        return _same_object(value, option)
    if isinstance(value, list) and isinstance(option, list):  # items of a list keep their type: 3 is not 3.0
        return list(map(type, value)) == list(map(type, option)) and all(map(_same, value, option))
    return bool(_standard(value) == _standard(option))


def _same_object(value: dict[str, Any], accepted: dict[str, list[Any]]) -> bool:
    if any(key not in accepted for key in value):
        return False
    return all(
        _standard(value[key]) in map(_standard, options) if key in value else "" in options
        for key, options in accepted.items()
    )


def _standard(value: Any) -> Any:
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"') if isinstance(value, str) else value
