"""The tokenizer inside a GGUF file, rebuilt for the `tokenizers` library.

The file holds a vocabulary and one of two ways to use it; what its names and defaults mean is defined by llama.cpp
(src/llama-vocab.cpp):

    gpt2     bytes, cut into words by a named pre-tokenizer, then merged in the order of a list of merges
    llama    characters, spaces as "▁", merged to the token of the highest score; unknown ones fall to bytes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora.errors import InputError
from minilora.text import Tokenizer

if TYPE_CHECKING:
    import tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # a token's type

# What a word is. Each expression cuts the pieces that the one before it left.
DIGIT = r"\p{N}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
    "gpt-2": [GPT2],
    "smollm": [DIGIT, GPT2],
    "starcoder": [DIGIT, GPT2],
    "llama-bpe": [LLAMA3],
    "qwen2": [QWEN2],
    "tekken": [TEKKEN],
}
WHOLE_WORDS_FIRST = ("llama-bpe", "tekken")  # a word that is a token is that token, whatever the merges say
COMPOSED = ("qwen2",)  # Qwen normalizes to NFC, though the file cannot say so
BEGIN_WITH_BOS = ("llama-bpe", "tekken")  # unless the file says otherwise


def read_gguf_tokenizer(source: str | Path | Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer from a GGUF file's path, or from its metadata (key to value).

    Raises:
        InputError: not a GGUF file, or a kind of vocabulary or pre-tokenizer that is not known here.
    """
    if isinstance(source, Mapping):
        return _build(source)
    from minilora.formats.gguf.file import GGUFFile

    if not Path(source).is_file():
        raise InputError(f"{source}: no such file")
    try:
        return _build(GGUFFile(Path(source)).metadata)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _build(metadata: Mapping[str, Any]) -> Tokenizer:
    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.{key}", default)

    tokens, kind, pre = get("ggml.tokens"), get("ggml.model"), get("ggml.pre", "default")
    if not tokens:
        raise InputError("this GGUF holds no tokenizer (no tokenizer.ggml.tokens)")
    if kind == "gpt2":
        backend = byte_level_bpe(tokens, get("ggml.merges", []), pre)
        add_bos_token, default_ids = pre in BEGIN_WITH_BOS, {}
    elif kind == "llama":
        backend = _sentencepiece_bpe(tokens, get("ggml.scores", []), get("ggml.add_space_prefix", True))
        add_bos_token, default_ids = True, {"unknown": 0, "bos": 1, "eos": 2}
    else:
        raise InputError(f"this GGUF's vocabulary is of the kind {kind!r}; known here are gpt2 and llama")
    _add_tokens(backend, tokens, get("ggml.token_type", []))

    ids = {name: get(f"ggml.{name}_token_id", default_ids.get(name)) for name in ("bos", "eos", "unknown", "padding")}
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    named_tokens = {names[name]: tokens[id] for name, id in ids.items() if id is not None and id < len(tokens)}
    if get("ggml.add_bos_token", add_bos_token) and "bos_token" in named_tokens:
        _begin_with(backend, named_tokens["bos_token"])
    templates = {name: get(f"chat_template.{name}") for name in get("chat_templates", [])}
    templates["default"] = get("chat_template")
    more_eos_ids = [get(f"ggml.{name}_token_id") for name in ("eot", "eom")]
    return Tokenizer(
        backend,
        named_tokens,
        {name: source for name, source in templates.items() if source},
        eos_token_ids=[id for id in more_eos_ids if id is not None],
    )


def byte_level_bpe(tokens: Sequence[str], merges: Sequence[str], pre: str) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Split
    from tokenizers.pre_tokenizers import Sequence as InTurn

    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise InputError(f"this GGUF's pre-tokenizer is {pre!r}; known here are {known}")
    vocabulary = {token: id for id, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    backend = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre in WHOLE_WORDS_FIRST))
    if pre in COMPOSED:
        backend.normalizer = normalizers.NFC()
    cuts = [Split(Regex(expression), "isolated") for expression in PRE_TOKENIZERS[pre]]
    backend.pre_tokenizer = InTurn([*cuts, ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(tokens: Sequence[str], scores: Sequence[float], add_space_prefix: bool) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {token: id for id, token in enumerate(tokens)}
    # SentencePiece merges whichever neighbours form the token of the highest score; `tokenizers` goes by a list of
    # merges. So: every way to halve every token into two tokens, best token first.
    by_score = sorted(vocabulary, key=lambda token: scores[vocabulary[token]], reverse=True)
    halves = [(token[:cut], token[cut:]) for token in by_score for cut in range(1, len(token))]
    merges = [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=tokens[0], fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("▁")] if add_space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*to_text, *([decoders.Strip(" ", 1, 0)] if add_space_prefix else [])])
    return backend


def _add_tokens(backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Control and user-defined tokens are found in a text before anything else."""
    from tokenizers import AddedToken

    added = [
        AddedToken(token, special=kind != USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types, strict=False)
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    backend.add_tokens(added)


def _begin_with(backend: tokenizers.Tokenizer, bos: str) -> None:
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )
