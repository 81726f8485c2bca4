"""A regression check: what the model could do before the fine-tuning, can it still do?

Two numbers, taken before and after: the perplexity of a few pages of plain English, and the share of 40 short
questions (capitals, sums, everyday science, opposites, words) that it answers. Both ship with the library: the
text and the questions were written for it and are free to use (CC0).
"""

import json
import math
import re
import unicodedata
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

from minilora.data import Example
from minilora.evaluation.evaluate import interval, mean_nll
from minilora.evaluation.generate import generate
from minilora.models import Transformer
from minilora.text import Tokenizer

MAX_NEW_TOKENS = 16


@dataclass
class Answer:
    """The model's `text` to a question, and whether it holds one of the `accepted` answers."""

    question: str
    accepted: list[str]
    text: str
    right: bool


@dataclass
class GeneralAbility:
    """`perplexity` of general English, `accuracy` on `n_questions` with its 95% interval, and the answers."""

    perplexity: float
    accuracy: float
    interval: tuple[float, float]
    n_questions: int
    answers: list[Answer]

    def summary(self) -> dict[str, float]:
        """The two numbers, by the names that a report shows."""
        return {"perplexity of general English": self.perplexity, "general questions": self.accuracy}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def general_ability(
    model: Transformer, tokenizer: Tokenizer, progress: str | None = "general ability"
) -> GeneralAbility:
    """Score the model as it is on general English and 40 short questions, active adapters included.

    It reads and writes some 2,500 tokens: seconds on a CPU. Call it before and after a fine-tuning.

    Args:
        model: minilora's `Transformer`, as `load` gives it.
        tokenizer: the model's, as `load` gives it.
        progress: label of the progress bars; None shows none.

    Returns:
        The perplexity, the share of right answers with its 95% interval, and the answers.
    """
    asked = questions()
    conversations = [[{"role": "user", "content": question}] for question, _ in asked]
    label = progress and f"{progress}, questions"
    texts = generate(model, tokenizer, conversations, max_new_tokens=MAX_NEW_TOKENS, progress=label)
    pairs = zip(asked, texts, strict=True)
    answers = [Answer(question, accepted, text, is_right(text, accepted)) for (question, accepted), text in pairs]
    right = [answer.right for answer in answers]
    return GeneralAbility(
        perplexity=perplexity(model, tokenizer, passages(), progress and f"{progress}, perplexity"),
        accuracy=sum(right) / len(right),
        interval=interval(right),
        n_questions=len(right),
        answers=answers,
    )


def perplexity(
    model: Transformer, tokenizer: Tokenizer, texts: list[str], progress: str | None = "perplexity"
) -> float:
    """exp of the mean negative log-likelihood of a token; each text is read on its own, from its second token on."""
    ids = [tokenizer.encode(text) for text in texts]
    return math.exp(mean_nll(model, [Example(row, row) for row in ids], progress=progress))


def is_right(text: str, accepted: list[str]) -> bool:
    """Whether the text holds an accepted answer as whole words or numbers; case, accents and width aside."""
    text = normalized(text)
    return any(re.search(rf"(?<!\w)(?<!\d[.,]){re.escape(normalized(a))}(?!\w|[.,]\d)", text) for a in accepted)


def normalized(text: str) -> str:
    """Lower case, without accents, H₂O as H2O, white space as single spaces."""
    letters = (c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    return " ".join("".join(letters).split())


def passages() -> list[str]:
    """General English: eight passages on as many subjects."""
    return _data_file("general_english.txt").strip().split("\n\n")


def questions() -> list[tuple[str, list[str]]]:
    """The 40 questions, each with its accepted answers."""
    return [(entry["question"], entry["answers"]) for entry in json.loads(_data_file("general_questions.json"))]


def _data_file(name: str) -> str:
    return files("minilora.evaluation").joinpath("data_files", name).read_text(encoding="utf-8")
