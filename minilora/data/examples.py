"""Rows to token ids and labels: the loss is on what the assistant says, and nowhere else.

    text        <|im_start|>  user  \\n  Hi  <|im_end|>  \\n  <|im_start|>  assistant  \\n  Hello  !     <|im_end|>  \\n
    labels      -100          -100  ...                                              -100  Hello  !     <|im_end|>  -100

A conversation is rendered and tokenized as a whole, as it is when a model is used; which tokens belong to an answer
follows from the characters they cover. So the mask goes by position: it is right where padding and EOS are the same
token, and where an answer quotes a special token.
"""

import os
import sys
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

from minilora.data.answers import render_with_answers
from minilora.data.rows import Row, Skipped, as_rows, each
from minilora.errors import InputError
from minilora.foreign_text import shown
from minilora.progress import with_progress
from minilora.text import Span, Tokenizer, require_own_tokenizer

IGNORE = -100  # the label that PyTorch's cross_entropy skips
CHUNK = 256  # rows tokenized at a time
DIM, GREEN, RESET = "\x1b[2m", "\x1b[32m", "\x1b[0m"


@dataclass(frozen=True)
class Example:
    """One training sequence: a token's label is its own id where it is learned, -100 where it is only read.

    Raises InputError where there is not one label for each token.
    """

    input_ids: list[int]
    labels: list[int]
    source: str = ""

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.input_ids):
            name, n = self.source or "an example", len(self.input_ids)
            raise InputError(f"{name} has {len(self.labels)} labels for {n} tokens: give one for each")


@dataclass(frozen=True)
class Encoded:
    """What became of some rows: every one is in `examples` or in `skipped`, in its order.

    `remarks` count the rows of which something is to be known, such as a key that is not used.
    """

    examples: list[Example] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    remarks: Counter[str] = field(default_factory=Counter)


def encode_rows(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    max_length: int | None = None,
    *,
    mask_history: bool = False,
    skip_bad_rows: bool = False,
) -> Encoded:
    """Render, tokenize and label rows; those of more than `max_length` tokens are skipped, and say so.

    Every answer is learned, or with `mask_history` the last of a conversation, with the token that ends it; a sequence
    that the chat template leaves without such a token gets EOS. A plain text is learned whole, and a pair's completion
    where there is no chat template, EOS included and after BOS where the tokenizer wants one. A sequence's first token
    is never learned: nothing is there to predict it from.

    Raises InputError for another library's tokenizer, and where there is no chat template, or it refuses rows, leaves
    out a part of them or does not show where their answers are: how many, and for the first few where they come from
    and what is wrong; with `skip_bad_rows` these are skipped too, unless none is left.
    """
    require_own_tokenizer(tokenizer)
    eos_ids = tokenizer.eos_token_ids
    turn_ends = tuple(tokenizer.decode([id], skip_special_tokens=False) for id in eos_ids)
    encoded = Encoded()
    rendered = each(
        with_progress(rows, len(rows), "Rendering", "rows"),
        lambda row: row.source,
        lambda row: (row, _render(row, tokenizer, turn_ends, mask_history)),
        encoded.skipped if skip_bad_rows else None,
    )
    encoded_texts = (
        encoding
        for start in range(0, len(rendered), CHUNK)
        for encoding in tokenizer.encode_batch([one.text for _, one in rendered[start : start + CHUNK]])
    )
    encodings = with_progress(encoded_texts, len(rendered), "Tokenizing", "rows")
    for (row, one), (ids, offsets) in zip(rendered, encodings, strict=True):
        encoded.remarks.update(one.remarks)
        encoded.remarks.update(f"the key {key!r} is not used" for key in row.unused)
        labels, last = _labels(one, ids, offsets, eos_ids)
        learned_to = offsets[last][1] if last >= 0 else 0
        # Behind the answer's words stands the token that ends the turn, and perhaps a line's end that is marked too.
        ended = one.text[one.words_end : learned_to].rstrip().endswith(turn_ends)
        if not ended and not one.text[learned_to:].strip():
            eos = [tokenizer.eos_token_id]
            ids, labels = ids[: last + 1] + eos, labels[: last + 1] + eos
        bos = tokenizer.bos_token_id
        if one.bos and bos is not None and ids[:1] != [bos]:
            ids, labels = [bos, *ids], [bos, *labels]
        if max_length is not None and len(ids) > max_length:
            encoded.skipped.append(Skipped(row.source, f"{len(ids)} tokens, max_length is {max_length}"))
        else:
            encoded.examples.append(Example(ids, [IGNORE, *labels[1:]], row.source))
    return encoded


class _Rendered(NamedTuple):
    text: str
    answers: list[Span]  # the characters to learn
    remarks: list[str]
    words_end: int  # behind it the template ends the last answer
    bos: bool  # whether BOS is still to be put first


def _render(row: Row, tokenizer: Tokenizer, turn_ends: Sequence[str], mask_history: bool) -> _Rendered:
    if row.text is not None:
        return _Rendered(row.text, [(0, len(row.text))], [], 0, bos=tokenizer.add_bos_token)
    if row.messages and row.pair and tokenizer.chat_template is None:
        if len(row.messages) > 2 or row.tools:
            raise InputError("a system message and tools beside prompt and completion need a chat template")
        prompt, completion = (message["content"] for message in row.messages)
        answer = len(prompt), len(prompt + completion)
        return _Rendered(prompt + completion, [answer], [], 0, bos=tokenizer.add_bos_token)
    rendered = render_with_answers(row, tokenizer, turn_ends, mask_history)
    if not rendered.spans:
        raise InputError("it has no answer to learn")
    return _Rendered(rendered.text, rendered.spans, rendered.remarks, rendered.words_end, bos=False)


def _labels(row: _Rendered, ids: list[int], offsets: list[Span], eos_ids: list[int]) -> tuple[list[int], int]:
    """The labels of a rendered row, from the characters that each token covers; and the last labelled token, or -1."""
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    labels = [IGNORE] * len(ids)
    stop = 0
    for start, end in row.answers:
        first, stop = bisect_right(ends, start), bisect_left(starts, end)  # the tokens that overlap the answer
        if stop < len(ids) and starts[stop] == end and ids[stop] in eos_ids:
            stop += 1  # some templates leave the token that ends the turn outside {% generation %}
        labels[first:stop] = ids[first:stop]
    return labels, stop - 1


def show_example(example: Example | Row | dict[str, Any], tokenizer: Tokenizer, color: bool | None = None) -> str:
    """A row as text with its special tokens: what is learned in green, what is only read dim.

    Args:
        example: a `Row`, a dict of one of the formats of `load_rows`, or an `Example` made of one.
        tokenizer: the model's, as `load` gives it.
        color: False puts what is learned in ⟦ ⟧; None, if standard output is a terminal and NO_COLOR is not set.

    Returns:
        The text, with escape sequences if there is colour.

    Raises:
        InputError: the row cannot be used, as `train` would find it.
    """
    if not isinstance(example, Example):
        rows = [example] if isinstance(example, Row) else as_rows([example])
        [example] = encode_rows(rows, tokenizer).examples
    if color is None:
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    pieces = []
    before_it, count = "", 0
    for learned, group in groupby(label != IGNORE for label in example.labels):
        count += len(list(group))
        # Some tokenizers spell a token differently at the start of a text: so decode from the start, and cut.
        text = tokenizer.decode(example.input_ids[:count], skip_special_tokens=False)
        piece, before_it = shown(text[len(before_it) :]), text
        before, after = (GREEN if learned else DIM, RESET) if color else ("⟦", "⟧") if learned else ("", "")
        pieces.append(before + piece + after)
    return "".join(pieces)
