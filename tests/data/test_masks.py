"""What is learned of every kind of conversation in every chat template, beside TRL's assistant masks.

PYTHONPATH=tests python tests/data/test_masks.py --write writes docs/masks.md from what runs.
"""

import re
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from helpers.mask_conversations import CONVERSATIONS, row_of
from helpers.mask_outcomes import KNOWN, outcome, used
from helpers.mask_table import document
from helpers.mask_templates import SMOLLM2, Template, all_templates, trl_files

from minilora.data.examples import IGNORE, Example, encode_rows
from minilora.data.rows import as_rows
from minilora.formats.gguf.tokenizer import read_gguf_tokenizer
from minilora.text import Tokenizer

DOCUMENT = Path(__file__).parents[2] / "docs" / "masks.md"


def wrong_cells(template: Template) -> list[tuple[str, str, str]]:
    return [
        (template.name, conversation, what)
        for conversation in CONVERSATIONS
        for marked in (False, True)
        for what in outcome(template, conversation, marked).wrong
    ]


@pytest.mark.parametrize("template", all_templates(), ids=lambda template: template.name)
def test_labels(template: Template) -> None:
    assert wrong_cells(template) == []


@pytest.mark.parametrize("template", all_templates(), ids=lambda template: template.name)
def test_answers_that_are_only_read(template: Template) -> None:
    """Not learning some answers leaves the text and the labels of the others as they are."""
    row = row_of("turns", template.turn_end, template.in_parts)
    messages = row["messages"]
    unweighted = {"messages": [messages[0], messages[1] | {"weight": 0}, *messages[2:]]}
    completion = {"prompt": messages[:-1], "completion": messages[-1:]}
    for source in (template.source, template.marked):
        tokenizer = template.tokenizer(source)

        def encode(row: dict[str, Any], tokenizer: Tokenizer = tokenizer, **options: bool) -> Example:
            return encode_rows(as_rows([row]), tokenizer, **options).examples[0]

        def learned_after(word: str, all_learned: Example, tokenizer: Tokenizer = tokenizer) -> Example:
            ids = all_learned.input_ids
            begin = next(i for i in range(len(ids)) if word in tokenizer.decode(ids[:i], skip_special_tokens=False))
            return Example(ids, [IGNORE] * begin + all_learned.labels[begin:], all_learned.source)

        all_learned = encode(row)
        assert encode(unweighted) == learned_after("Larger", all_learned)
        assert encode(completion) == learned_after("anyway", all_learned)
        assert encode(row, mask_history=True) == learned_after("anyway", all_learned)


def test_every_known_difference_is_one() -> None:
    for template in all_templates():
        wrong_cells(template)
    for known in KNOWN:
        assert known in used, f"{known}: not so any more; take it out"


def test_trl_trains_with_the_templates_that_its_masks_are_taken_from() -> None:
    spec = find_spec("trl")
    assert spec is not None and spec.origin
    code = Path(spec.origin).with_name("chat_template_utils.py").read_text(encoding="utf-8")
    pairs = re.findall(r"if chat_template == (\w+)_chat_template:\n        return (\w+)_chat_template\n", code)
    assert dict(pairs) == {t.name: f"{t.name}_training" for t in all_templates() if t.by_trl}
    assert {name for name in trl_files() if not name.endswith("_training")} <= {t.name for t in all_templates()}


def test_smollm2_s_template_is_its_own(smollm2_gguf: Path) -> None:
    assert read_gguf_tokenizer(smollm2_gguf).chat_template == SMOLLM2


def test_the_document_says_what_runs() -> None:
    written = DOCUMENT.read_text(encoding="utf-8")
    if f"trl {version('trl')}, transformers {version('transformers')}." not in written:
        pytest.skip("docs/masks.md was not written with the installed trl and transformers")
    lines, now = written.splitlines(), document().splitlines()
    write = "PYTHONPATH=tests python tests/data/test_masks.py --write"
    for line, live in zip(lines, now, strict=False):
        assert line == live, f"{write}: {line!r} is now {live!r}"
    assert len(lines) == len(now), write


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("PYTHONPATH=tests python tests/data/test_masks.py --write writes docs/masks.md")
    DOCUMENT.write_text(document(), encoding="utf-8")
