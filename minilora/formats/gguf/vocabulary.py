"""A tokenizer as the metadata of a GGUF file, checked by reading it with formats/gguf/tokenizer.py.

A tokenizer.json can say more than GGUF, which knows two kinds of vocabulary, a list of pre-tokenizers by name, and
three tokens that end an answer. So what was written is read again, and has to give the same tokens for a text that
holds a bit of everything.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

import tokenizers
from gguf import TokenType

from minilora.errors import InputError
from minilora.formats.gguf.tokenizer import (
    KEYS,
    PRE_TOKENIZERS,
    TOKEN_KEYS,
    WHOLE_WORDS_FIRST,
    byte_level_bpe,
    read_gguf_tokenizer,
)
from minilora.text import Tokenizer

# What the pre-tokenizers in PRE_TOKENIZERS cut differently, and what tokenizers trip over.
PROBE = (
    "Hello, World! I'll DON'T it's 'S x_y camelCase HTTPServer 3 12 345 67890  5 1.5 a1b2 ½ ²\n\n\n  indented\tby\r\n"
    " \n def f(x):\n        return x**2  # [done]?!/\n//...   äöü ß e\u0301\u0300 Åland 中文字 日本語"
    " हिन्दी עברית العربية ไทย 🤗👩‍👩‍👧 — “quoted” ’t $%^&*()=+<>|~` trailing  "
)


def vocabulary_metadata(tokenizer: Tokenizer, vocab_size: int, end_ids: Iterable[int] = ()) -> dict[str, Any]:
    """The `tokenizer.*` keys and values of a GGUF file for a model of `vocab_size` embeddings.

    end_ids: tokens that end an answer beside those that the tokenizer knows. Raises InputError for a tokenizer that
    GGUF, or the pre-tokenizers known here, cannot say, or one of more tokens than the model has.
    """
    model = json.loads(tokenizer.backend.to_str())["model"]
    tokens, types = _tokens_and_types(tokenizer, vocab_size)
    metadata: dict[str, Any] = {KEYS.LIST: tokens, KEYS.TOKEN_TYPE: types}
    if model["type"] != "BPE":
        raise InputError(f"a tokenizer of the kind {model['type']} cannot be written as GGUF; only BPE can")
    # A merge's two halves: one string in older tokenizer.json files, two in newer ones.
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if model.get("byte_fallback"):
        metadata |= {KEYS.MODEL: "llama", KEYS.PRE: "default", KEYS.SCORES: _scores(tokens, merges)}
        first = tokenizer.backend.encode("a", add_special_tokens=False).tokens[0]
        metadata[KEYS.ADD_PREFIX] = first.startswith("▁")
    else:
        pre = _pre_tokenizer(tokenizer.backend, model["ignore_merges"])
        metadata |= {KEYS.MODEL: "gpt2", KEYS.PRE: pre, KEYS.MERGES: [" ".join(merge) for merge in merges]}
    metadata |= _special_tokens(tokenizer, end_ids)
    metadata[KEYS.CHAT_TEMPLATE] = tokenizer.chat_template or ""
    others = {name: source for name, source in tokenizer.chat_templates.items() if name != "default"}
    metadata[KEYS.CHAT_TEMPLATES] = list(others)
    metadata |= {KEYS.CHAT_TEMPLATE_N.format(name=name): source for name, source in others.items()}
    _check_by_reading(tokenizer, metadata)
    return metadata


def _tokens_and_types(tokenizer: Tokenizer, vocab_size: int) -> tuple[list[str], list[int]]:
    """Every id's token, and its type; the model's embeddings beyond the tokenizer's ids get names of their own."""
    ids = tokenizer.backend.get_vocab(with_added_tokens=True)
    if max(ids.values()) >= vocab_size:
        raise InputError(f"the tokenizer has ids up to {max(ids.values())}, the model only {vocab_size} embeddings")
    tokens = [f"[PAD{id}]" for id in range(vocab_size)]  # llama.cpp's names for them
    types: list[int] = [TokenType.UNUSED] * vocab_size
    in_bytes = "<0x0A>" in ids
    for token, id in ids.items():
        tokens[id] = token
        types[id] = TokenType.BYTE if in_bytes and re.fullmatch("<0x[0-9A-F]{2}>", token) else TokenType.NORMAL
    for id, added in tokenizer.backend.get_added_tokens_decoder().items():
        types[id] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    unknown = tokenizer.named_tokens.get("unk_token")
    if in_bytes and unknown is not None:
        types[ids[unknown]] = TokenType.UNKNOWN
    return tokens, types


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """SentencePiece's scores, of which only the order counts: the earlier the merge to a token, the higher."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _pre_tokenizer(backend: tokenizers.Tokenizer, ignore_merges: bool) -> str:
    """The name under which llama.cpp knows how this tokenizer cuts a text into words."""
    for name in PRE_TOKENIZERS:
        if ignore_merges == (name in WHOLE_WORDS_FIRST) and _words(byte_level_bpe([], [], name)) == _words(backend):
            return name
    raise InputError(
        "this tokenizer cuts text into words in a way that has no name here; those with one are"
        f" {', '.join(PRE_TOKENIZERS)}: write a folder with save_pretrained, and try llama.cpp's own converter on it"
    )


def _words(backend: tokenizers.Tokenizer) -> list[str] | None:
    if backend.pre_tokenizer is None:
        return None
    text = PROBE if backend.normalizer is None else backend.normalizer.normalize_str(PROBE)
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


def _special_tokens(tokenizer: Tokenizer, end_ids: Iterable[int]) -> dict[str, Any]:
    ids = {name: tokenizer.backend.token_to_id(token) for name, token in tokenizer.named_tokens.items()}
    metadata: dict[str, Any] = {key: ids[name] for name, key in TOKEN_KEYS.items() if name in ids}
    ends = [id for id in dict.fromkeys([*tokenizer.eos_token_ids, *end_ids]) if id != tokenizer.eos_token_id]
    if len(ends) > 2:
        raise InputError(f"GGUF has places for three tokens that end an answer (eos, eot, eom), not {1 + len(ends)}")
    metadata |= dict(zip((KEYS.EOT_ID, KEYS.EOM_ID), ends, strict=False))
    return metadata | {KEYS.ADD_BOS: tokenizer.add_bos_token}


def _check_by_reading(tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    """InputError unless the tokenizer that the metadata describe gives the same ids."""
    read = read_gguf_tokenizer(metadata)
    added = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]
    for text in (PROBE, "".join(f"{token}word {token} \n" for token in added)):
        ours, theirs = tokenizer.encode(text), read.encode(text)
        if ours != theirs:
            at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), 0)
            near = tokenizer.decode(ours[max(at - 2, 0) : at + 3], skip_special_tokens=False)
            raise InputError(
                f"GGUF cannot say what this tokenizer does: around {near!r} a text would become other tokens; write a"
                " folder with save_pretrained"
            )
