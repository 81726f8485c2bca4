"""The Modelfile: its Go template gives the text of the chat template, or is not there."""

import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
from helpers.chat import CHATML, LLAMA3, MISTRAL, QWEN, ZEPHYR, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import InputError
from minilora.formats.gguf.tokenizer import read_gguf_tokenizer
from minilora.formats.ollama import find_turns, modelfile, write_modelfile

DEFAULT_SYSTEM = CHATML.replace(
    "{% for message in messages %}",
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}",
    1,
)
# What the few words of Go's text/template that are used mean, in Jinja2's.
IN_JINJA = {
    r"\{\{ range \.Messages \}\}": "{% for message in messages %}",
    r'\{\{ if eq \.Role "(\w+)" \}\}': r"{% if message.role == '\1' %}",
    r'\{\{ else if eq \.Role "(\w+)" \}\}': r"{% elif message.role == '\1' %}",
    r"\{\{ \.Content \}\}": "{{ message.content }}",
    r"\{\{ if \.System \}\}": "{% if system %}",
    r"\{\{ \.System \}\}": "{{ system }}",
    r"\{\{ else \}\}": "{% else %}",
    r"\{\{ end \}\}\{\{ end \}\}": "{% endif %}{% endfor %}",
    r"\{\{ end \}\}": "{% endif %}",
}


def unquoted(value: str) -> str | None:
    """A value without its quotes; None where it goes on in the next line."""
    for quotes in ('"""', '"'):
        if value.startswith(quotes):
            complete = len(value) >= 2 * len(quotes) and value.endswith(quotes)
            return value[len(quotes) : -len(quotes)] if complete else None
    return value


def read_by_ollama(modelfile: str) -> list[tuple[str, str]]:
    """Commands and values as Ollama's parser/parser.go has them: nothing is unescaped, what Go cannot print is lost."""
    commands = []
    lines = iter(modelfile.split("\n"))
    for line in lines:
        if not line or line.startswith("#"):
            continue
        name, value = line.removeprefix("PARAMETER ").split(" ", 1)
        while (text := unquoted(value.strip())) is None:
            value += "\n" + next(lines)
        commands.append((name, "".join(c for c in text if c.isprintable() or c in "\n\r\t")))
    return commands


words = st.text(alphabet="abc é\n{}'\"<|", max_size=8)


def in_go(template: str, messages: list[dict[str, Any]]) -> str:
    """What Ollama makes of the messages: it gives the system messages apart, and all of them by role."""
    for go, jinja in IN_JINJA.items():
        template = re.sub(go, jinja, template)
    assert ".System" not in template and ".Messages" not in template
    system = "".join(message["content"] for message in messages if message["role"] == "system")
    environment = jinja2.Environment(keep_trailing_newline=True)
    return environment.from_string(template).render(messages=messages, system=system)


@settings(deadline=None, max_examples=40)
@given(
    template=st.sampled_from([CHATML, ZEPHYR, QWEN, DEFAULT_SYSTEM]),
    system=st.none() | words.filter(bool),
    contents=st.lists(words, min_size=1, max_size=3),
)
def test_the_go_template_gives_the_same_text(template: str, system: str | None, contents: list[str]) -> None:
    tokenizer = tiny(template)
    go = dict(read_by_ollama(modelfile(tokenizer, "model.gguf")))["TEMPLATE"]
    roles = ["user", "assistant", "user"]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    messages = messages if len(messages) != 2 else messages[:1]
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    assert in_go(go, messages) == tokenizer.apply_chat_template(messages, add_generation_prompt=True)


@pytest.mark.parametrize(
    "template",
    [
        LLAMA3,
        DEFAULT_SYSTEM.replace("Be brief.", "Today is ' + strftime_now('%d %b') + '."),
        MISTRAL,  # refuses a system message, or takes it for a user's
        CHATML.replace("message['content']", "message['content'] | trim"),
        CHATML.replace("message['role'] +", "message['role'] + ('!' if loop.last else '') +"),
        CHATML.replace("<|im_start|>", "{{"),  # would be Go's own
        CHATML.replace("'\\n' }}", "'\\n{' }}"),  # would be, with the braces of Go behind it
        CHATML.replace("<|im_start|>", '"""'),  # would be the Modelfile's own
        CHATML.replace("<|im_start|>", "<|\u00a0|>"),  # Ollama would drop it
        "{% if messages[0].role == 'system' %}{{ bos_token }}{% endif %}" + CHATML,
    ],
    ids=["llama3", "date", "no system", "trim", "position", "braces", "brace", "quotes", "no-break space", "bos"],
)
def test_without_a_template_that_is_right_none_is_written(template: str) -> None:
    tokenizer = tiny(template)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "the"}])  # the template itself works
    assert find_turns(tokenizer) is None
    text = modelfile(tokenizer, "model.gguf")
    assert "# No TEMPLATE: " in text and 'TEMPLATE "' not in text


def test_a_tokenizer_without_chat_template_gets_none() -> None:
    assert modelfile(tiny(), "model.gguf") == 'FROM ./model.gguf\nPARAMETER stop "</s>"\n'


def test_bos_is_left_to_ollama_where_it_puts_it_there() -> None:
    template = "{{ bos_token }}" + CHATML
    assert find_turns(tiny(template, add_bos_token=True)).start == ""  # type: ignore[union-attr]
    assert find_turns(tiny(template, add_bos_token=False)).start == "<s>"  # type: ignore[union-attr]


def test_file_and_stops(tmp_path: Path) -> None:
    path = write_modelfile(tiny(CHATML), tmp_path / "tuned.gguf")
    assert path == tmp_path / "tuned.Modelfile"
    lines = path.read_text().splitlines()
    assert lines[:3] == ["FROM ./tuned.gguf", 'PARAMETER stop "</s>"', 'PARAMETER stop "<|im_end|>"']
    (tmp_path / "other.Modelfile").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*other\.Modelfile: Is a directory"):
        write_modelfile(tiny(CHATML), tmp_path / "other.gguf")


@pytest.mark.parametrize("eos", ['<|"|>', r"<|\|>", "<|a b|>", '"', "<|\n|>", '"a" \n"b"'])
def test_a_stop_is_read_as_it_is(eos: str) -> None:
    tokenizer = tiny(CHATML)
    tokenizer.backend.add_special_tokens([eos])
    tokenizer.named_tokens["eos_token"] = eos
    commands = read_by_ollama(modelfile(tokenizer, "model.gguf"))
    assert [value for name, value in commands if name == "stop"] == [eos, "<|im_end|>"]


@pytest.mark.model
def test_smollm2(smollm2_gguf: Path) -> None:
    tokenizer = read_gguf_tokenizer(smollm2_gguf)
    turns = find_turns(tokenizer)
    assert turns is not None
    messages = [{"role": "user", "content": "Hi"}]
    assert in_go(turns.in_go(), messages) == tokenizer.apply_chat_template(messages, add_generation_prompt=True)


@pytest.mark.parametrize("end", ['</s>\nADAPTER x\nSYSTEM "y', '</s>"""\nFROM other\nSYSTEM """', '"""', "a\x1b[2J"])
def test_a_token_cannot_bring_directives_of_its_own(end: str) -> None:
    tokenizer = tiny(CHATML)
    tokenizer.backend.add_special_tokens([end])
    tokenizer.named_tokens["eos_token"] = end
    text = modelfile(tokenizer, "model.gguf")
    commands = read_by_ollama(text)
    assert [name for name, _ in commands if name not in ("stop", "TEMPLATE")] == ["FROM"]
    left_out = f"# A token that ends an answer cannot be written here: {end!a}" in text.splitlines()
    assert left_out or ("stop", end) in commands


def test_a_files_name_cannot_bring_directives() -> None:
    with pytest.raises(InputError, match="cannot stand in a Modelfile"):
        modelfile(tiny(CHATML), "model\nADAPTER x.gguf")
