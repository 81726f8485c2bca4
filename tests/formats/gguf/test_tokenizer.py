"""Tokenizers from GGUF metadata, against transformers, llama.cpp's definitions and SentencePiece's algorithm."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import regex
import transformers
from helpers.chat import in_transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from minilora.errors import InputError
from minilora.formats.gguf.file import GGUFFile
from minilora.formats.gguf.tokenizer import PRE_TOKENIZERS, read_gguf_tokenizer
from minilora.text.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, _, _, BYTE = map(int, gguf.TokenType)

FRAGMENTS = [
    *("a", "the", " the", "CamelCase", "don't", "I'LL", "'s", "x_y", "é", "e\u0301", "ß", "中文", "हिन्दी", "عربي"),
    *("1", "2024", " 5", "  5", "\n5", "3.14", "1,000", "½", "²", "٣", "a1b2"),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", " \n "),
    *("🤗", "👩‍👩‍👧", "🇫🇷", "{", "}", "[]", "!?", "...", "$", "#", "—", "’", "\\", '"', "==", "<", "|", "/"),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<|im_"),
]
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=10).map("".join)


@pytest.fixture(scope="module")
def metadata(smollm2_gguf: Path) -> dict[str, Any]:
    return GGUFFile(smollm2_gguf).metadata


@pytest.fixture(scope="module")
def ours(metadata: dict[str, Any]) -> Tokenizer:
    return read_gguf_tokenizer(metadata)


@pytest.fixture(scope="module")
def theirs(smollm2_gguf: Path) -> Any:
    """transformers' own reading of the file, with SmolLM2's published pre-tokenizer put in.

    What transformers (5.23) makes of the file cuts words without separating digits first, so "a  5" becomes
    a, space, space, 5. The published tokenizer.json has the two steps below and llama.cpp's "smollm" means the same.
    """
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return theirs


@settings(deadline=None, max_examples=200)
@given(text=texts)
def test_encodes_as_transformers_with_the_published_pre_tokenizer(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    for skip in (False, True):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_digits_are_separated_before_words_are_cut(ours: Tokenizer) -> None:
    """Two spaces before a digit are one token, as before a letter's end of text: the digit is no longer there."""
    assert [ours.decode([id]) for id in ours.encode("a  5")] == ["a", "  ", "5"]


def test_names_and_template_are_those_of_transformers(ours: Tokenizer, theirs: Any) -> None:
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 2)
    assert ours.named_tokens == {name: str(token) for name, token in theirs.special_tokens_map.items()}
    messages = [{"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(messages, add_generation_prompt=True) == theirs.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    assert ours.eos_token_ids == [2]
    assert not ours.add_bos_token


# The expressions of llama.cpp's src/llama-vocab.cpp, in the words it has for its own engine.
CONTRACTION = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA_CPP = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "starcoder": [r"\p{N}", GPT2],
    "llama-bpe": [
        CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "qwen2": [CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"],
    "tekken": [  # it writes \p{Lu} and \p{Ll} as letters that are not ASCII of the other case: so for ASCII only
        r"[^\r\n\p{L}\p{N}]?((?=\p{L})[^a-z])*((?=\p{L})[^A-Z])+|[^\r\n\p{L}\p{N}]?((?=\p{L})[^a-z])+((?=\p{L})[^A-Z])*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
}


def words_of(text: str, expressions: list[str]) -> list[str]:
    """The matches of each expression, and what lies between them, in the pieces that the one before left."""
    pieces = [text]
    for expression in expressions:
        cut = []
        for piece in pieces:
            ends = [0, *(end for match in regex.finditer(expression, piece) for end in match.span()), len(piece)]
            cut += [piece[a:b] for a, b in pairwise(ends) if a < b]
        pieces = cut
    return pieces


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_words_are_those_of_llama_cpp(pre: str, data: st.DataObject) -> None:
    ascii_only = st.characters(codec="ascii")
    # Unassigned characters belong to the classes of whichever Unicode version a library was made for.
    any_text = st.text(ascii_only if pre == "tekken" else st.characters(exclude_categories=("Cs", "Cn")), max_size=8)
    fragments = [fragment for fragment in FRAGMENTS if fragment.isascii() or pre != "tekken"]
    text = "".join(data.draw(st.lists(st.sampled_from(fragments) | any_text, max_size=10)))

    tokenizer = read_gguf_tokenizer(byte_vocabulary(pre))
    pieces = tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in pieces] == words_of(text, LLAMA_CPP[pre])


def byte_vocabulary(pre: str, **more: Any) -> dict[str, Any]:
    tokens = ["<s>", "</s>", "<|eot|>", "<tool>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "bc", "abc"]
    types = [CONTROL, CONTROL, CONTROL, 4, *[NORMAL] * (len(tokens) - 4)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["b c", "a b"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts)
def test_qwen2_normalizes_as_qwens_own_tokenizer(text: str, tmp_path: Path) -> None:
    """llama.cpp does not normalize; the model was trained on text that was composed (NFC) first."""
    metadata = byte_vocabulary("qwen2")
    vocabulary = {token: id for id, token in enumerate(metadata["tokenizer.ggml.tokens"]) if id >= 4}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(metadata["tokenizer.ggml.merges"]))
    theirs = transformers.Qwen2TokenizerFast.from_pretrained(tmp_path)
    text = text.replace("<|endoftext|>", "")  # a special token of theirs
    assert read_gguf_tokenizer(metadata).encode(text) == theirs.encode(text)


def test_whole_words_come_before_merges_where_the_model_says_so() -> None:
    """Llama 3 takes a word that is a token as it is; the others merge "abc" to a, bc."""
    for pre, expected in (("llama-bpe", ["abc"]), ("tekken", ["abc"]), ("gpt-2", ["a", "bc"])):
        tokenizer = read_gguf_tokenizer(byte_vocabulary(pre))
        assert [tokenizer.decode([id]) for id in tokenizer.encode("abc")] == expected


def test_bos_and_turn_end_as_the_file_says() -> None:
    for pre, says, expected in (
        ("llama-bpe", {}, True),
        ("llama-bpe", {"add_bos_token": False}, False),
        ("qwen2", {}, False),
    ):
        tokenizer = read_gguf_tokenizer(byte_vocabulary(pre, eot_token_id=2, **says))
        assert tokenizer.add_bos_token == expected
        assert tokenizer.eos_token_ids == [1, 2]
        assert tokenizer.encode("<tool>a", add_special_tokens=True)[-2] == 3  # user-defined tokens are whole
        assert tokenizer.decode([2, 3]) == "<tool>"  # and no special ones
        assert in_transformers(tokenizer)("a").input_ids == tokenizer.encode("a", add_special_tokens=True)


def sentencepiece_vocabulary(**more: Any) -> dict[str, Any]:
    """<unk>, BOS, EOS, 256 bytes, and pieces in the order in which they were merged, best first."""
    pieces = [
        "aa",
        "▁a",
        "ab",
        "ba",
        "▁▁",
        "▁ab",
        "aaa",
        "aab",
        "aba",
        "▁b",
        "ab▁",
        "▁▁a",
        "éa",
        "aaaa",
        "abab",
        "▁▁▁▁",
    ]
    characters = ["▁", "a", "b", "é", "."]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *characters]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces) + len(characters))],
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 21],
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def sentencepiece(text: str, metadata: dict[str, Any]) -> list[int]:
    """SentencePiece's BPE as it is defined: join the neighbours that form the best token, the leftmost of equals."""
    ids = {token: id for id, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    scores = metadata["tokenizer.ggml.scores"]
    symbols = list(text.replace(" ", "▁"))
    while pairs := [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in ids]:
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    spelled = ([ids[s]] if s in ids else [ids[f"<0x{byte:02X}>"] for byte in s.encode()] for s in symbols)
    return [id for part in spelled for id in part]


@settings(deadline=None, max_examples=200)
@given(text=st.text("ab é.🤗 ", min_size=1, max_size=12), space=st.booleans())
def test_sentencepiece_vocabularies_are_merged_by_score(text: str, space: bool) -> None:
    metadata = sentencepiece_vocabulary(add_space_prefix=space)
    tokenizer = read_gguf_tokenizer(metadata)
    ids = tokenizer.encode(text)
    assert ids == sentencepiece(" " + text if space else text, metadata)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<s>" + text, add_special_tokens=True) == [1, *ids]  # BOS once


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer.ggml.model": "bert"}, "kind 'bert'; known here are gpt2 and llama"),
        ({"tokenizer.ggml.pre": "klingon"}, "pre-tokenizer is 'klingon'; known here are default, gpt-2, smollm"),
        ({"tokenizer.ggml.tokens": []}, "no tokenizer"),
        ({"tokenizer.ggml.eos_token_id": 9999}, "no eos_token"),
    ],
)
def test_unknown_kinds_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_gguf_tokenizer(byte_vocabulary("gpt-2") | change)


def test_a_file_that_is_not_gguf(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.gguf: no such file"):
        read_gguf_tokenizer(tmp_path / "missing.gguf")
    (tmp_path / "other.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match=r"other\.gguf"):
        read_gguf_tokenizer(tmp_path / "other.gguf")
