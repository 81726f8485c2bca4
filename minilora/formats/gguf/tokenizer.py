"""The tokenizer inside a GGUF file, rebuilt for the `tokenizers` library.

The file holds a vocabulary and one of two ways to use it; what its names and defaults mean is defined by llama.cpp
(src/llama-vocab.cpp):

    gpt2     bytes, cut into words by a named pre-tokenizer, then merged in the order of a list of merges
    llama    characters, spaces as "▁", merged to the token of the highest score; unknown ones fall to bytes
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from gguf import Keys, TokenType
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from minilora.errors import InputError
from minilora.formats.gguf.file import GGUFFile
from minilora.text import Tokenizer

KEYS = Keys.Tokenizer
TOKEN_KEYS = {"bos_token": KEYS.BOS_ID, "eos_token": KEYS.EOS_ID, "unk_token": KEYS.UNK_ID, "pad_token": KEYS.PAD_ID}

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
    if not Path(source).is_file():
        raise InputError(f"{source}: no such file")
    try:
        return _build(GGUFFile(Path(source)).metadata)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _build(metadata: Mapping[str, Any]) -> Tokenizer:
    tokens, kind, pre = metadata.get(KEYS.LIST), metadata.get(KEYS.MODEL), metadata.get(KEYS.PRE, "default")
    if not tokens:
        raise InputError("this GGUF holds no tokenizer (no tokenizer.ggml.tokens)")
    ids: dict[str, int]
    if kind == "gpt2":
        backend = byte_level_bpe(tokens, metadata.get(KEYS.MERGES, []), pre)
        add_bos_token, ids = pre in BEGIN_WITH_BOS, {}
    elif kind == "llama":
        add_space_prefix = metadata.get(KEYS.ADD_PREFIX, True)
        backend = _sentencepiece_bpe(tokens, metadata.get(KEYS.SCORES, []), add_space_prefix)
        add_bos_token, ids = True, {"unk_token": 0, "bos_token": 1, "eos_token": 2}
    else:
        raise InputError(f"this GGUF's vocabulary is of the kind {kind!r}; known here are gpt2 and llama")
    # Control and user-defined tokens are found in a text before anything else.
    added = [
        AddedToken(token, special=token_type != TokenType.USER_DEFINED, normalized=False)
        for token, token_type in zip(tokens, metadata.get(KEYS.TOKEN_TYPE, []), strict=False)
        if token_type in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    ]
    backend.add_tokens(added)

    ids |= {name: metadata[key] for name, key in TOKEN_KEYS.items() if key in metadata}
    named_tokens = {name: tokens[id] for name, id in ids.items() if id < len(tokens)}
    if metadata.get(KEYS.ADD_BOS, add_bos_token) and "bos_token" in named_tokens:
        bos = named_tokens["bos_token"]
        special_tokens = [(bos, backend.token_to_id(bos))]
        backend.post_processor = TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", special_tokens)
    names = metadata.get(KEYS.CHAT_TEMPLATES, [])
    templates = {name: metadata.get(KEYS.CHAT_TEMPLATE_N.format(name=name)) for name in names}
    templates["default"] = metadata.get(KEYS.CHAT_TEMPLATE)
    return Tokenizer(
        backend,
        named_tokens,
        {name: source for name, source in templates.items() if source},
        eos_token_ids=[metadata[key] for key in (KEYS.EOT_ID, KEYS.EOM_ID) if key in metadata],
    )


def byte_level_bpe(tokens: Sequence[str], merges: Sequence[str], pre: str) -> tokenizers.Tokenizer:
    if pre not in PRE_TOKENIZERS:
        raise InputError(f"this GGUF's pre-tokenizer is {pre!r}; known here are {', '.join(PRE_TOKENIZERS)}")
    vocabulary = {token: id for id, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre in WHOLE_WORDS_FIRST))
    if pre in COMPOSED:
        backend.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in PRE_TOKENIZERS[pre]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(tokens: Sequence[str], scores: Sequence[float], add_space_prefix: bool) -> tokenizers.Tokenizer:
    vocabulary = {token: id for id, token in enumerate(tokens)}
    # SentencePiece merges whichever neighbours form the token of the highest score; `tokenizers` goes by a list of
    # merges. So: every way to halve every token into two tokens, best token first.
    by_score = sorted(vocabulary, key=lambda token: scores[vocabulary[token]], reverse=True)
    halves = [(token[:cut], token[cut:]) for token in by_score for cut in range(1, len(token))]
    merges = [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
    bpe = models.BPE(vocabulary, merges, unk_token=tokens[0], fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(bpe)
    prefix = [normalizers.Prepend("▁")] if add_space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*to_text, *([decoders.Strip(" ", 1, 0)] if add_space_prefix else [])])
    return backend
