"""Where, in a rendered conversation, the assistant's answers are: the characters that the loss is about.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>\\n
                                                          ^^^^^^^^^^^^^^^^
An answer is what the template marks with `{% generation %}`. Without marks it begins where generation would begin,
and ends with the token that ends a turn. Where that is not certain we refuse: a wrong label mask is silent.
"""

from collections.abc import Sequence
from itertools import pairwise

from minilora.data.rows import Row
from minilora.errors import InputError
from minilora.text import Message, Span, Tokenizer

MARKER = "\ue000answer\ue001"  # private-use characters: its ends can match nothing around them by chance

NOT_SHOWN = "the chat template leaves out {}; write it into the messages' content, or use another template"
UNCERTAIN = (
    "the chat template changes earlier messages as the conversation goes on, so that its answers cannot be told apart;"
    " split the conversation, or mark the answers in the template with {% generation %}"
)


def render_with_answers(row: Row, tokenizer: Tokenizer, turn_ends: Sequence[str]) -> tuple[str, list[Span]]:
    """Render a conversation; return the text and the character spans to be learned, in order.

    Not learned are answers among its first `row.context` messages; `turn_ends` are the texts of tokens that end a turn.
    Raises InputError where the template refuses the conversation, leaves out an answer or the tools, or changes
    messages so that the answers cannot be told apart.
    """
    messages = row.messages or []
    text, marked = tokenizer.render_chat(messages, tools=row.tools)
    if row.tools and text == tokenizer.render_chat(messages)[0]:
        raise InputError(NOT_SHOWN.format("the tools"))
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if len(marked) >= len(answers):  # `{% generation %}`; a template that marks some answers only is not relied on
        if row.context == 0:
            return text, marked
        before, _ = tokenizer.render_chat(messages[: row.context], tools=row.tools)
        if text.startswith(before):
            return text, [(start, end) for start, end in marked if start >= len(before)]
    spans = [_span(i, text, row, tokenizer, turn_ends) for i in answers if i >= row.context]
    for start, end in spans:
        if text[start:end].strip() in ("", *turn_ends):
            raise InputError(NOT_SHOWN.format("an answer"))
    if any(start < end for (_, end), (start, _) in pairwise(spans)):
        raise InputError(UNCERTAIN)
    return text, spans


def _span(i: int, text: str, row: Row, tokenizer: Tokenizer, turn_ends: Sequence[str]) -> Span:
    """The characters of answer i, from what the template makes of the messages before it and up to it."""
    messages = row.messages or []
    prompt, _ = tokenizer.render_chat(messages[:i], add_generation_prompt=True, tools=row.tools)
    through = text if i == len(messages) - 1 else tokenizer.render_chat(messages[: i + 1], tools=row.tools)[0]
    if text.startswith(prompt) and text.startswith(through) and len(prompt) < len(through):
        # but for the white space that a template writes after the token that ends a turn
        stripped = through.rstrip()
        return len(prompt), len(stripped if stripped.endswith(tuple(turn_ends)) else through)
    # The template writes an earlier answer, or a generation prompt, other than it stands in the whole: Qwen3 drops
    # the thoughts of earlier answers, for one.
    start, end = _replaceable(i, text, row, tokenizer)
    if text.startswith(prompt):
        start = min(start, len(prompt))
    turn_end = next((each for each in turn_ends if text.startswith(each, end)), "")
    return start, end + len(turn_end)


def _replaceable(i: int, text: str, row: Row, tokenizer: Tokenizer) -> Span:
    """The characters that change when answer i is replaced by something else, and no others."""
    messages = row.messages or []
    marker: Message = {"role": "assistant", "content": MARKER}
    other, _ = tokenizer.render_chat([*messages[:i], marker, *messages[i + 1 :]], tools=row.tools)
    start = _common_prefix(text, other)
    end = len(text) - _common_prefix(text[start:][::-1], other[start:][::-1])
    # Everyone else's words must be on their side of the answer, or the template moved something.
    for j, message in enumerate(messages):
        words, side = (message.get("content") or "").strip(), text[:start] if j < i else text[end:]
        if message["role"] in ("system", "user") and words not in side:
            raise InputError(UNCERTAIN)
    return start, end


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
