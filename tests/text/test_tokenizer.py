"""The tokenizer: transformers reads what it saves, it reads what transformers saves, and its offsets are characters."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from helpers.chat import CHATML, LLAMA3, TEMPLATES, TURN_END, in_transformers, tiny, tiny_backend_json, untagged, user
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from minilora.errors import InputError
from minilora.formats.gguf.tokenizer import read_gguf_tokenizer
from minilora.text.tokenizer import Tokenizer
from minilora.text.tokenizer_files import read_tokenizer, save_tokenizer

PIECES = ["a", "the ", " be", "\n\n", "é", "🤗", "👩‍👧", "中", "</s>", "<|im_end|>", "12"]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=8).map("".join)


@pytest.fixture(scope="module")
def pair() -> tuple[Tokenizer, Any]:
    ours = tiny(CHATML, named_tokens={"pad_token": "<|end|>"})
    return ours, in_transformers(ours)


@settings(deadline=None, max_examples=200)
@given(text=texts)
def test_transformers_encodes_the_same_with_what_we_save(pair: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = pair
    ids = ours.encode(text)
    assert ids == theirs(text, add_special_tokens=False).input_ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    assert ours.decode(ids, skip_special_tokens=False) == text  # every byte is in the vocabulary


def test_transformers_reads_the_names_and_the_template_we_save(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<s>", "</s>", "<|end|>")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_token_id, ours.eos_token_id)
    assert theirs.chat_template == ours.chat_template == CHATML
    assert len(theirs) == len(ours)


def test_smollm2_survives_the_round_trip(smollm2_gguf: Path, tmp_path: Path) -> None:
    first = read_gguf_tokenizer(smollm2_gguf)
    save_tokenizer(first, tmp_path)
    again, theirs = read_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "In 2024,  3 cafés — 🤗!\n\n\tdef f(x): return x<|im_end|>\n"
    assert first.encode(text) == again.encode(text) == theirs(text, add_special_tokens=False).input_ids
    for messages in ([user("Hi")], [{"role": "system", "content": "S"}, user("Hi")]):
        chat = first.apply_chat_template(messages, add_generation_prompt=True)
        assert chat == again.apply_chat_template(messages, add_generation_prompt=True)
        assert chat == theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert again.eos_token_ids == first.eos_token_ids
    assert not list(tmp_path.rglob("*.tmp"))


@settings(deadline=None, max_examples=200)
@given(text=texts)
def test_offsets_are_the_characters_that_tokens_cover(pair: tuple[Tokenizer, Any], text: str) -> None:
    """Every byte is spelled by a token, so: a character's bytes come from tokens that all claim this character."""
    ours, _ = pair
    [(ids, offsets)] = ours.encode_batch([text])
    covered = [set(range(start, end)) for start, end in offsets]
    assert set().union(*covered) == set(range(len(text)))
    for id, (start, end) in zip(ids, offsets, strict=True):
        token = ours.decode([id], skip_special_tokens=False)
        if "\ufffd" not in token:  # whole characters
            assert text[start:end] == token
        else:
            assert any(ord(character) > 127 for character in text[start:end])
    assert ours.encode_batch([text, "a"]) == [(ids, offsets), *ours.encode_batch(["a"])]


def test_an_emoji_of_several_tokens(pair: tuple[Tokenizer, Any]) -> None:
    ours, _ = pair
    [(ids, offsets)] = ours.encode_batch(["a 🤗b"])
    emoji = [offset for id, offset in zip(ids, offsets, strict=True) if "\ufffd" in ours.decode([id])]
    assert len(emoji) >= 3
    assert set(emoji) <= {(1, 3), (2, 3)}  # the first may hold the space too
    assert offsets[-1] == (3, 4)


def test_offsets_keep_the_space_that_a_byte_level_post_processor_cuts_off() -> None:
    backend = tokenizers.Tokenizer.from_str(tiny_backend_json())
    backend.post_processor = processors.ByteLevel(trim_offsets=True)

    def covered(offsets: list[tuple[int, int]]) -> list[int]:
        return sorted({character for start, end in offsets for character in range(start, end)})

    assert covered(backend.encode("be as").offsets) == [0, 1, 3, 4]
    [(_, offsets)] = Tokenizer(backend, {"eos_token": "</s>"}).encode_batch(["be as"])
    assert covered(offsets) == [0, 1, 2, 3, 4]


# Reading a Hugging Face folder


def write(folder: Path, backend: str | None = None, template: str | None = None, **files: Any) -> Path:
    (folder / "tokenizer.json").write_text(tiny_backend_json() if backend is None else backend, encoding="utf-8")
    for name, content in {"tokenizer_config": {"eos_token": "</s>"}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def test_what_transformers_saves(tmp_path: Path) -> None:
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tiny_backend_json()),
        bos_token="<s>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    theirs.chat_template = CHATML
    theirs.add_special_tokens({"additional_special_tokens": ["<new>"]})
    theirs.save_pretrained(tmp_path)
    ours = read_tokenizer(tmp_path)
    assert ours.encode("a<new>b") == theirs("a<new>b", add_special_tokens=False).input_ids
    assert ours.named_tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    assert ours.chat_template == CHATML


def test_a_chat_template_in_each_place_it_may_be(tmp_path: Path) -> None:
    config = {"eos_token": {"content": "</s>", "lstrip": False}}
    assert read_tokenizer(write(tmp_path, tokenizer_config=config)).chat_template is None

    write(tmp_path, tokenizer_config=config | {"chat_template": "field"})
    assert read_tokenizer(tmp_path).chat_template == "field"

    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools: {{ tools | length }}"}]
    write(tmp_path, tokenizer_config=config | {"chat_template": named})
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.apply_chat_template([user("hi")]) == "plain"
    assert tokenizer.apply_chat_template([user("hi")], tools=[{}]) == "tools: 1"

    save_tokenizer(tokenizer, tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.chat_template == tokenizer.chat_templates == read_tokenizer(tmp_path / "saved").chat_templates

    write(tmp_path, tokenizer_config=config | {"chat_template": "field"}, template="file")
    assert read_tokenizer(tmp_path).chat_template == "file"


def test_names_from_special_tokens_map_and_eos_from_generation_config(tmp_path: Path) -> None:
    names = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": "<|end|>"}
    write(tmp_path, tokenizer_config={}, special_tokens_map=names, generation_config={"eos_token_id": 3})
    tokenizer = read_tokenizer(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<|end|>")
    assert tokenizer.eos_token_ids == [1, 3]
    assert read_tokenizer(write(tmp_path, tokenizer_config={"pad_token": "<|user|>"})).pad_token == "<|user|>"
    write(tmp_path, special_tokens_map=names, generation_config={"eos_token_id": [1, 7, 99999]})
    assert read_tokenizer(tmp_path).eos_token_ids == [1, 7]  # an id beyond the vocabulary cannot be generated


def test_added_tokens_that_only_the_config_lists(tmp_path: Path) -> None:
    size = tokenizers.Tokenizer.from_str(tiny_backend_json()).get_vocab_size()
    token = {"content": "<late>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    write(tmp_path, tokenizer_config={"eos_token": "<late>", "added_tokens_decoder": {str(size): token}})
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.encode("a<late>")[-1] == tokenizer.eos_token_id == size
    assert tokenizer.decode([size]) == ""
    write(tmp_path, tokenizer_config={"eos_token": "<late>", "added_tokens_decoder": {str(size + 5): token}})
    with pytest.raises(InputError, match=f"the id {size + 5}"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("backend", "files", "words"),
    [
        ("{", {}, r"tokenizer\.json: not a tokenizer"),
        ('{"a": 1}', {}, r"tokenizer\.json: not a tokenizer"),
        (None, {"tokenizer_config": {}}, "names no eos_token"),
        (None, {"tokenizer_config": {"eos_token": "<nowhere>"}}, "'<nowhere>' is not in the tokenizer's vocabulary"),
        (None, {"tokenizer_config": ["eos_token"]}, r"tokenizer_config\.json: not a JSON object"),
        (None, {"tokenizer_config": {"eos_token": {"text": "</s>"}}}, "malformed"),
        (None, {"generation_config": {"eos_token_id": {"a": "b"}}}, "malformed"),
        (
            None,
            {"tokenizer_config": {"eos_token": "</s>", "chat_template": [{"name": "../../up", "template": ""}]}},
            "may not be named '../../up'",
        ),
    ],
)
def test_a_broken_folder_is_named(tmp_path: Path, backend: str | None, files: dict[str, Any], words: str) -> None:
    write(tmp_path, backend, **files)
    with pytest.raises(InputError, match=words) as caught:
        read_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_without_tokenizer_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{nonsense")
    (tmp_path / "tokenizer.json").write_text(tiny_backend_json())
    with pytest.raises(InputError, match=r"tokenizer_config\.json: not valid JSON"):
        read_tokenizer(tmp_path)


# Special tokens


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_turn_end_of_a_template_is_an_eos(name: str) -> None:
    for template in (TEMPLATES[name], untagged(TEMPLATES[name])):
        tokenizer = tiny(template, eos_token="</s>")
        ids = [tokenizer.eos_token_id, *tokenizer.encode(TURN_END[name])]
        assert tokenizer.eos_token_ids == list(dict.fromkeys(ids))


def test_no_template_no_turn_end() -> None:
    assert tiny().eos_token_ids == [1]
    assert tiny("{{ messages[0].content }}").eos_token_ids == [1]
    assert tiny("{% for m in messages %}{{ m.content }} the end{% endfor %}").eos_token_ids == [1]
    assert tiny("{{ raise_exception('no') }}").eos_token_ids == [1]


def test_bos_comes_first_once_and_only_where_it_is_wanted(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(tiny_backend_json())
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    wants = Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})
    assert wants.encode("a", add_special_tokens=True) == [0, *wants.encode("a")]
    assert wants.encode("<s>a", add_special_tokens=True) == wants.encode("<s>a")
    assert in_transformers(wants)("a").input_ids == wants.encode("a", add_special_tokens=True)
    save_tokenizer(wants, tmp_path)
    assert read_tokenizer(tmp_path).add_bos_token
    assert not tiny().add_bos_token
    assert tiny().encode("a", add_special_tokens=True) == tiny().encode("a")


def test_padding_falls_back_to_eos() -> None:
    assert tiny().pad_token_id == tiny().eos_token_id
    assert tiny(named_tokens={"pad_token": "<|end|>"}).pad_token == "<|end|>"


@pytest.mark.parametrize("name", ["../../../trusted/chat_template", "a/b", "", ".hidden", "a\x00", "a b", 3])
def test_a_templates_name_is_a_file_name(name: Any, tmp_path: Path) -> None:
    """Whoever read it, from a folder or from GGUF: saving would write a file of that name."""
    tokenizer = tiny(CHATML)
    with pytest.raises(InputError, match="a chat template may not be named"):
        Tokenizer(tokenizer.backend, tokenizer.named_tokens, {"default": CHATML, name: CHATML})
    tokenizer.chat_templates[name] = CHATML
    with pytest.raises(InputError, match="a chat template may not be named"):
        save_tokenizer(tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_template_says_the_way_out() -> None:
    tokenizer = tiny()
    with pytest.raises(InputError, match=r"chat_template\.jinja"):
        tokenizer.apply_chat_template([user("hi")])
    tokenizer.chat_template = LLAMA3
    assert "hi<|eot_id|>" in tokenizer.apply_chat_template([user("hi")])


def test_copies_and_pickles() -> None:
    tokenizer = tiny(CHATML)
    text = tokenizer.apply_chat_template([user("hi")])
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other.apply_chat_template([user("hi")]) == text
        assert other.encode(text) == tokenizer.encode(text)
