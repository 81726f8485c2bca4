"""The tokenizer inside a GGUF file, rebuilt as a `tokenizers` backend.

A GGUF file holds the vocabulary, the merges and the name of a pre-tokenizer: the rule that cuts text into words
before the merges apply. What the names mean is defined by llama.cpp (src/llama-vocab.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilora.errors import InputError
from minilora.tokenizer import Tokenizer

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

# Pre-tokenizer name -> the expressions whose matches become pieces, each applied to the pieces of the one before.
SPLITS = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "starcoder": [r"\p{N}", GPT2],
    "llama-bpe": [LLAMA3],
    "qwen2": [QWEN2],
}
CONTROL, USER_DEFINED = 3, 4  # llama.cpp's token types


def read_gguf(source: str | Path | Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer from a GGUF file's path or from its metadata (key to value, or to gguf's ReaderField).

    Raises:
        InputError: not a GGUF file, or a kind of vocabulary or pre-tokenizer that is not known here.
    """
    fields = source if isinstance(source, Mapping) else _metadata(Path(source))

    def get(key: str, default: Any = None) -> Any:
        value = fields.get(f"tokenizer.{key}", default)
        return value.contents() if hasattr(value, "contents") else value

    tokens, kind = get("ggml.tokens"), get("ggml.model")
    if not tokens:
        raise InputError("this GGUF file has no tokenizer (no tokenizer.ggml.tokens)")
    if kind != "gpt2":
        raise InputError(
            f"this GGUF file's vocabulary is of kind {kind!r}; known here: gpt2 (byte-level BPE)"
        )
    backend = _byte_level_bpe(tokens, get("ggml.merges"), get("ggml.pre", "default"))
    _mark_added_tokens(backend, tokens, get("ggml.token_type", []))

    named_tokens = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        id = get(f"ggml.{key}_token_id")
        if id is not None and id < len(tokens):
            named_tokens[f"{name}_token"] = tokens[id]
    add_bos_token = bool(get("ggml.add_bos_token", False))
    template = get("chat_template")
    further = [get(f"ggml.{key}_token_id") for key in ("eot", "eom")]
    return Tokenizer(
        backend,
        named_tokens,
        {"default": template} if template else {},
        eos_token_ids=[id for id in further if id is not None],
        add_bos_token=add_bos_token,
    )


def _metadata(path: Path) -> Mapping[str, Any]:
    from gguf import GGUFReader

    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        return GGUFReader(path).fields
    except Exception as error:  # the reader raises whatever the bytes lead it to
        raise InputError(f"{path}: not a readable GGUF file ({error})") from error


def _byte_level_bpe(tokens: list[str], merges: list[str], pre: str) -> Any:
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    if pre not in SPLITS:
        raise InputError(
            f"this GGUF file's pre-tokenizer {pre!r} is not known here; known: {', '.join(SPLITS)}"
        )
    vocabulary = {token: id for id, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    backend = Backend(models.BPE(vocabulary, pairs, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *[pre_tokenizers.Split(Regex(expression), "isolated") for expression in SPLITS[pre]],
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _mark_added_tokens(backend: Any, tokens: list[str], types: list[int]) -> None:
    """Control and user-defined tokens are found in the text before anything else."""
    from tokenizers import AddedToken

    backend.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=False)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
