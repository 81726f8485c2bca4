"""Where, in a rendered conversation, the assistant's answers are: the characters that the loss is about.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>\\n
                                                          ^^^^^^^^^^^^^^^^
An answer is what the template marks with `{% generation %}`. Without marks it begins where generation would begin,
and ends with the token that ends a turn. Where that is not certain we refuse: a wrong label mask is silent. We refuse
too where the template leaves out a part of the row, since the model would learn from another row than was given.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from minilora.data.pieces import MARK, NONCE, UNCERTAIN, Place, marked, places
from minilora.data.rows import Row
from minilora.errors import InputError
from minilora.text import Message, Span, Tokenizer

LEFT_OUT = "the chat template leaves out {}; write it into the content of a message, or use another template"
EARLIER_THOUGHTS = (
    "the chat template leaves out the thoughts of earlier answers, as it does when the model is used, so that these"
    " answers are learned without them (mask_history learns the last answer only)"
)
# What a template is made of: tags such as <|im_end|> and [/INST], words, single characters.
UNIT = re.compile(r"<[^<>\s]{1,60}>|\[[A-Z_/]+\]|\w+|.", re.DOTALL)


class Answers(NamedTuple):
    """A rendered conversation: `spans` are the characters to learn, in order; `remarks` what one should know of it.

    `words_end` is where the last answer's own words end in the text: what follows in its span is the template's.
    """

    text: str
    spans: list[Span]
    remarks: list[str]
    words_end: int = 0


def render_with_answers(
    row: Row, tokenizer: Tokenizer, turn_ends: Sequence[str], mask_history: bool = False
) -> Answers:
    """Render a conversation and find its answers.

    Not learned are answers among its first `row.context` messages, those with `weight` 0, and with `mask_history` all
    but the last; `turn_ends` are the texts of tokens that end a turn. A conversation is rendered a few times, however
    many turns it has.

    Raises InputError where the template refuses the conversation, leaves out a part of it, or writes it so that the
    answers cannot be told apart.
    """
    return _Rendering(row, tokenizer, turn_ends).answers(mask_history)


class _Rendering:
    def __init__(self, row: Row, tokenizer: Tokenizer, turn_ends: Sequence[str]) -> None:
        self.row, self.tokenizer, self.turn_ends = row, tokenizer, turn_ends
        self.messages = row.messages or []
        self.text, self.generation = tokenizer.render_chat(self.messages, tools=row.tools, **row.chat_template_kwargs)
        self.marked, self.pieces = marked(self.messages)
        self.places = places(self.text, self.render(self.marked), self.pieces)
        self.first: dict[int, int] = {}  # each piece's first place
        for index, place in enumerate(self.places):
            self.first.setdefault(place.piece, index)
        self.remarks: dict[str, None] = {}  # in order, each once
        self.tails: dict[tuple[str, str], str] = {}

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        variables = self.row.chat_template_kwargs
        return self.tokenizer.render_chat(messages, add_generation_prompt, tools=self.row.tools, **variables)[0]

    def answers(self, mask_history: bool) -> Answers:
        own = self.own_places()
        learned = [
            i
            for i, message in enumerate(self.messages)
            if message["role"] == "assistant" and i >= self.row.context and "weight" not in message
        ]
        if mask_history:
            learned = learned[-1:]
        self.refuse_what_is_left_out(learned)
        by_template = self.in_generation()
        if by_template.keys() >= set(learned):  # a template that marks some answers only is not relied on
            spans = sorted(span for i in learned for span in by_template[i])
        else:
            self.refuse_what_is_moved(learned, own)
            spans = [(self.begin(i, own[i]), self.end(i, own[i])) for i in learned]
        words_end = max((self.places[own[i][1]].end for i in learned), default=0)
        return Answers(self.text, spans, list(self.remarks), words_end)

    def own_places(self) -> dict[int, tuple[int, int]]:
        """For each answer the first and the last of its places: numbers in `self.places`."""
        own: dict[int, tuple[int, int]] = {}
        for piece, index in sorted(self.first.items(), key=lambda item: item[1]):
            message, part, _ = self.pieces[piece]
            if self.messages[message]["role"] == "assistant" and part in ("content", "thoughts", "call"):
                own[message] = (own[message][0] if message in own else index, index)
        return own

    # What of the row is not in the text

    def refuse_what_is_left_out(self, learned: list[int]) -> None:
        tools = self.row.tools
        if tools and self.text == self.tokenizer.render_chat(self.messages, **self.row.chat_template_kwargs)[0]:
            raise InputError(LEFT_OUT.format("the tools"))
        last_answer = max((i for i, m in enumerate(self.messages) if m["role"] == "assistant"), default=-1)
        shown = {(self.pieces[k].message, self.pieces[k].text) for k in self.first}
        for k, (i, part, text) in enumerate(self.pieces):
            if k in self.first or (i, text) in shown:  # the same thoughts may go by two names
                continue
            role = self.messages[i]["role"]
            if part == "thoughts" and role == "assistant":
                if i == last_answer and i in learned:
                    raise InputError(LEFT_OUT.format(f"the thoughts of message {i + 1}, the last answer"))
                self.remarks[EARLIER_THOUGHTS] = None
            elif part in ("content", "call") and (role != "assistant" or i in learned):
                what = "" if i not in {self.pieces[k].message for k in self.first} else "a part of "
                whose = "an answer" if role == "assistant" else f"the {role}'s"
                what = "a tool call of " if part == "call" else what
                raise InputError(LEFT_OUT.format(f"{what}message {i + 1}, {whose}"))
            else:
                name = f"an earlier answer's {part}" if role == "assistant" and part == "content" else f"{part!r}"
                self.remarks[f"the chat template does not read {name} of a message"] = None

    def refuse_what_is_moved(self, learned: list[int], own: dict[int, tuple[int, int]]) -> None:
        """What comes before an answer must stand before it, and what comes after it, after it."""
        order = [
            (index, self.pieces[k].message)
            for k, index in sorted(self.first.items(), key=lambda item: item[1])
            if self.pieces[k].part in ("content", "thoughts", "call")
        ]
        highest = -1
        before: dict[int, int] = {}  # the highest message before each place
        for index, message in order:
            before[index] = highest
            highest = max(highest, message)
        lowest = len(self.messages)
        after: dict[int, int] = {}
        for index, message in reversed(order):
            after[index] = lowest
            lowest = min(lowest, message)
        for i in learned:
            if i not in own:
                raise InputError(LEFT_OUT.format(f"message {i + 1}, an answer"))
            first, last = own[i]
            if before[first] >= i or after[last] <= i:
                raise InputError(UNCERTAIN)
            if any(self.pieces[p.piece].message != i for p in self.places[first:last] if self.is_first(p)):
                raise InputError(UNCERTAIN)

    def is_first(self, place: Place) -> bool:
        return self.places[self.first[place.piece]] == place

    # Where an answer begins and ends

    def in_generation(self) -> dict[int, list[Span]]:
        """What the template marks with `{% generation %}`, by the answer that it is of.

        A span without words, such as the token that ends a turn, is of the answer before it, or else of the one after.
        """
        starts = [place.start for place in self.places]
        spans: dict[int, list[Span]] = {}
        for start, end in self.generation:
            inside = range(bisect_left(starts, start), bisect_left(starts, end))
            around = (bisect_left(starts, start) - 1, bisect_left(starts, end))
            of = [self.pieces[self.places[at].piece].message for at in (*inside, *around) if 0 <= at < len(starts)]
            answer = next((i for i in of if self.messages[i]["role"] == "assistant"), None)
            if answer is not None:
                spans.setdefault(answer, []).append((start, end))
        return spans

    def begin(self, i: int, own: tuple[int, int]) -> int:
        """Where generation would begin: where the text parts from the prompt for answer i."""
        start = self.places[own[0]].start
        previous = next((p for p in reversed(self.places[: own[0]]) if self.pieces[p.piece].message != i), None)
        header_start = 0 if previous is None else previous.end
        header = self.text[header_start:start]
        if i == 0:
            return self.begin_of_conversation(header)
        key = (self.messages[i - 1]["role"], header)
        if key not in self.tails:
            self.tails[key] = self.prompt_after(i, previous)
        prompt = self.tails[key]
        same = _common(prompt, header)
        if same < min(len(prompt), len(header)) and not header[:same].strip():
            raise InputError(UNCERTAIN)
        if prompt[same:].strip():
            self.remarks[
                f"the chat template ends the prompt with {prompt[same:]!r} when the model is used, and not in the text"
                " that is learned"
            ] = None
        return header_start + same

    def begin_of_conversation(self, header: str) -> int:
        """The same for an answer that begins the conversation, which has no prompt: behind an answer's header in it."""
        question: list[Message] = [{"role": "user", "content": "?"}]
        asked = self.render(question)
        prompt = self.render(question, add_generation_prompt=True)
        units = [unit.end() for unit in UNIT.finditer(prompt[len(asked) :])] if prompt.startswith(asked) else []
        for length in reversed(units):
            answer_header = prompt[len(asked) :][:length]
            if answer_header.strip() and (at := header.rfind(answer_header)) >= 0:
                return at + length
        return len(header)

    def prompt_after(self, i: int, previous: Place | None) -> str:
        """What the prompt for answer i ends with, after the last piece of text in it."""
        prompt = self.render(self.marked[:i], add_generation_prompt=True)
        mark = next(iter(reversed(list(MARK.finditer(prompt)))), None)
        if (mark and int(mark.group(1))) != (previous and previous.piece):
            raise InputError(UNCERTAIN)
        return prompt[mark.end() :] if mark else prompt

    def end(self, i: int, own: tuple[int, int]) -> int:
        """Behind the token that ends the turn; without one, behind what the template writes after the answer."""
        start = self.places[own[1]].end
        following = self.places[own[1] + 1].start if own[1] + 1 < len(self.places) else len(self.text)
        rest = self.text[start:following]
        if turn_end := next((each for each in self.turn_ends if rest.startswith(each)), None):
            return start + len(turn_end)
        key = ("assistant's end", rest)
        if key not in self.tails:
            self.tails[key] = rest if i == len(self.messages) - 1 else self.after_answer(i, self.places[own[1]])
        ending = self.tails[key]
        ends = [at + len(each) for each in self.turn_ends if (at := rest.find(each)) >= 0]
        if ends and ending.startswith(rest[: min(ends)]):
            return start + min(ends)
        return start + _common(ending, rest)

    def after_answer(self, i: int, last: Place) -> str:
        """What follows the last piece of answer i where the conversation ends with it."""
        _, mark, after = self.render(self.marked[: i + 1]).partition(f"{NONCE}{last.piece}z")
        if not mark:
            raise InputError(UNCERTAIN)
        return MARK.split(after)[0]


def _common(a: str, b: str) -> int:
    """How much of two texts is the same from the beginning, tags and words taken whole."""
    same = 0
    for unit in UNIT.finditer(a):
        if not b.startswith(unit.group(), same):
            break
        same = unit.end()
    return same
