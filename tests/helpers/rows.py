"""Rows as hypothesis draws them, and what was read of them."""

from typing import Any

from helpers.chat import assistant, system, user
from hypothesis import strategies as st

from minilora.data.rows import Row

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
calls = st.fixed_dictionaries(
    {"city": texts}, optional={"days": st.integers(0, 9), "near": st.booleans(), "names": st.lists(texts, max_size=2)}
).map(lambda arguments: {"type": "function", "function": {"name": "weather", "arguments": arguments}})


def conversation(before: str, question: str, call: Any, answer: str) -> dict[str, Any]:
    called = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "42"}] if call else []
    return {"messages": [*([system(before)] if before else []), user(question), *called, assistant("." + answer)]}


conversations = st.builds(conversation, texts, texts, st.none() | calls, texts)
pairs = st.builds(lambda question, answer: {"prompt": question, "completion": "." + answer}, texts, texts)
rows_of_any_format = st.lists(
    st.one_of(conversations, pairs, texts.map(lambda text: {"text": "x" + text})), min_size=1, max_size=5
)


def said(rows: list[Row]) -> list[Any]:
    """All that is trained on, without where it comes from."""
    return [(row.messages, row.text, row.tools, row.context, row.pair) for row in rows]
