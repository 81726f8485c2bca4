"""A recipe: a YAML file that fills a config dataclass, section by section, every key and value checked."""

import dataclasses
import difflib
import types
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from minilora.errors import InputError

Config = TypeVar("Config")


def read_recipe(path: str | Path, default: Config) -> Config:
    """`default` with what a YAML file says put over it.

    Raises `InputError` naming the file and the key: a missing file, no YAML, a key or a value
    that the config has no place for.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    return _overlaid(default, content if content is not None else {}, str(path))


def _overlaid(config: Config, content: Any, where: str) -> Config:
    if not isinstance(content, dict):
        raise InputError(f"{where}: expected `key: value` lines, found {content!r}")
    hints = get_type_hints(type(config))
    changes = {}
    for key, value in content.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(hints)}"
            raise InputError(f"{where}: unknown key {key!r}; {hint}")
        if dataclasses.is_dataclass(hints[key]):
            changes[key] = _overlaid(getattr(config, key), value, f"{where}: {key}")
        else:
            try:
                changes[key] = _coerced(hints[key], value)
            except ValueError:
                raise InputError(f"{where}: {key} must be {_described(hints[key])}, not {value!r}") from None
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def _coerced(hint: Any, value: Any) -> Any:
    """`value` as the type `hint`, or ValueError."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or type(value) is hint or (origin is Literal and value in args):
        return value
    if origin in (Union, types.UnionType):
        for each in sorted(args, key=lambda each: each is not type(value)):  # its own type before a conversion
            with suppress(ValueError):
                return _coerced(each, value)
    if origin is list and isinstance(value, list):
        return [_coerced(args[0], item) for item in value]
    if origin is tuple and isinstance(value, list) and len(value) == len(args):
        return tuple(_coerced(arg, item) for arg, item in zip(args, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {_coerced(args[0], k): _coerced(args[1], v) for k, v in value.items()}
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        return float(value)  # a str too: YAML 1.1 reads 1e-3, which has no dot, as a string
    raise ValueError


def _described(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_described, get_args(hint)))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) is None:
        return "nothing" if hint is type(None) else str(hint.__name__)
    return str(hint)
