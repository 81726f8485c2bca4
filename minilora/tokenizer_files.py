"""A tokenizer as a Hugging Face folder: reading it and writing it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from minilora.errors import InputError
from minilora.tokenizer import NAMED_TOKENS, Tokenizer


def read_folder(folder: Path) -> Tokenizer:
    """Read tokenizer.json with tokenizer_config.json, special_tokens_map.json, generation_config.json and the chat
    templates beside it.

    Raises:
        InputError: tokenizer.json is missing or broken, or a companion is not valid JSON.
    """
    import tokenizers

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{folder}: no tokenizer.json; convert an older tokenizer once with"
            " transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the backend raises plain Exception
        raise InputError(f"{path}: not a tokenizer that `tokenizers` can read ({error})") from error
    backend.no_truncation()
    backend.no_padding()

    config = _read_json(folder / "tokenizer_config.json")
    named_tokens = {}
    for source in (_read_json(folder / "special_tokens_map.json"), config):
        for name in NAMED_TOKENS:
            if source.get(name) is not None:
                named_tokens[name] = _text_of(source[name])
    _add_missing_tokens(backend, config, folder)

    eos = _read_json(folder / "generation_config.json").get("eos_token_id") or []
    return Tokenizer(
        backend,
        named_tokens,
        _read_chat_templates(folder, config),
        eos_token_ids=[eos] if isinstance(eos, int) else eos,
        add_bos_token=config.get("add_bos_token"),
        config=config,
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object")
    return content


def _text_of(token: Any) -> str:
    """A token is written as its text, or as an object with the text under `content`."""
    return token["content"] if isinstance(token, dict) else str(token)


def _add_missing_tokens(backend: Any, config: dict[str, Any], folder: Path) -> None:
    """Older folders list some added tokens in tokenizer_config.json only."""
    from tokenizers import AddedToken

    for id, token in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        if backend.token_to_id(token["content"]) is None:
            options = {k: token[k] for k in ("single_word", "lstrip", "rstrip", "normalized") if k in token}
            backend.add_tokens([AddedToken(token["content"], special=token.get("special", False), **options)])
            if backend.token_to_id(token["content"]) != int(id):
                raise InputError(
                    f"{folder / 'tokenizer_config.json'}: token {token['content']!r} cannot have the id {id}"
                )


def _read_chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Template name to source; a .jinja file wins over the field of tokenizer_config.json."""
    field = config.get("chat_template") or {}
    if isinstance(field, str):
        templates = {"default": field}
    elif isinstance(field, list):
        templates = {entry["name"]: entry["template"] for entry in field}
    else:
        templates = dict(field)
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return templates


def write_folder(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer such that transformers' AutoTokenizer reads it: the same ids, the same chat text."""
    config = {key: value for key, value in tokenizer.config.items() if key != "chat_template"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | config
    config |= tokenizer.named_tokens

    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "tokenizer.json", tokenizer.to_json())
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    named = json.dumps(tokenizer.named_tokens, indent=2, ensure_ascii=False) + "\n"
    _write(folder / "special_tokens_map.json", named)
    for name, source in tokenizer.chat_templates.items():
        if name == "default":
            _write(folder / "chat_template.jinja", source)
        else:
            (folder / "additional_chat_templates").mkdir(exist_ok=True)
            _write(folder / "additional_chat_templates" / f"{name}.jinja", source)


def _write(path: Path, text: str) -> None:
    """Write beside the target, then replace it: a reader never sees half a file."""
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=path.name, suffix=".tmp", delete=False, encoding="utf-8", newline=""
    ) as file:
        file.write(text)
    Path(file.name).replace(path)
