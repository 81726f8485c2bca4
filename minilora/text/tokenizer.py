"""Text to token ids and back, and conversations to text: a `tokenizers` backend with its chat template.

It is built by who reads a file: of a Hugging Face folder text/tokenizer_files.py, of GGUF formats/gguf/tokenizer.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minilora.errors import InputError
from minilora.text import chat_template
from minilora.text.chat_template import Message, Span

if TYPE_CHECKING:
    import tokenizers  # imported where it is used: `import minilora` alone does not need it


def require_own_tokenizer(tokenizer: object) -> None:
    """Raises InputError for another library's tokenizer, saying what to do."""
    if not isinstance(tokenizer, Tokenizer):
        raise InputError(
            f"a {type(tokenizer).__name__} is not minilora's tokenizer: take that of ml.load, or with a model of"
            " transformers minilora.text.read_tokenizer(its folder)"
        )


def require_template_name(name: object) -> None:
    """Raises InputError for a chat template's name that is no file name: saving writes a file of that name."""
    if not (isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name)):
        raise InputError(f"a chat template may not be named {name!r}: letters, digits and . _ - make its file's name")


class Tokenizer:
    """A tokenizer and its chat templates.

    Args:
        backend: the `tokenizers.Tokenizer`. Its post-processor, which adds special tokens, is kept for `to_json` only.
        named_tokens: `eos_token` and perhaps `bos_token`, `unk_token`, `pad_token`, ... to their text.
        chat_templates: name to Jinja2 source; "default" is the usual one, "tool_use" the one for tools.
        eos_token_ids: further ids that end an answer, such as those of generation_config.json.
        add_bos_token: whether a plain text begins with BOS (a chat template writes its own); by default, whether
            the post-processor puts it there.
        config: what tokenizer_config.json says besides, kept for saving.

    Raises:
        InputError: no EOS token is named, a named token is not in the vocabulary, or a chat template's name is no
            file name.
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

        self.backend = backend
        self.named_tokens = dict(named_tokens)
        self.chat_templates = dict(chat_templates or {})
        for name in self.chat_templates:
            require_template_name(name)
        self.config = dict(config or {})
        if "eos_token" not in self.named_tokens:
            raise InputError("the tokenizer names no eos_token; name one in tokenizer_config.json")
        for token in self.named_tokens.values():
            self._id(token)
        if add_bos_token is None:
            add_bos_token = self.bos_token_id in backend.encode("").ids[:1]
        self.add_bos_token = add_bos_token and self.bos_token_id is not None
        self._listed_eos_token_ids = [id for id in eos_token_ids if backend.id_to_token(id) is not None]
        # A byte-level post-processor cuts the spaces off the offsets of tokens such as " the"; the label mask needs
        # to know every character that a token covers.
        self._post_processor = backend.post_processor
        backend.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])

    def to_json(self) -> str:
        """The backend with its own post-processor, as the text of a tokenizer.json."""
        ours = self.backend.post_processor
        self.backend.post_processor = self._post_processor
        try:
            return self.backend.to_str(pretty=True)
        finally:
            self.backend.post_processor = ours

    # Text and tokens

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text; special tokens written out in the text are recognised.

        With `add_special_tokens`, BOS comes first if this tokenizer begins a plain text so and the text does not.
        """
        ids = self.backend.encode(text, add_special_tokens=False).ids
        bos = self.bos_token_id
        if bos is None or not (add_special_tokens and self.add_bos_token) or ids[:1] == [bos]:
            return ids
        return [bos, *ids]

    def encode_batch(self, texts: Sequence[str]) -> list[tuple[list[int], list[Span]]]:
        """For each text, encoded on all cores, the token ids, and the (start, end) characters that each token covers.

        The tokens that together spell one character all carry that character's span.
        """
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of some token ids."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def __len__(self) -> int:
        """The number of tokens, added ones included."""
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
        """The padding token; EOS where none is named (labels are masked by position, never by token id)."""
        return self.named_tokens.get("pad_token", self.eos_token)

    @property
    def eos_token_id(self) -> int:
        return self._id(self.eos_token)

    @property
    def bos_token_id(self) -> int | None:
        return None if self.bos_token is None else self._id(self.bos_token)

    @property
    def pad_token_id(self) -> int:
        return self._id(self.pad_token)

    def _id(self, token: str) -> int:
        id = self.backend.token_to_id(token)
        if id is None:
            raise InputError(f"the token {token!r} is not in the tokenizer's vocabulary")
        return id

    @property
    def eos_token_ids(self) -> list[int]:
        """Every id that ends an answer: EOS, those of generation_config.json, and the chat template's turn end."""
        return list(dict.fromkeys([self.eos_token_id, *self._listed_eos_token_ids, *self._turn_end_ids()]))

    def _turn_end_ids(self) -> list[int]:
        """The added token that the chat template writes directly after an answer, if it writes one."""
        answer = "minilora"
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        try:
            text = self.apply_chat_template(messages)
        except InputError:  # no template, or one that wants something other than these two messages
            return []
        _, found, after = text.rpartition(answer)
        first = self.encode(after.lstrip())[:1]
        added = self.backend.get_added_tokens_decoder()  # found in a text before the vocabulary applies
        return first if found and added.keys() >= set(first) else []

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
        """A conversation as the one string that the model reads.

        Args:
            messages: dicts with `role`, `content` and whatever else the template reads.
            add_generation_prompt: end with the header of an answer, for the model to go on from.
            tools: JSON schemas of functions that the model may call.
            variables: anything else the template reads, such as `enable_thinking`.

        Raises:
            InputError: there is no template, or it refuses the conversation.
        """
        return self.render_chat(messages, add_generation_prompt, tools=tools, **variables)[0]

    def render_chat(
        self,
        messages: list[Message],
        add_generation_prompt: bool = False,
        *,
        tools: list[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> tuple[str, list[Span]]:
        """`apply_chat_template`, and the character spans that the template marks with `{% generation %}`."""
        name = "tool_use" if tools is not None and "tool_use" in self.chat_templates else "default"
        if name not in self.chat_templates:
            raise InputError(
                "this tokenizer has no chat template; put a chat_template.jinja beside its tokenizer.json,"
                " or set tokenizer.chat_template"
            )
        return chat_template.render(
            self.chat_templates[name],
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **{**self.named_tokens, **variables},
        )

    def __repr__(self) -> str:
        return f"Tokenizer({len(self)} tokens, {json.dumps(self.named_tokens, ensure_ascii=False)})"
