"""Labels against transformers' masks and by hand; examples a person can read."""

import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from helpers.chat import (
    CALL,
    CHATML,
    TAKES_TOOLS,
    TEMPLATES,
    THINKING,
    TOOL_CONVERSATION,
    TOOLS,
    assistant,
    conversations,
    in_transformers,
    system,
    tiny,
    tiny_backend_json,
    untagged,
    user,
)
from hypothesis import given, settings
from tokenizers import processors

from minilora.data.batches import collate
from minilora.data.examples import IGNORE, Example, encode_rows, show_example
from minilora.data.rows import Row, as_rows
from minilora.errors import InputError
from minilora.formats.gguf.tokenizer import read_gguf_tokenizer
from minilora.text.tokenizer import Tokenizer


def encode(row: Row | dict[str, Any], tokenizer: Tokenizer) -> Example:
    encoded = encode_rows([row] if isinstance(row, Row) else as_rows([row]), tokenizer)
    assert not encoded.skipped
    return encoded.examples[0]


def learned(example: Example, tokenizer: Tokenizer) -> str:
    """The learned tokens as text; the labels must be the tokens' own ids."""
    assert len(example.labels) == len(example.input_ids)
    assert all(label in (id, IGNORE) for id, label in zip(example.input_ids, example.labels, strict=True))
    return tokenizer.decode([label for label in example.labels if label != IGNORE], skip_special_tokens=False)


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    return {name: in_transformers(tiny(template)) for name, template in TEMPLATES.items()}


@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None, max_examples=40)
@given(messages=conversations())
def test_labels_are_transformers_assistant_mask(
    theirs: dict[str, Any], name: str, messages: list[dict[str, Any]]
) -> None:
    expected = theirs[name].apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    mask = [label != IGNORE for label in encode(Row(messages), tiny(TEMPLATES[name])).labels]
    assert mask == [bool(bit) for bit in expected["assistant_masks"]]
    for template in (TEMPLATES[name], untagged(TEMPLATES[name])):
        example = encode(Row(messages), tiny(template))
        assert example.input_ids == expected["input_ids"]
        assert [label != IGNORE for label in example.labels] == mask


def test_a_line_end_that_the_template_marks_is_learned_and_needs_no_eos() -> None:
    template = CHATML.replace("'<|im_end|>' }}{% endgeneration %}", "'<|im_end|>\\n' }}{% endgeneration %}")
    tokenizer = tiny(template.replace("{{ '\\n' }}\n{%- endfor", "{%- endfor"))
    messages = [user("q"), assistant("a"), user("r"), assistant("b")]
    expected = in_transformers(tokenizer).apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True
    )
    example = encode(Row(messages), tokenizer)
    assert example.input_ids == expected["input_ids"]
    assert [int(label != IGNORE) for label in example.labels] == expected["assistant_masks"]
    assert learned(example, tokenizer) == "a<|im_end|>\nb<|im_end|>\n"


@pytest.mark.parametrize("name", TAKES_TOOLS)
def test_labels_of_tool_calls(theirs: dict[str, Any], name: str) -> None:
    row = Row(TOOL_CONVERSATION, tools=TOOLS)
    expected = theirs[name].apply_chat_template(
        TOOL_CONVERSATION, tools=TOOLS, return_assistant_tokens_mask=True, return_dict=True
    )
    for template in (TEMPLATES[name], untagged(TEMPLATES[name])):
        example = encode(row, tiny(template))
        assert example.input_ids == expected["input_ids"]
        assert [int(label != IGNORE) for label in example.labels] == expected["assistant_masks"]


@pytest.mark.parametrize("pad_token", ["<|im_end|>", "</s>", "<|endoftext|>"])
def test_chatml_by_hand(pad_token: str) -> None:
    """Every answer with its end, whichever token pads; not the headers, not the line's end that follows."""
    tokenizer = tiny(untagged(CHATML), eos_token="<|im_end|>", named_tokens={"pad_token": pad_token})
    parts = [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        ("Hello 🤗<|im_end|>", True),
        ("\n<|im_start|>user\nthe <|im_end|> token?<|im_end|>\n<|im_start|>assistant\n", False),
        ("It is <|im_end|>.<|im_end|>", True),
        ("\n", False),
    ]
    messages = [user("Hi"), assistant("Hello 🤗"), user("the <|im_end|> token?"), assistant("It is <|im_end|>.")]
    encoded = [(tokenizer.encode(text), is_learned) for text, is_learned in parts]
    example = encode(Row(messages), tokenizer)
    assert example.input_ids == [id for ids, _ in encoded for id in ids]
    assert example.labels == [id if is_learned else IGNORE for ids, is_learned in encoded for id in ids]

    batch = collate([example, Example([5], [5])], tokenizer.pad_token_id)
    assert batch.labels[0].tolist() == example.labels
    assert batch.labels[1].tolist() == [5] + [IGNORE] * (len(example.labels) - 1)


def test_smollm2_in_its_own_template(smollm2_gguf: Path) -> None:
    """Pad and EOS are one token here: a mask by token id would never teach this model to stop."""
    tokenizer = read_gguf_tokenizer(smollm2_gguf)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    example = encode({"instruction": "Add 2 and 40", "output": "It is 42. 👩‍🚀"}, tokenizer)
    assert learned(example, tokenizer) == "It is 42. 👩‍🚀<|im_end|>"
    assert example.labels[-1] == IGNORE
    assert tokenizer.decode(example.input_ids, skip_special_tokens=False) == tokenizer.apply_chat_template(
        [user("Add 2 and 40"), assistant("It is 42. 👩‍🚀")]
    )


def test_an_answer_of_many_bytes_is_learned_whole() -> None:
    tokenizer = tiny("{% for m in messages %}{{ m.content }}{% endfor %}")
    for question, answer in (("🤗", "🤗"), ("é中", "中é"), ("👩", "\u200d👧"), ("a ", "🤗b")):
        example = encode(Row([user(question), assistant(answer)]), tokenizer)
        assert learned(example, tokenizer) == f"{answer}</s>"


def test_a_turns_end_outside_the_marks_is_learned_too() -> None:
    template = CHATML.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>' }}")
    assert "endgeneration %}{{ '<|im_end|>'" in template
    tokenizer = tiny(template)
    example = encode(Row([user("q"), assistant("a"), user("r"), assistant("b")]), tokenizer)
    assert learned(example, tokenizer) == "a<|im_end|>b<|im_end|>"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}",
        "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}{% endgeneration %}{{ '\n' }}{% endfor %}",
        CHATML.replace("<|im_end|>", ""),
    ],
)
def test_a_template_without_a_turns_end_gets_eos_after_the_last_answer(template: str) -> None:
    tokenizer = tiny(template)
    example = encode(Row([user("q"), assistant("a")]), tokenizer)
    assert example.input_ids[-1] == example.labels[-1] == tokenizer.eos_token_id
    assert example.labels[-2] != IGNORE  # nothing unlearned stands between the answer and its end
    assert example.input_ids.count(tokenizer.eos_token_id) == 1


def test_thoughts_that_the_template_drops() -> None:
    tokenizer = tiny(THINKING)
    messages = [user("q"), assistant("<think>\nx\n</think>\n\na"), user("q"), assistant("<think>\ny\n</think>\n\nb")]
    example = encode(Row(messages), tokenizer)
    assert learned(example, tokenizer) == "a<|im_end|><think>\ny\n</think>\n\nb<|im_end|>"


def test_a_prompt_is_context_even_where_the_assistant_speaks_in_it() -> None:
    tokenizer = tiny(CHATML)
    value = {"prompt": [user("q"), assistant("a"), user("r")], "completion": [assistant("b")]}
    for template in (CHATML, untagged(CHATML)):
        assert learned(encode(value, tiny(template)), tokenizer) == "b<|im_end|>"


def test_a_pair_with_and_without_a_template() -> None:
    value = {"prompt": "2 + 2 = ", "completion": "4 🤗"}
    with_template, without = tiny(CHATML), tiny()
    assert learned(encode(value, with_template), with_template) == "4 🤗<|im_end|>"
    example = encode(value, without)
    assert without.decode(example.input_ids, skip_special_tokens=False) == "2 + 2 = 4 🤗</s>"
    assert learned(example, without) == "4 🤗</s>"
    with pytest.raises(InputError, match=r"1 of 1 rows cannot be used: row 1: this tokenizer has no chat template"):
        encode({"messages": [user("q"), assistant("a")]}, without)


def test_a_text_is_learned_whole_but_for_its_first_token() -> None:
    tokenizer = tiny(CHATML)
    example = encode({"text": "the north"}, tokenizer)
    assert example.input_ids == [*tokenizer.encode("the north"), tokenizer.eos_token_id]
    assert example.labels == [IGNORE, *example.input_ids[1:]]
    assert encode({"text": "the north</s>"}, tokenizer).input_ids == example.input_ids  # EOS once


def test_bos_once_and_only_where_the_template_does_not_write_it() -> None:
    backend = tokenizers.Tokenizer.from_str(tiny_backend_json())
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})
    text = encode({"text": "ab"}, tokenizer)
    assert text.input_ids == [0, *tokenizer.encode("ab"), tokenizer.eos_token_id]
    assert text.labels == [IGNORE, *text.input_ids[1:]]
    assert encode({"text": "<s>ab"}, tokenizer) == text
    pair = encode({"prompt": "a", "completion": "b"}, tokenizer)
    assert pair.input_ids[0] == 0
    assert learned(pair, tokenizer) == "b</s>"
    tokenizer.chat_template = TEMPLATES["mistral"]  # it writes BOS itself
    assert encode({"prompt": "a", "completion": "b"}, tokenizer).input_ids.count(0) == 1


def test_rows_too_long_are_returned_with_the_reason() -> None:
    rows = as_rows([{"text": "a " * n} for n in (1, 50, 2, 60)])
    encoded = encode_rows(rows, tiny(), max_length=20)
    assert [example.source for example in encoded.examples] == ["row 1", "row 3"]
    assert [(skip.source, skip.reason) for skip in encoded.skipped] == [
        (source, f"{len(encode(row, tiny()).input_ids)} tokens, max_length is 20")
        for source, row in (("row 2", rows[1]), ("row 4", rows[3]))
    ]
    longest = len(encoded.examples[1].input_ids)
    assert not encode_rows(rows[2:3], tiny(), max_length=longest).skipped
    assert encode_rows(rows[2:3], tiny(), max_length=longest - 1).skipped


def test_rows_a_template_refuses_are_counted_and_named() -> None:
    with_system = {"messages": [system("s"), user("q"), assistant("a")]}
    rows = as_rows([with_system, {"prompt": "q", "completion": "a"}, with_system])
    with pytest.raises(InputError, match=r"2 of 3 rows cannot be used: row 1: the chat template refuses .*alternate"):
        encode_rows(rows, tiny(TEMPLATES["mistral"]))
    nothing = Row([user("q"), {"role": "assistant", "tool_calls": [CALL]}], context=2, source="mine:1")
    with pytest.raises(InputError, match="mine:1: it has no answer to learn"):
        encode_rows([nothing], tiny(TEMPLATES["qwen"]))


def test_many_rows_at_once_are_the_rows_one_by_one() -> None:
    rows = as_rows([{"prompt": "the " * (i % 7), "completion": f"{i} 🤗"} for i in range(600)])
    tokenizer = tiny(CHATML)
    encoded = encode_rows(rows, tokenizer)
    assert [example.source for example in encoded.examples] == [row.source for row in rows]
    for i in (0, 255, 256, 599):
        assert encoded.examples[i] == encode(rows[i], tokenizer)
    assert encode_rows([], tokenizer).examples == []


def test_an_example_has_a_label_for_each_token() -> None:
    """In packed sequences, the labels of one row too many would be the next row's."""
    with pytest.raises(InputError, match="rows:3 has 2 labels for 3 tokens: give one for each"):
        Example([5, 6, 7], [-100, 6], "rows:3")


# Showing an example


def test_show_example_marks_what_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny(CHATML)
    example = encode(Row([user("Hi \x1b[31m"), assistant("Hello 🤗")]), tokenizer)
    header, answer = "<|im_start|>user\nHi \\x1b[31m<|im_end|>\n<|im_start|>assistant\n", "Hello 🤗<|im_end|>"
    assert show_example(example, tokenizer, color=False) == f"{header}⟦{answer}⟧\n"
    colored = show_example(example, tokenizer, color=True)
    assert colored == f"\x1b[2m{header}\x1b[0m\x1b[32m{answer}\x1b[0m\x1b[2m\n\x1b[0m"
    assert re.sub("\x1b\\[[0-9]*m", "", colored) == header + answer + "\n"

    row = {"prompt": "Hi \x1b[31m", "completion": "Hello 🤗"}
    for same in (row, as_rows([row])[0]):
        assert show_example(same, tokenizer, color=False) == f"{header}⟦{answer}⟧\n"
    with pytest.raises(InputError, match="its keys are 'promt'"):
        show_example({"promt": "Hi"}, tokenizer)

    assert show_example(example, tokenizer) == show_example(example, tokenizer, color=False)  # no terminal here
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert show_example(example, tokenizer) == colored
    monkeypatch.setenv("NO_COLOR", "1")
    assert show_example(example, tokenizer) == show_example(example, tokenizer, color=False)
