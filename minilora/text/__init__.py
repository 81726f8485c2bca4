"""Text to token ids and back: the tokenizer, its files, and the chat template.

Read tokenizer.py first. tokenizer_files.py reads and writes a Hugging Face folder (the reader of a GGUF file is in
formats/gguf/); chat_template.py renders a conversation, by a Jinja template in sandbox.py.
"""

from minilora.text import chat_template
from minilora.text.chat_template import Message, Span, joined_parts
from minilora.text.tokenizer import Tokenizer, require_own_tokenizer
from minilora.text.tokenizer_files import read_tokenizer, save_tokenizer

__all__ = [
    "Message",
    "Span",
    "Tokenizer",
    "chat_template",
    "joined_parts",
    "read_tokenizer",
    "require_own_tokenizer",
    "save_tokenizer",
]
