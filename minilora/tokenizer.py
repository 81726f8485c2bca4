"""Text to token ids and back, and conversations to text: a `tokenizers` backend with its chat template.

It is read from a Hugging Face folder or from a GGUF file, and written as a Hugging Face folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora.chat_template import ChatTemplate, Message, Span
from minilora.errors import InputError

if TYPE_CHECKING:
    import tokenizers

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """A tokenizer and its chat template.

    Args:
        backend: the `tokenizers.Tokenizer`; its post-processor (which adds special tokens) is kept for `save` only.
        named_tokens: some of `bos_token`, `eos_token`, `unk_token`, `pad_token`, ... to their text.
        chat_templates: template name to Jinja2 source; "default" is the usual one, "tool_use" the one with tools.
        eos_token_ids: further ids that end an answer, such as those of generation_config.json.
        add_bos_token: whether a plain text starts with BOS. (A chat template writes its own.)
        config: what tokenizer_config.json says besides, kept for `save`.

    Raises:
        InputError: there is no EOS token, or a named token is not in the vocabulary.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        named_tokens: Mapping[str, str],
        chat_templates: Mapping[str, str] | None = None,
        *,
        eos_token_ids: Sequence[int] = (),
        add_bos_token: bool | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        from tokenizers.processors import TemplateProcessing

        self.named_tokens = dict(named_tokens)
        self.chat_templates = dict(chat_templates or {})
        self.config = dict(config or {})
        self.backend = backend
        if "eos_token" not in self.named_tokens:
            raise InputError("the tokenizer names no eos_token: name one in tokenizer_config.json")
        for name, token in self.named_tokens.items():
            if backend.token_to_id(token) is None:
                raise InputError(f"{name} {token!r} is not in the tokenizer's vocabulary")
        if add_bos_token is None:
            add_bos_token = self.bos_token_id is not None and self.bos_token_id in backend.encode("").ids[:1]
        self.add_bos_token = add_bos_token
        # With its own post-processor a byte-level backend trims the spaces off the offsets of tokens such as
        # " the"; the label mask needs the characters a token really covers.
        self._post_processor = backend.post_processor
        backend.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
        self._more_eos_token_ids = list(eos_token_ids)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read tokenizer.json and its companions from a Hugging Face folder.

        Raises:
            InputError: tokenizer.json is missing or broken, or a companion is not valid JSON.
        """
        from minilora.tokenizer_files import read_folder

        return read_folder(Path(folder))

    @classmethod
    def from_gguf(cls, source: str | Path | Mapping[str, Any]) -> Tokenizer:
        """Build the tokenizer that a GGUF file describes, from its path or its metadata.

        Raises:
            InputError: not a GGUF file, or a kind of vocabulary or pre-tokenizer that is not known here.
        """
        from minilora.gguf_tokenizer import read_gguf

        return read_gguf(source)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja."""
        from minilora.tokenizer_files import write_folder

        write_folder(self, Path(folder))

    def to_json(self) -> str:
        """The backend, post-processor included, as the text of a tokenizer.json."""
        plain = self.backend.post_processor
        self.backend.post_processor = self._post_processor
        try:
            return self.backend.to_str(pretty=True)
        finally:
            self.backend.post_processor = plain

    # Text and tokens

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Special tokens written in the text are recognised; none are added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        """Token ids and, for each, the (start, end) characters of `text` that it comes from.

        The tokens of a character that takes several all carry that character's span.
        """
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_batch(self, texts: Sequence[str]) -> list[tuple[list[int], list[Span]]]:
        """`encode_with_offsets` of many texts, on all cores."""
        return [(e.ids, e.offsets) for e in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of some token ids."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token given by its text, None where there is none."""
        return self.backend.token_to_id(token)

    def __len__(self) -> int:
        """How many tokens there are, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    # Named tokens

    @property
    def eos_token(self) -> str:
        return self.named_tokens["eos_token"]

    @property
    def bos_token(self) -> str | None:
        return self.named_tokens.get("bos_token")

    @property
    def pad_token(self) -> str:
        """The padding token; EOS where the tokenizer names none (labels are masked by position, not by id)."""
        return self.named_tokens.get("pad_token", self.eos_token)

    @property
    def eos_token_id(self) -> int:
        return self.backend.token_to_id(self.eos_token)

    @property
    def bos_token_id(self) -> int | None:
        return None if self.bos_token is None else self.backend.token_to_id(self.bos_token)

    @property
    def pad_token_id(self) -> int:
        return self.backend.token_to_id(self.pad_token)

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """The ids that `decode` skips."""
        return frozenset(id for id, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @property
    def eos_token_ids(self) -> list[int]:
        """Every id that ends an answer: EOS, those of generation_config.json, and the chat template's turn end."""
        ids = [self.eos_token_id, *self._more_eos_token_ids, *self._turn_end_token_ids()]
        return list(dict.fromkeys(ids))

    def _turn_end_token_ids(self) -> list[int]:
        """The special token that the chat template writes directly after an answer, if it writes one."""
        answer = "minilora"
        try:
            text = self.apply_chat_template(
                [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
            )
        except InputError:  # no template, or one that wants more than these two messages
            return []
        _, found, after = text.rpartition(answer)
        ids = self.encode(after)
        return ids[:1] if found and ids and ids[0] in self.special_token_ids else []

    # Conversations

    @property
    def chat_template(self) -> str | None:
        """The source of the default chat template; assign to it to set one."""
        return self.chat_templates.get("default")

    @chat_template.setter
    def chat_template(self, source: str) -> None:
        self.chat_templates["default"] = source

    def apply_chat_template(
        self,
        messages: list[Message],
        add_generation_prompt: bool = False,
        *,
        tools: list[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """A conversation as the one string that the model was trained to read.

        Args:
            messages: dicts with `role`, `content` and whatever else the template reads.
            add_generation_prompt: end with the header of an answer, for the model to go on from.
            tools: JSON schemas of functions that the model may call.
            variables: anything else the template reads, such as `enable_thinking`.

        Raises:
            InputError: there is no template, or it refuses the conversation.
        """
        return self.render_chat(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
        )[0]

    def render_chat(
        self, messages: list[Message], *, tools: list[dict[str, Any]] | None = None, **options: Any
    ) -> tuple[str, list[Span]]:
        """`apply_chat_template`, and the character spans that the template marks with `{% generation %}`."""
        name = "tool_use" if tools is not None and "tool_use" in self.chat_templates else "default"
        if name not in self.chat_templates:
            raise InputError(
                "this tokenizer has no chat template: put a chat_template.jinja beside tokenizer.json,"
                " or set tokenizer.chat_template"
            )
        return self._compiled(name).render(messages, tools=tools, **{**self.named_tokens, **options})

    def _compiled(self, name: str) -> ChatTemplate:
        source = self.chat_templates[name]
        if source not in self._templates:
            self._templates[source] = ChatTemplate(source)
        return self._templates[source]

    @cached_property
    def _templates(self) -> dict[str, ChatTemplate]:
        return {}

    def __repr__(self) -> str:
        return f"Tokenizer({len(self)} tokens, {json.dumps(self.named_tokens, ensure_ascii=False)})"
