"""Fine-tuning files in the three forms that OpenAI documents (chat, tools, weights) train as documented.

The reference is what TRL does with them: transformers' assistant mask on TRL's training template of Qwen2.5, whose text
is that of the original template. transformers wants a call's arguments as an object, so the test gives it that.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.chat import in_transformers, tiny

from minilora.data import IGNORE, encode_rows, load_rows

trl = pytest.importorskip("trl")
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
ORIGINAL, TRAINING = ((TEMPLATES / f"qwen2_5{kind}.jinja").read_text() for kind in ("", "_training"))

CHAT = {
    "messages": [
        {"role": "system", "content": "Marv is a factual chatbot that is also sarcastic."},
        {"role": "user", "content": "Who wrote 'Romeo and Juliet'?"},
        {"role": "assistant", "content": "Oh, just some guy named William Shakespeare. Ever heard of him?"},
    ]
}
WEIGHTS = {
    "messages": [
        {"role": "system", "content": "Marv is a factual chatbot that is also sarcastic."},
        {"role": "user", "content": "What's the capital of France?"},
        {"role": "assistant", "content": "Paris", "weight": 0},
        {"role": "user", "content": "Can you be more sarcastic?"},
        {"role": "assistant", "content": "Paris, as if everyone doesn't know that already.", "weight": 1},
    ]
}
CALL = {
    "id": "call_id",
    "type": "function",
    "function": {"name": "get_current_weather", "arguments": '{"location": "San Francisco, USA", "format": "celsius"}'},
}
TOOLS: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "What is the weather in San Francisco?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
        {"role": "tool", "tool_call_id": "call_id", "content": "21.0"},
        {"role": "assistant", "content": "It is 21 degrees celsius in San Francisco, CA"},
    ],
    "parallel_tool_calls": False,
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "get_current_weather",
                "description": "Get the current weather",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "location": {"type": "string", "description": "The city and country, eg. San Francisco, USA"},
                        "format": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                    },
                    "required": ["location", "format"],
                },
            },
        }
    ],
}


def learned_by_trl(row: dict[str, Any], learned: list[bool]) -> tuple[list[int], list[bool]]:
    """Token ids and mask of TRL's template; `learned` says which answers' runs of the mask count."""
    messages = [dict(message) for message in row["messages"]]
    for message in messages:
        message.pop("weight", None)
        if message.get("tool_calls"):
            function = message["tool_calls"][0]["function"]
            arguments = json.loads(function["arguments"])
            message["tool_calls"] = [{**message["tool_calls"][0], "function": {**function, "arguments": arguments}}]
    encoded = in_transformers(tiny(TRAINING, eos_token="<|im_end|>")).apply_chat_template(
        messages, tools=row.get("tools"), return_assistant_tokens_mask=True, return_dict=True
    )
    bits, run = [], -1
    for i, bit in enumerate(encoded["assistant_masks"]):
        run += bit and not (i and encoded["assistant_masks"][i - 1])
        bits.append(bool(bit) and learned[run])
    return encoded["input_ids"], bits


@pytest.mark.parametrize(
    ("row", "learned"),
    [(CHAT, [True]), (WEIGHTS, [False, True]), (TOOLS, [True, True])],
    ids=["chat", "weights", "tools"],
)
def test_trains_as_documented(row: dict[str, Any], learned: list[bool], tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps(row) + "\n")
    tokenizer = tiny(ORIGINAL, eos_token="<|im_end|>")
    [example] = encode_rows(load_rows(file), tokenizer).examples
    ids, expected = learned_by_trl(row, learned)
    assert example.input_ids == ids
    mask = [label != IGNORE for label in example.labels]
    # TRL's template marks the line's end around an answer too, which the original writes for everyone
    newline = tokenizer.encode("\n")
    differ = [i for i, (ours, theirs) in enumerate(zip(mask, expected, strict=True)) if ours != theirs]
    assert all([ids[i]] == newline and not mask[i] for i in differ)
    assert any(mask)
