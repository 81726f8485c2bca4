"""docs/masks.md."""

from importlib.metadata import version

from helpers.markdown import Notes, table
from helpers.mask_conversations import CONVERSATIONS, DESCRIPTIONS
from helpers.mask_outcomes import Outcome, outcome
from helpers.mask_templates import Template, all_templates


def cell(found: Outcome, notes: Notes) -> str:
    remarks = () if found.sign == "refused" and found.wrong else found.remarks
    wrong = [f"wrong: {what}" for what in found.wrong]
    return found.sign + notes.mark(*[remark[0].upper() + remark[1:] for remark in (*remarks, *wrong)])


def cells(templates: list[Template], marked: bool, notes: Notes) -> str:
    rows = [[f"`{t.name}`", *[cell(outcome(t, name, marked), notes) for name in CONVERSATIONS]] for t in templates]
    return table(["", *CONVERSATIONS], rows)


def document() -> str:
    """docs/masks.md."""
    notes = Notes([])
    templates = all_templates()
    inferred, given = (cells(templates, marked, notes) for marked in (False, True))
    return TEXT.format(
        conversations="\n".join(f"| `{name}` | {text} |" for name, text in DESCRIPTIONS.items()),
        inferred=inferred,
        given=given,
        notes="\n".join(f"{number}. {text}" for number, text in enumerate(notes.texts, 1)),
        count=len(templates),
        versions=", ".join(f"{name} {version(name)}" for name in ("trl", "transformers")),
    )


TEXT = """\
# What is learned of a conversation

<!-- Written by `PYTHONPATH=tests python tests/data/test_masks.py --write`; a test compares it with what runs. -->

The loss is on what the assistant says, and on the token that ends it. Where that is in the text of a conversation is
either marked in the chat template, with `{{% generation %}}`, or found by minilora. Below is what becomes of
conversations of all kinds in {count} templates, token by token beside the assistant masks of TRL, whose training
templates are marked by hand. Besides, whoever wrote a word decides whether it may be learned: that needs no reference.

Written with {versions}.

| conversation | is |
| --- | --- |
{conversations}

| cell | means |
| --- | --- |
| = | the same text and the same mask as TRL's, but for what a remark says |
| ≈ | TRL's training template writes another text than the model's own; the same mask where the two are the same |
| refused | minilora refuses the row, and says why |
| – | the template itself refuses the conversation |
| ≠ | another mask, or a part of the row is not in the text: a remark says what is wrong |
| ¹ | a remark, at the end |

## Found by minilora

The templates as their models have them, without marks. `llama3_1` is Llama 3.1's and 3.3's, `gemma` also Gemma 2's,
`qwen2_5_vl` also Qwen2-VL's, `smolvlm` also SmolVLM2's; `mistral`, `mistral, tools` and `phi4` are written in the
manner of those models', all others are the models' own. For those three and for `gemma4`, `llama3_1`, `llama3_2` and
`smollm2` TRL has no training template: they are marked in `tests/helpers/mask_templates.py`. `lfm2_2_5` comes with
marks, which are taken out here.

{inferred}

## Marked in the template

The same with the training templates, in which the answers are marked: here minilora takes the template's word.

{given}

## Thoughts in a conversation of several turns

Qwen3's template, and others like it, writes the thoughts of the answers after the last question only. Earlier answers
stand in the text without them, as they do when the model is used: with a new question, what it thought before is gone.
minilora trains on the text that the model's own template writes. So the last answer is learned with its thoughts, after
exactly the prompt that the model will get. Of an earlier answer is learned what stands there, the answer alone. When
the model gives such an answer, a think block comes first; here none does, so that part of the row teaches it to answer
without thinking.

TRL changes the template instead (for Qwen3, 3.5 and 3.6): in its training template every answer has a think block, an
empty one where the row has no thoughts, so that no message changes as the conversation goes on. Every answer is learned
with its thoughts then, but after a history full of thoughts, which the model never sees when it is used.

With `mask_history` minilora learns the last answer of each row only. To have the right prompt and all thoughts, make a
row of each answer, with the conversation up to it, and set `mask_history`; or give each as `{{"prompt": [...],
"completion": [...]}}`, of which the completion is learned, whatever the assistant says in the prompt. So every answer
is learned with its thoughts, after the history as it is when the model is used. Qwen's authors
[advise the same](https://github.com/QwenLM/Qwen3/discussions/1398).

## Remarks

{notes}
"""
