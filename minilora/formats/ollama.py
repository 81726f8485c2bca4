"""A Modelfile for Ollama: which GGUF file, where an answer ends, and the chat template in Ollama's own language.

Ollama does not run the Jinja template inside a GGUF file. `ollama create` compares it with a list of templates that it
knows (fewer than 100 edits away counts as one of them), and otherwise passes a prompt on as it is. So the
template is written out here in Go's language, found from what the Jinja template does:

    start, system or what stands in its place, then for each message what stands before and after its content, and
    the header of the answer

and only if this gives the same text, letter by letter, for conversations with and without a system message, of one
turn and of several. Anything else (tools, dates, thoughts) has no place in it.
"""

from dataclasses import dataclass, replace
from os.path import commonprefix
from pathlib import Path

from minilora.errors import InputError
from minilora.text import Message, Tokenizer

SYSTEM, FIRST, ANSWER, SECOND = "Sys-tem", "Que-stion", "Ans-wer", "Sec-ond"  # no template says such things itself
TURNS: list[Message] = [
    {"role": "user", "content": FIRST},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": SECOND},
]
SYSTEM_TURN: Message = {"role": "system", "content": SYSTEM}
SPACED: list[Message] = [{"role": "user", "content": " a template may cut these spaces off, Go's does not \n"}]
CONVERSATIONS = [TURNS[:1], TURNS, [SYSTEM_TURN, TURNS[0]], [SYSTEM_TURN, *TURNS], [*TURNS[:2], *TURNS], SPACED]


def write_modelfile(tokenizer: Tokenizer, model_file: Path) -> Path:
    """Write `<name>.Modelfile` beside `<name>.gguf`, for `ollama create NAME -f <name>.Modelfile`; its path.

    Raises InputError where it cannot be written.
    """
    path = model_file.with_suffix(".Modelfile")
    try:
        path.write_text(modelfile(tokenizer, model_file.name), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    return path


def modelfile(tokenizer: Tokenizer, model_name: str) -> str:
    """The Modelfile's text; without TEMPLATE, and saying so, where Go cannot say what the chat template does.

    Raises InputError for a file's name that holds control characters.
    """
    if not model_name.isprintable():
        raise InputError(f"{model_name!r} cannot stand in a Modelfile: give the file a name of letters")
    lines = [f"FROM ./{model_name}"]
    stops = [tokenizer.decode([id], skip_special_tokens=False) for id in tokenizer.eos_token_ids]
    for stop in stops:
        if _is_kept(stop) and '"""' not in stop:
            lines.append(f"PARAMETER stop {_quoted(stop)}")
        else:  # it would end its quotes and go on as a directive of its own, or arrive as another text
            lines.append(f"# A token that ends an answer cannot be written here: {stop!a}")
    turns = find_turns(tokenizer)
    if turns is not None:
        lines += [
            "# The model's chat template, for chats without tools and thoughts; checked to give the same text.",
            f'TEMPLATE """{turns.in_go()}"""',
        ]
    elif tokenizer.chat_template is not None:
        lines += [
            "# No TEMPLATE: the chat template does more than could be said here. Ollama takes one that it knows, if it",
            "# is alike: compare `ollama show --template NAME` with the prompts that the model was trained on.",
        ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """In the Modelfile's quotes. Ollama takes them off the two ends; there is no escape for what is inside."""
    return f'"""{text}"""' if '"' in text else f'"{text}"'


@dataclass(frozen=True)
class Turns:
    """What stands around the contents of a conversation; `no_system` where there is no system message."""

    start: str
    no_system: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str

    def text(self, messages: list[Message]) -> str:
        """What the Go template makes of the messages."""
        parts = [self.start, "" if messages[0]["role"] == "system" else self.no_system]
        for message in messages:
            before, after = getattr(self, message["role"])
            parts += [before, message["content"], after]
        return "".join([*parts, self.answer])

    def in_go(self) -> str:
        """The same for Go's text/template, with the variables that Ollama gives it."""
        (s0, s1), (u0, u1), (a0, a1) = self.system, self.user, self.assistant
        otherwise = f"{{{{ else }}}}{self.no_system}" if self.no_system else ""
        return (
            f"{self.start}{{{{ if .System }}}}{s0}{{{{ .System }}}}{s1}{otherwise}{{{{ end }}}}"
            f'{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{u0}{{{{ .Content }}}}{u1}'
            f'{{{{ else if eq .Role "assistant" }}}}{a0}{{{{ .Content }}}}{a1}{{{{ end }}}}{{{{ end }}}}{self.answer}'
        )


def find_turns(tokenizer: Tokenizer) -> Turns | None:
    """What the chat template writes around the contents, if that is all that it does; else None."""
    source = tokenizer.chat_template
    if source is None or "strftime" in source:  # today's date would stand in the Modelfile for good
        return None
    try:
        turns = _turns(tokenizer)
        for each in CONVERSATIONS:
            if turns.text(each) != tokenizer.apply_chat_template(each, add_generation_prompt=True):
                return None
    except (InputError, ValueError):  # the template refuses a conversation, or leaves a content out
        return None
    pieces = [turns.start, turns.no_system, *turns.system, *turns.user, *turns.assistant, turns.answer]
    if not all(_arrives(piece) for piece in pieces):
        return None
    return replace(turns, start="") if tokenizer.add_bos_token else turns  # then Ollama puts BOS there itself


def _arrives(piece: str) -> bool:
    """False where Go would take its braces, or the Modelfile its quotes, for their own, or Ollama drop a character."""
    return _is_kept(piece) and "{{" not in f"{piece}{{" and '"""' not in piece


def _is_kept(text: str) -> bool:
    return all(character.isprintable() or character in "\n\r\t" for character in text)


def _turns(tokenizer: Tokenizer) -> Turns:
    bos, (first, _, second) = tokenizer.bos_token or "", TURNS

    def text(messages: list[Message], answer: bool = False) -> str:
        """The conversation as the model reads it, without the BOS before it."""
        return tokenizer.apply_chat_template(messages, add_generation_prompt=answer).removeprefix(bos)

    before_first, between, after_answer, after_user = _around(text(TURNS), FIRST, ANSWER, SECOND)
    before_system, after_system, _ = _around(text([SYSTEM_TURN, first]), SYSTEM, FIRST)
    try:  # what opens a user's turn is what stands between two of them
        opening = _around(text([first, second]), FIRST, SECOND)[1].removeprefix(after_user)
    except InputError:  # the template wants an answer there: then it is what all texts before a question end with
        ends = [before[::-1] for before in (before_first, after_answer, after_system)]
        opening = commonprefix(ends)[::-1]  # noqa: RUF071 (letter by letter is meant)
    writes_bos = bos and tokenizer.apply_chat_template([first]).startswith(bos)
    return Turns(
        start=bos if writes_bos else "",
        no_system=before_first.removesuffix(opening),
        system=(before_system, after_system.removesuffix(opening)),
        user=(opening, after_user),
        assistant=(between.removeprefix(after_user), after_answer.removesuffix(opening)),
        answer=text(TURNS, answer=True).removeprefix(text(TURNS)),
    )


def _around(text: str, *contents: str) -> list[str]:
    """What stands before, between and after the contents. ValueError where one is not there."""
    pieces = []
    for content in contents:
        at = text.index(content)
        pieces.append(text[:at])
        text = text[at + len(content) :]
    return [*pieces, text]
