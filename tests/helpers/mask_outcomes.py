"""What becomes of a conversation in a template: our labels beside TRL's mask, and beside who wrote what."""

import copy
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from functools import cache
from itertools import groupby, takewhile
from operator import eq
from typing import Any, NamedTuple

from helpers.mask_conversations import as_given, row_of, written
from helpers.mask_templates import Template

from minilora.data.examples import IGNORE, encode_rows
from minilora.data.rows import as_rows
from minilora.errors import InputError
from minilora.text import Tokenizer

# Where the two differ by design, said once in the document.
LINE_END = "TRL learns what follows the token that ends the turn as well (a line's end, EOS): it is never generated"
PROMPT = "TRL learns a part of the generation prompt as well, which the model is given"
CHARACTER = "an answer ends with a character of several tokens: transformers' mask has the first of them only"
FIRST = "a sequence's first token is not learned by minilora: nothing is there to predict it"
EOS = "the template writes no token that ends the last answer, so minilora adds EOS"
THOUGHTS = "TRL's text has a think block in every answer, the model's own template in some"
EARLIER = "the template leaves out the thoughts of earlier answers, as it does when the model is used"

# Other differences of which we know why: template, learned by minilora (+) or by TRL (-), what, why.
KNOWN = [
    (
        "*gemma*",
        ("+", "<|tool_response>"),
        "the model ends a call with `<|tool_response>`, which TRL does not learn",
    ),
    (
        "diffusion_gemma",
        ("+", "<|turn>model\n"),
        "after a tool's result the generation prompt has no header, and the text has one: generation has to write it",
    ),
    ("deepseek*", ("-", "<｜tool▁outputs▁end｜>"), PROMPT),
    ("glm4moe", ("text", "<|user|>"), "TRL's text has `<|user|>` after every answer, as the token that ends it"),
    (
        "gptoss",
        ("-", "<|end|>"),
        "the text has `<|end|>` after an earlier answer, which the model ends with `<|return|>`: TRL learns it",
    ),
]
used: set[tuple[str, tuple[str, str], str]] = set()


class Labelled(NamedTuple):
    ids: list[int]
    learned: list[bool]


@dataclass(frozen=True)
class Outcome:
    """One cell.

    Attributes:
        sign: "=" the same mask, "≈" the same where the texts are the same, "≠" another one, "refused", or "–": the
            template itself refuses the conversation.
        remarks: how the two differ by design, or why we refuse.
        wrong: what is wrong with it; empty in a cell that is right.
    """

    sign: str
    remarks: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()


@cache
def outcome(template: Template, conversation: str, marked: bool) -> Outcome:
    """Ours in the template as its model has it, or `marked`; TRL's in the marked one."""
    row = row_of(conversation, template.turn_end, template.in_parts)
    source = template.marked if marked else template.source
    tokenizer = template.tokenizer(source)
    text = rendered(template, source, row)
    try:
        encoded = encode_rows(as_rows([as_given(conversation, row)]), tokenizer)
    except InputError as error:
        return refusal(str(error), text, template, row)
    assert text is not None, "transformers refuses it"
    [example] = encoded.examples
    mine = Labelled(example.input_ids, [label != IGNORE for label in example.labels])
    learned, read = runs(mine, tokenizer)
    remarks, wrong = [], [*mislearned(learned, read, template, row)]
    if not marked and any(text.rstrip().endswith(template.ends) and text != text.rstrip() for text in learned):
        wrong.append("the line's end after the token that ends a turn is learned")
    for part in left_out(text, template, row):
        if part == EARLIER and any("thoughts of earlier answers" in said for said in encoded.remarks):
            remarks.append(part)
        else:
            wrong.append(f"left out silently: {part}")
    theirs = their_labels(template, row)
    unexplained = []
    for difference in differences(mine, theirs, tokenizer) if theirs else ():
        if said := explained(difference, template):
            remarks += said
        else:
            unexplained.append(difference)
    # Where the texts are not the same, one place says so; what else differs then means little.
    other_text = [difference for difference in unexplained if difference.kind == "text"][:1]
    wrong += [difference.says() for difference in other_text or unexplained]
    sign = "≠" if wrong else "=" if theirs and mine.ids == theirs.ids else "≈"
    return Outcome(sign, tuple(dict.fromkeys(remarks)), tuple(dict.fromkeys(wrong)))


def rendered(template: Template, source: str, row: dict[str, Any]) -> str | None:
    """The conversation as transformers renders it, in the first form that the template takes; None where in none."""
    for arguments_as in (dict, json.dumps):
        messages = copy.deepcopy(row["messages"])
        for message in messages:
            for call in message.get("tool_calls", []):
                call["function"]["arguments"] = arguments_as(call["function"]["arguments"])
        for no_content in (None, ""):
            for message in messages:
                message["content"] = message["content"] or no_content
            try:
                return template.theirs.apply_chat_template(
                    messages, tools=row.get("tools"), chat_template=source, tokenize=False
                )
            except Exception:  # a template is a program: any exception may come out of it
                continue
    return None


def their_labels(template: Template, row: dict[str, Any]) -> Labelled | None:
    """TRL's assistant mask; None where its template refuses the conversation."""
    try:
        encoded = template.theirs.apply_chat_template(
            copy.deepcopy(row["messages"]),
            tools=row.get("tools"),
            chat_template=template.marked,
            return_assistant_tokens_mask=True,
            return_dict=True,
        )
    except Exception:  # as above
        return None
    return Labelled(encoded["input_ids"], [bool(bit) for bit in encoded["assistant_masks"]])


def refusal(error: str, text: str | None, template: Template, row: dict[str, Any]) -> Outcome:
    """A refusal is right where the template refuses, or where the reason is one and is true."""
    if text is None:
        return Outcome("–")
    why = re.sub(r"^\d+ of \d+ rows cannot be used: row \d+: |; skip_bad_rows leaves them out$", "", error)
    reasons = {"leaves out": list(left_out(text, template, row)), "cannot be told apart": is_moved(text, template, row)}
    is_true = any(holds for words, holds in reasons.items() if words in why)
    return Outcome("refused", (why,), () if is_true else (f"refused: {why}",))


# Who wrote what: this needs no reference


def telling_words(template: Template, row: dict[str, Any]) -> Iterator[tuple[int, str, set[str]]]:
    """`written`, without the words that stand in the template, too, or in several places."""
    parts = list(written(row))
    count = Counter(word for _, _, words in parts for word in words)
    for i, part, words in parts:
        yield i, part, {word for word in words if count[word] == 1 and word not in template.source + template.marked}


def runs(mine: Labelled, tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """The texts that are learned, and those between them that are only read."""
    learned: list[str] = []
    read: list[str] = []
    for is_learned, group in groupby(zip(*mine, strict=True), key=lambda pair: pair[1]):
        text = tokenizer.decode([id for id, _ in group], skip_special_tokens=False)
        (learned if is_learned else read).append(text)
    return learned, read


def mislearned(learned: list[str], read: list[str], template: Template, row: dict[str, Any]) -> Iterator[str]:
    """Other people's words that are learned, and the assistant's that are not."""
    for i, part, words in telling_words(template, row):
        who = row["messages"][i]["role"] if i >= 0 else "system"
        if who == "assistant" and any(word in text for text in read for word in words):
            yield f"the assistant's {part} is not learned"
        if who != "assistant" and any(word in text for text in learned for word in words):
            yield f"the {who}'s {part} is learned"


def left_out(text: str, template: Template, row: dict[str, Any]) -> Iterator[str]:
    """The parts of the row whose words are not all in the text."""
    messages = row["messages"]
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    missing = {(i, part) for i, part, words in telling_words(template, row) if not all(word in text for word in words)}
    for i, part in sorted(missing):
        if part == "thoughts" and i < last and (last, part) not in missing:
            yield EARLIER
        else:
            yield f"the {messages[i]['role']}'s {part}" if i >= 0 else "the list of tools"


def is_moved(text: str, template: Template, row: dict[str, Any]) -> bool:
    """Whether a part of a message stands behind a later message."""
    parts = [(text.find(word), i) for i, _, words in telling_words(template, row) if i >= 0 for word in words]
    order = [i for place, i in sorted(parts) if place >= 0]
    return order != sorted(order)


# Token by token

BEFORE = 40  # tokens before a difference that are looked at: a generation prompt has fewer


class Difference(NamedTuple):
    kind: str  # "+" what only we learn, "-" what only TRL does, "text" what only one of the texts has
    what: str
    before: str  # what stands before it in our text
    instead: str = ""  # what TRL's text has in its place
    at_end: bool = False

    def says(self) -> str:
        if self.kind == "text":
            return f"the text has {quoted(self.what)} where TRL's has {quoted(self.instead)}"
        return f"{quoted(self.what)} is {'learned' if self.kind == '+' else 'not learned'}"


def quoted(text: str) -> str:
    """The text, without the middle of a long one: that may be a template's system message, with today's date."""
    return repr(text if len(text) <= 80 else f"{text[:20]} … {text[-40:]}") if text else "nothing"


def differences(mine: Labelled, theirs: Labelled, tokenizer: Tokenizer) -> Iterator[Difference]:
    """Where the labels of two texts differ; of two that are not the same, what is the same in them is compared."""

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    blocks = [("equal", 0, len(mine.ids), 0, len(theirs.ids))]
    if mine.ids != theirs.ids:
        blocks = SequenceMatcher(None, mine.ids, theirs.ids, autojunk=False).get_opcodes()
    for tag, i, j, m, n in blocks:
        if tag != "equal":
            before = decode(mine.ids[max(0, i - BEFORE) : i])
            yield Difference("text", decode(mine.ids[i:j]), before, decode(theirs.ids[m:n]), j == len(mine.ids))
            continue
        labels = zip(mine.learned[i:j], theirs.learned[m:n], strict=True)
        for (ours, trls), group in groupby(zip(labels, range(i, j), strict=True), key=lambda pair: pair[0]):
            places = [place for _, place in group]
            if ours != trls:
                before = decode(mine.ids[max(0, places[0] - BEFORE) : places[0]])
                yield Difference("+" if ours else "-", decode([mine.ids[place] for place in places]), before)


def explained(difference: Difference, template: Template) -> list[str]:
    """The remarks on a difference, where we know that it is meant; otherwise none."""
    kind, what, before, instead, at_end = difference
    if kind == "text":
        return explained_text(what, instead, at_end, template)
    if begins := known(kind, what, template):
        said, rest = begins
        after = explained(Difference(kind, rest, before + what.removesuffix(rest)), template) if rest else [said]
        return after and [said, *after]
    if kind == "+":
        return [CHARACTER] if set(what) == {"\ufffd"} else []
    if not before and not what.strip():
        return [FIRST]
    if what.strip() in ("", template.ends[0]) and before.endswith(template.ends):
        return [LINE_END]
    for prompt in generation_prompts(template):
        if any((before + what).endswith(prompt[:cut]) for cut in range(len(what), len(prompt) + 1)):
            return [PROMPT]
    return []


def explained_text(what: str, instead: str, at_end: bool, template: Template) -> list[str]:
    if at_end and what == template.ends[0] and (instead in ("", *template.ends) or known("-", instead, template)):
        return [EOS]
    if what == "" and "<think>" in instead:
        return [THOUGHTS]
    begins = known("text", instead, template) if what == "" and not at_end else None
    return [begins[0]] if begins else []


def known(kind: str, what: str, template: Template) -> tuple[str, str] | None:
    """The remark on a known difference with which this one begins, and the rest of it."""
    for entry in KNOWN:
        name, (entry_kind, text), said = entry
        if fnmatchcase(template.name, name) and kind == entry_kind and what.startswith(text):
            used.add(entry)
            return said, what.removeprefix(text)
    return None


@cache
def generation_prompts(template: Template) -> set[str]:
    """What generation begins with, after a question and after a tool's result, with thoughts switched on and off."""
    messages = row_of("call", "", template.in_parts)["messages"]
    found = set()
    for begun in (messages[:1], messages[:3]):
        for variables in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
            prompt = prompt_after(template, begun, variables)
            if prompt:
                found.add(prompt)
    return found


def prompt_after(template: Template, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str | None:
    """What the template adds for generation; None where it refuses the messages."""
    variables = {"chat_template": template.source, "tokenize": False} | variables
    try:
        with_prompt = template.theirs.apply_chat_template(messages, add_generation_prompt=True, **variables)
        without = template.theirs.apply_chat_template(messages, **variables)
    except Exception:
        return None
    return with_prompt[sum(takewhile(bool, map(eq, with_prompt, without))) :]
