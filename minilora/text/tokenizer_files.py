"""A tokenizer as a Hugging Face folder: reading it and writing it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora.errors import InputError
from minilora.text.tokenizer import Tokenizer, require_template_name

if TYPE_CHECKING:
    import tokenizers

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def read_tokenizer(folder: str | Path) -> Tokenizer:
    """Read tokenizer.json, with the named tokens, the chat templates and the EOS ids from the files beside it.

    Raises:
        InputError: tokenizer.json is missing or broken, or another of the files is.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{folder}: no tokenizer.json; an older tokenizer gets one from transformers:"
            " AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    backend = _read_backend(path)
    config = _read_json(folder / "tokenizer_config.json")
    generation_config = _read_json(folder / "generation_config.json")
    try:
        _add_missing_tokens(backend, config)
        eos = generation_config.get("eos_token_id") or []
        return Tokenizer(
            backend,
            _named_tokens(_read_json(folder / "special_tokens_map.json") | config),
            _read_chat_templates(folder, config),
            eos_token_ids=eos if isinstance(eos, list) else [eos],
            add_bos_token=config.get("add_bos_token"),
            config=config,
        )
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}: tokenizer_config.json or a companion is malformed: {error!r}") from error


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the backend raises Exception itself
        raise InputError(f"{path}: not a tokenizer that the tokenizers library can read: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object")
    return content


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """A token is written as its text, or as an object that has the text under `content`."""
    tokens = {name: config[name] for name in NAMES if config.get(name) is not None}
    return {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()}


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Some older folders list an added token in tokenizer_config.json and not in tokenizer.json."""
    from tokenizers import AddedToken

    for id, token in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        if backend.token_to_id(token["content"]) is None:
            options = {key: value for key, value in token.items() if key not in ("content", "__type")}
            backend.add_tokens([AddedToken(token["content"], **options)])
            if backend.token_to_id(token["content"]) != int(id):
                raise InputError(
                    f"tokenizer_config.json gives {token['content']!r} the id {id}, which the vocabulary does not allow"
                )


def _read_chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Name to source. A .jinja file wins over the field of tokenizer_config.json: it is the newer convention."""
    field = config.get("chat_template") or []
    if isinstance(field, str):
        field = [{"name": "default", "template": field}]
    templates = {entry["name"]: entry["template"] for entry in field}
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return templates


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write the tokenizer so that transformers' AutoTokenizer reads it: the same ids, the same chat text."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {key: value for key, value in tokenizer.config.items() if key != "chat_template"}
    config |= tokenizer.named_tokens
    files = {
        "tokenizer.json": tokenizer.to_json(),
        "tokenizer_config.json": _to_json(config),
        "special_tokens_map.json": _to_json(tokenizer.named_tokens),
    }
    for name, source in tokenizer.chat_templates.items():
        require_template_name(name)
        files["chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"] = source
    for name, text in files.items():
        _replace(Path(folder) / name, text)


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _replace(path: Path, text: str) -> None:
    """Write a file beside the target, then put it in the target's place: nobody reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(text.encode())
    temporary.replace(path)
