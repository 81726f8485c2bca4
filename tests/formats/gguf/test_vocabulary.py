"""Tokenizers as GGUF metadata: llama.cpp reads the same ids out of a text, or the tokenizer is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from helpers.chat import CHATML, SPECIAL, tiny
from helpers.gguf_models import model_of
from helpers.llama_cpp import LlamaCpp
from helpers.models import CONFIGS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Split

from minilora import InputError, save_gguf
from minilora.formats.gguf.tokenizer import LLAMA3, QWEN2, read_gguf_tokenizer
from minilora.formats.gguf.vocabulary import PROBE, vocabulary_metadata
from minilora.text.tokenizer import Tokenizer

TEXTS = [PROBE * 2, "the weather in the north is as it is", "aaa   bbb\n\n12345 \t x", "a be bee, 'tis I'll\r\n"]
FRAGMENTS = [
    *("the", " the", "don't", "I'LL", "x_y", "é", "ß", "中文", "हिन्दी", "1", "2024", " 5", "  5", "\n5", "3.14", "½"),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", " \n ", "🤗", "{", "!?", "...", "—", "==", "<", "|", "/"),
    *("<|im_start|>", "<|im_end|>", "[INST]", "<|im_"),
]
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(alphabet="ab", max_size=9), max_size=10).map("".join)


def byte_level(cut: Any, ignore_merges: bool = False, normalizer: Any = None) -> tokenizers.Tokenizer:
    """A byte-level BPE as those of Llama 3 and Qwen in their tokenizer.json."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(cut)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=310, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def sentencepiece() -> tokenizers.Tokenizer:
    """As Llama 2's tokenizer.json: characters with "▁" for spaces, and bytes for what is unknown."""
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # each letter once, so that the tokens fit the model; the rest of PROBE falls to bytes
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    # "abba" and the like can be put together in several ways, of which the scores choose one
    trained.train_from_iterator(["the weather in the north is as it is", "abba baab abab baba ab abb bba"], trainer)
    state = json.loads(trained.to_str())
    vocabulary = {token: id for id, token in enumerate(["<unk>", "<s>", "</s>", *in_bytes])}
    for token in sorted(state["model"]["vocab"], key=state["model"]["vocab"].get):
        vocabulary.setdefault(token, len(vocabulary))
    state["model"] |= {"vocab": vocabulary, "byte_fallback": True, "fuse_unk": True}
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


def llama3() -> Tokenizer:
    backend = byte_level([Split(Regex(LLAMA3), "isolated"), ByteLevel(False, use_regex=False)], ignore_merges=True)
    return Tokenizer(backend, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, add_bos_token=True)


def qwen2() -> Tokenizer:
    cut = [Split(Regex(QWEN2), "isolated"), ByteLevel(False, use_regex=False)]
    backend = byte_level(cut, normalizer=normalizers.NFC())
    return Tokenizer(backend, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})


def smollm() -> Tokenizer:
    backend = byte_level([pre_tokenizers.Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    return Tokenizer(backend, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})


def llama2() -> Tokenizer:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return Tokenizer(sentencepiece(), names, add_bos_token=True)


KINDS: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "smollm": (smollm, "smollm"),
    "llama3": (llama3, "llama-bpe"),
    "qwen2": (qwen2, "qwen2"),
    "llama2": (llama2, "default"),
}


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, LlamaCpp, str]:
    make, pre = KINDS[request.param]
    tokenizer = make()
    path: Path = tmp_path_factory.mktemp(request.param) / "model.gguf"
    assert vocabulary_metadata(tokenizer, 320)["tokenizer.ggml.pre"] == pre
    save_gguf(model_of(CONFIGS["llama"]), tokenizer, path, outtype="f32")
    return tokenizer, LlamaCpp(path), request.param


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts)
def test_llama_cpp_reads_the_same_ids(both: tuple[Tokenizer, LlamaCpp, str], text: str) -> None:
    tokenizer, theirs, _ = both
    assert theirs.tokens(text) == tokenizer.encode(text)


def test_llama_cpp_reads_the_same_ids_out_of_the_probe_and_puts_bos_there(
    both: tuple[Tokenizer, LlamaCpp, str],
) -> None:
    tokenizer, theirs, kind = both
    # llama.cpp does not normalize for Qwen2, so that a letter and its accent stay two
    text = PROBE.replace("e\u0301\u0300", "") if kind == "qwen2" else PROBE
    assert theirs.tokens(text, add_special=True) == tokenizer.encode(text, add_special_tokens=True)


def test_names_come_back(both: tuple[Tokenizer, LlamaCpp, str]) -> None:
    tokenizer, _, _ = both
    again = read_gguf_tokenizer(vocabulary_metadata(tokenizer, 320))
    assert again.named_tokens == tokenizer.named_tokens
    assert again.add_bos_token == tokenizer.add_bos_token
    assert again.eos_token_ids == tokenizer.eos_token_ids


def test_what_gguf_cannot_say_is_refused() -> None:
    names = {"eos_token": "<|im_end|>"}
    whitespace = byte_level([pre_tokenizers.Whitespace(), ByteLevel(False, use_regex=False)])
    with pytest.raises(InputError, match="cuts text into words in a way that has no name here"):
        vocabulary_metadata(Tokenizer(whitespace, names), 320)
    # Llama 3's words, but not its rule that a word in the vocabulary is that token
    by_merges = byte_level([Split(Regex(LLAMA3), "isolated"), ByteLevel(False, use_regex=False)])
    with pytest.raises(InputError, match="cuts text into words in a way that has no name here"):
        vocabulary_metadata(Tokenizer(by_merges, names), 320)
    pieces = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<|im_end|>": 1}))
    with pytest.raises(InputError, match="of the kind WordLevel cannot be written as GGUF"):
        vocabulary_metadata(Tokenizer(pieces, names), 320)
    stripping = smollm()
    stripping.backend.add_special_tokens([tokenizers.AddedToken("<|cut|>", rstrip=True, special=True)])
    with pytest.raises(InputError, match=r"GGUF cannot say what this tokenizer does: around .* would become other"):
        vocabulary_metadata(stripping, 320)
    with pytest.raises(InputError, match=r"three tokens that end an answer \(eos, eot, eom\), not 5"):
        vocabulary_metadata(tiny(CHATML), 320, [4, 5, 6])
    with pytest.raises(InputError, match="ids up to 306, the model only 300 embeddings"):
        vocabulary_metadata(tiny(CHATML), 300)
