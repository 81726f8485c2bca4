"""The chat templates of docs/masks.md: each as its model has it, and marked with `{% generation %}` for TRL's masks.

TRL bundles templates of many models and, for most, a training template with marks. Those without are marked here.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tokenizers
from helpers.chat import MISTRAL, in_transformers, tiny_backend_json, untagged
from helpers.mask_conversations import row_of

from minilora.text import Tokenizer

# The tokens with which generation ends: EOS first, then the others of the model's generation_config.json.
ENDS = {
    "cohere": ("<|END_OF_TURN_TOKEN|>",),
    "deepseek": ("<｜end▁of▁sentence｜>",),
    "diffusion_gemma": ("<eos>", "<turn|>", "<|tool_response>"),
    "gemma4": ("<eos>", "<turn|>", "<|tool_response>"),
    "gemma": ("<eos>", "<end_of_turn>"),
    "glm4moe": ("<|endoftext|>", "<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|endoftext|>", "<|call|>"),
    "idefics3": ("<end_of_utterance>",),
    "llama": ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
    "llava_next": ("</s>",),
    "mistral": ("</s>",),
    "muse_glimmer": ("<|eot|>",),
    "phi": ("<|endoftext|>", "<|end|>"),
    "smolvlm": ("<end_of_utterance>",),
}
CHATML_ENDS = ("<|im_end|>", "<|endoftext|>")  # all others'
SPECIAL = re.compile(
    r"<\|[\w/]+\|?>|<\w+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_\w+>|\[/?[A-Z_]{4,}\]|</?(?:think|tool_call|tool_response)>"
)
IN_PARTS = ("idefics3", "llava_next", "smolvlm")  # these read content as a list of parts only

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# In the manner of Mistral's with tools: they stand before the last question, and a call needs an id of nine letters.
MISTRAL_TOOLS = """\
{{- bos_token }}
{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- set questions = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools and message == questions[-1] %}
            {{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST]' + (system if loop.last or message == questions[-1] else '') + message.content + '[/INST]' }}
    {%- elif message.tool_calls is defined %}
        {%- generation %}
        {{- '[TOOL_CALLS][' }}
        {%- for call in message.tool_calls %}
            {%- if call.id is not defined or call.id | length != 9 %}
                {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
            {%- endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
            {{- ', ' if not loop.last else ']' + eos_token }}
        {%- endfor %}
        {%- endgeneration %}
    {%- elif message.role == 'assistant' %}
        {%- generation %}{{- message.content + eos_token }}{% endgeneration %}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS]{"content": ' + message.content + ', "call_id": "' + message.tool_call_id }}
        {{- '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}"""

# In the manner of Phi-4-mini's: no line ends, calls after the text, and EOS at the end of all.
PHI4 = """\
{%- if messages[0].role == 'system' or tools %}
    {{- '<|system|>' + (messages[0].content if messages[0].role == 'system' else '') }}
    {%- for tool in tools or [] %}{{- '<|tool|>' + tool.function | tojson + '<|/tool|>' }}{%- endfor %}
    {{- '<|end|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|assistant|>' }}
        {%- generation %}
        {{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {{- '<|tool_call|>' + call.function | tojson + '<|/tool_call|>' }}
        {%- endfor %}
        {{- '<|end|>' }}
        {%- endgeneration %}
    {%- elif message.role == 'tool' %}
        {{- '<|tool_response|>' + message.content | tojson + '<|end|>' }}
    {%- elif message.role != 'system' %}
        {{- '<|' + message.role + '|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}
{%- elif messages[-1].role == 'assistant' %}{%- generation %}{{- eos_token }}{%- endgeneration %}
{%- else %}{{- eos_token }}
{%- endif %}"""

Edits = Sequence[tuple[str, str]]

GENERATED = "{%- generation %}", "{%- endgeneration %}"


def generated(output: str) -> str:
    """A template's output, marked."""
    return output.join(GENERATED)


def generated_if(condition: str, output: str) -> str:
    return f"{{%- if {condition} %}}{generated(output)}{{%- else %}}{output}{{%- endif %}}"


# What marks the templates for which TRL has no training template: each text is replaced where it stands last.
LLAMA_ANSWER = "+ '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}"
LLAMA: Edits = [
    (
        LLAMA_ANSWER,
        "+ '<|end_header_id|>\\n\\n' }}"
        + generated_if("message['role'] == 'assistant'", "{{- message['content'] | trim + '<|eot_id|>' }}"),
    ),
    ("""{{- '{"name": "' + tool_call.name + '", ' }}""", generated("""{{- '{"name": "' + tool_call.name + '", ' }}""")),
    ("""{{- '"parameters": ' }}""", generated("""{{- '"parameters": ' }}""")),
    ("{{- tool_call.arguments | tojson }}", generated("{{- tool_call.arguments | tojson }}")),
    ("""{{- "}" }}""", generated("""{{- "}" }}""")),
]
LLAMA3_1: Edits = [
    *LLAMA,
    (
        """{{- "<|eot_id|>" }}\n        {%- endif %}""",
        generated("""{{- "<|eot_id|>" }}""") + "\n        {%- endif %}",
    ),
]
LLAMA3_2: Edits = [
    *LLAMA,
    (
        """{{- "<|eot_id|>" }}\n    {%- elif message.role == "tool\"""",
        generated("""{{- "<|eot_id|>" }}""") + """\n    {%- elif message.role == "tool\"""",
    ),
]
# As TRL's training template of DiffusionGemma does it, which is nearly the same.
GEMMA4_END_OF_CALLS = "{%- set ns.prev_message_type = 'tool_call' -%}"
GEMMA4_CALLS: Edits = [
    (GEMMA4_END_OF_CALLS, GENERATED[1] + GEMMA4_END_OF_CALLS),
    ("{{- '<turn|>\\n' -}}", generated_if("role == 'model'", "{{- '<turn|>\\n' -}}")),
]
GEMMA4_FOR = "{%- for tool_call in message['tool_calls'] -%}"
GEMMA4_FOR_GET = "{%- for tool_call in message.get('tool_calls') -%}"
GEMMA4_THOUGHTS = "{{- '<|channel>thought\\n' + thinking_text + '\\n<channel|>' -}}"
GEMMA4_CONTENT = "{{- captured_content -}}"
GEMMA4_STRIPPED = "{{- strip_thinking(message['content']) -}}"

EDITS: dict[str, Edits] = {
    "llama3_1": LLAMA3_1,
    "llama3_2": LLAMA3_2,
    "gemma4_v2": [
        *GEMMA4_CALLS,
        (GEMMA4_FOR, GENERATED[0] + GEMMA4_FOR),
        (GEMMA4_STRIPPED, generated(GEMMA4_STRIPPED)),
    ],
    "gemma4_v3": [
        *GEMMA4_CALLS,
        (GEMMA4_FOR, GENERATED[0] + GEMMA4_FOR),
        (GEMMA4_STRIPPED, generated(GEMMA4_STRIPPED)),
        (GEMMA4_THOUGHTS, generated(GEMMA4_THOUGHTS)),
    ],
    **{
        name: [
            *GEMMA4_CALLS,
            (loop, GENERATED[0] + loop),
            (GEMMA4_CONTENT, generated_if("role == 'model'", GEMMA4_CONTENT)),
            (GEMMA4_THOUGHTS, generated(GEMMA4_THOUGHTS)),
        ]
        for name, loop in (("gemma4", GEMMA4_FOR), ("gemma4_v4", GEMMA4_FOR), ("gemma4_v5", GEMMA4_FOR_GET))
    },
}


def edited(source: str, edits: Edits) -> str:
    for old, new in edits:
        before, found, after = source.rpartition(old)
        assert found, f"not in the template any more: {old}"
        source = before + new + after
    return source


@dataclass(frozen=True)
class Template:
    """One chat template.

    Attributes:
        name: TRL's name of it, or ours.
        source: as the model has it, without marks.
        marked: with `{% generation %}` around the answers.
        by_trl: the marks are TRL's, which may have changed more than that.
    """

    name: str
    source: str
    marked: str
    by_trl: bool = False

    @property
    def ends(self) -> tuple[str, ...]:
        return next((ends for prefix, ends in ENDS.items() if self.name.startswith(prefix)), CHATML_ENDS)

    @property
    def in_parts(self) -> bool:
        return self.name in IN_PARTS

    @cached_property
    def turn_end(self) -> str:
        """Of the tokens that end generation, the one that follows an answer first."""
        [question, answer] = row_of("one turn", "", self.in_parts)["messages"]
        text = self.theirs.apply_chat_template([question, answer], chat_template=self.marked, tokenize=False)
        after = text[text.rindex("Norway.") :]
        return min((end for end in self.ends if end in after), key=after.index)

    @cached_property
    def theirs(self) -> Any:
        """transformers' tokenizer."""
        return in_transformers(self.tokenizer(self.source))

    @cache  # noqa: B019 (templates live as long as the tests)
    def tokenizer(self, source: str) -> Tokenizer:
        """Ours, with this template or its marked form; both have the same tokens."""
        backend = tokenizers.Tokenizer.from_str(tiny_backend_json())
        backend.add_special_tokens(sorted({*SPECIAL.findall(self.source + self.marked), *self.ends}))
        ids = [backend.token_to_id(end) for end in self.ends]
        names = {"bos_token": "<s>", "eos_token": self.ends[0]}
        return Tokenizer(backend, names, {"default": source}, eos_token_ids=ids)


@cache
def trl_files() -> dict[str, str]:
    """TRL's templates by name; `trl` itself, which takes seconds to import, stays unimported."""
    spec = find_spec("trl")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "chat_templates"
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}


def marks(source: str) -> bool:
    return re.search(r"\{%-?\s*generation\b", source) is not None


def without_marks(source: str) -> str:
    """`untagged`, for marks that strip the white space after them, too."""
    return untagged(re.sub(r"(\{%-? (?:end)?generation) -%\}\s*", r"\1 %}", source))


def _trl_template(name: str, source: str, files: dict[str, str]) -> Template:
    if training := files.get(f"{name}_training"):
        return Template(name, source, training, by_trl=True)
    if marks(source):
        return Template(name, without_marks(source), source)
    return Template(name, source, edited(source, EDITS[name]))


@cache
def all_templates() -> list[Template]:
    files = trl_files()
    trl = [_trl_template(name, source, files) for name, source in files.items() if not name.endswith("_training")]
    answer = "message['content'] + '<|im_end|>' + '\n'}}"
    marked_answer = "'' }}" + generated_if("message['role'] == 'assistant'", "{{- message['content'] + '<|im_end|>' }}")
    ours = [
        Template("mistral", without_marks(MISTRAL), MISTRAL),
        Template("mistral, tools", without_marks(MISTRAL_TOOLS), MISTRAL_TOOLS),
        Template("phi4", without_marks(PHI4), PHI4),
        Template("smollm2", SMOLLM2, edited(SMOLLM2, [(answer, marked_answer + "{{ '\\n' }}")])),
    ]
    return sorted([*trl, *ours], key=lambda template: template.name)
