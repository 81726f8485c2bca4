"""Scores on held-out rows, and the question that matters: does the tuned model beat its base, and beat a prompt?

`evaluate` scores one model. `compare` scores three: the base (the adapters switched off, no second copy of the
model), the base with examples in its prompt, and the tuned model, all on the same rows, so that the differences are
paired. Examples come as earlier turns of the conversation: small chat models follow those far better than the same
examples inside the system message, and a base line should be as strong as a prompt can make it.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from statistics import fmean, stdev
from typing import Any

import torch

from minilora.adapters import adapter_names, disable_adapters, evaluating
from minilora.data import IGNORE, Example, Row, Rows, collate, encode_rows, given_rows
from minilora.errors import InputError
from minilora.evaluation.generate import (
    encode_prompt,
    eos_token_ids,
    expanded,
    generate_tokens,
    micro_batches,
    shared_prefix,
)
from minilora.models import Transformer, require_own_model
from minilora.progress import progress_bar
from minilora.text import Message, Tokenizer
from minilora.training import label_tokens, loss_of_labels

Score = bool | float
Metric = Callable[[str, Row], Score | dict[str, Score]]  # (the model's answer, the row) -> one score, or several

BASE, FEW_SHOT, TUNED = "base", "base, examples in the prompt", "tuned"
Z95 = 1.959963984540054  # the normal distribution's 97.5% quantile


@dataclass
class Prediction:
    """One row's answer: `prompt` is the last message before it, `expected` the row's own answer."""

    prompt: str
    expected: str
    text: str
    scores: dict[str, Score]
    source: str


@dataclass
class Scores:
    """How a model does on `n` rows: `loss` in nats a labelled token, `metrics` the mean of each score.

    `intervals` are 95%: Wilson's for a proportion, mean ± 1.96 standard errors for any other score.
    """

    loss: float
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    n: int
    predictions: list[Prediction]


@dataclass
class Difference:
    """Tuned minus another model on the same rows: `won` rows it scores higher on, `lost` lower; `p` two-sided."""

    difference: float
    won: int
    lost: int
    p: float


@dataclass
class Comparison:
    """`scores` by model: "base", "base, examples in the prompt" (if examples were given) and "tuned".

    `differences` holds tuned minus each of the others, by metric. Everything in it is plain: `to_dict` is JSON.
    """

    scores: dict[str, Scores]
    differences: dict[str, dict[str, Difference]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# ------------------------------------------------------------------------------------------------ one model


def exact_match(text: str, row: Row) -> bool:
    """Whether the answer is the row's last message, white space around it aside."""
    return text.strip() == answer_of(row).strip()


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    rows: Rows,
    *,
    metric: Metric = exact_match,
    max_new_tokens: int = 64,
    batch_size: int | None = None,
    system: str | None = None,
    few_shot: Rows | None = None,
    progress: str | None = "answering",
) -> Scores:
    """Answer every row's conversation greedily up to its last message, and score the answers and the loss.

    Args:
        model: minilora's `Transformer`, as `load` gives it; its active adapters take part.
        tokenizer: the model's, as `load` gives it.
        rows: held-out conversations: the path of a .json or .jsonl file, or a sequence of dicts or of `Row`s.
        metric: `metric(text, row)` scores the model's answer to a row with a bool or a number, or a dict of them by
            name; by default, whether it is the row's last message.
        max_new_tokens: tokens of an answer at most.
        batch_size: rows at a time; by default as many as a cache of 1 GiB holds, and 128 at most.
        system: stands in place of the rows' own system message.
        few_shot: rows whose turns come before those of each row's conversation.
        progress: label of the progress bar; None shows none.

    Returns:
        The mean of each score with its 95% interval, the loss (nats a labelled token), and every prediction.

    Raises:
        InputError: a row has no answer to compare with, or is longer than the model takes; the metric gives something
            else; the model or the tokenizer is another library's.
    """
    require_own_model(model, "score what it generates itself")
    rows = _conversations(rows, "held-out")
    if system is not None:
        rows = [with_system(row, system) for row in rows]
    if few_shot is not None:
        examples = _conversations(few_shot, "few-shot")
        rows = [with_examples(row, examples) for row in rows]
    expected = [answer_of(row) for row in rows]
    # refuses rows that are too long, before any answer
    loss = held_out_loss(model, tokenizer, rows, batch_size, progress and f"{progress}, loss")
    tokens = generate_tokens(
        model,
        [_prompt_tokens(tokenizer, row) for row in rows],
        max_new_tokens,
        eos_token_ids(model, tokenizer),
        batch_size=batch_size,
        progress=progress,
    )
    predictions = []
    for row, answer, ids in zip(rows, expected, tokens, strict=True):
        text, question = tokenizer.decode(ids), _messages(row)[-2].get("content") or ""
        predictions.append(Prediction(question, answer, text, _scored(metric, text, row), row.source))
    names = list(predictions[0].scores)
    if other := next((each for each in predictions if each.scores.keys() != set(names)), None):
        raise InputError(f"{other.source}: the metric scored {list(other.scores)}, and {names} of the first row")
    by_name = {name: [prediction.scores[name] for prediction in predictions] for name in names}
    return Scores(
        loss=loss,
        metrics={name: fmean(values) for name, values in by_name.items()},
        intervals={name: interval(values) for name, values in by_name.items()},
        n=len(rows),
        predictions=predictions,
    )


def held_out_loss(
    model: Transformer,
    tokenizer: Tokenizer,
    rows: Rows,
    batch_size: int | None = None,
    progress: str | None = "held-out loss",
) -> float:
    """Mean negative log-likelihood (nats) of a labelled token over all rows, dropout off.

    Raises `InputError` for a row longer than the model's `max_position_embeddings`.
    """
    encoded = encode_rows(given_rows(rows, "held-out"), tokenizer, model.config.max_position_embeddings)
    if encoded.skipped:
        first = encoded.skipped[0]
        raise InputError(f"{first.source}: {first.reason}; shorten it or leave it out")
    return mean_nll(model, encoded.examples, batch_size, progress)


@torch.no_grad()
def mean_nll(
    model: Transformer,
    examples: Sequence[Example],
    batch_size: int | None = None,
    progress: str | None = "held-out loss",
) -> float:
    """Mean of −log p(label | the tokens before it) in nats; what all examples begin with is computed once."""
    if not label_tokens(examples):
        raise InputError("no row has a token that the loss could be taken of")
    first_label = min(i for e in examples for i, label in enumerate(e.labels) if i > 0 and label != IGNORE)
    with evaluating(model), progress_bar(progress, len(examples), "rows") as advance:
        # The token before the first label predicts it, and so must not be part of the prefix.
        prefix = shared_prefix(model, [e.input_ids for e in examples], longest=first_label - 1)
        device, start, total = prefix.keys[0].device, prefix.length, 0.0
        rests = [Example(e.input_ids[start:], e.labels[start:]) for e in examples]
        rests.sort(key=lambda rest: -len(rest.input_ids))
        for batch in micro_batches([len(rest.input_ids) for rest in rests], batch_size):
            input_ids, labels, _ = collate(rests[batch], pad_token_id=0)
            rows, T = input_ids.shape
            cache = expanded(model, prefix, rows, start + T) if start else None
            # Padding is on the right, where the causal mask hides it from every real token.
            inputs = {"input_ids": input_ids.to(device), "cache": cache}
            total += loss_of_labels(model, labels.to(device), **inputs).item()
            advance(rows)
    return total / label_tokens(examples)


# ------------------------------------------------------------------------------------------------ three models


def compare(
    model: Transformer,
    tokenizer: Tokenizer,
    rows: Rows,
    *,
    few_shot_rows: Rows | None = None,
    metric: Metric = exact_match,
    max_new_tokens: int = 64,
    batch_size: int | None = None,
    progress: bool = True,
) -> Comparison:
    """Score the base model, the base with examples in its prompt, and the tuned model on the same rows.

    The base model is this one with its adapters switched off. The differences are paired, and tested.

    Args:
        model: minilora's `Transformer`, as `load` gives it, with an adapter.
        tokenizer: the model's, as `load` gives it.
        rows: held-out conversations, as in `evaluate`.
        few_shot_rows: the examples, from the training rows, never from `rows`; None leaves that score out.
        metric: as in `evaluate`.
        max_new_tokens: tokens of an answer at most.
        batch_size: rows at a time, as in `evaluate`.
        progress: whether a progress bar is shown for each score.

    Returns:
        The scores of each, and tuned minus each of the others with the p value of the difference.

    Raises:
        InputError: the model has no adapter, or as `evaluate` does.

    Source: McNemar 1947, Psychometrika 12: the exact test of paired proportions.
    """
    if not adapter_names(model):
        raise InputError("the model has no adapter to compare with its base: add or load one first")
    rows = _conversations(rows, "held-out")
    prompts: dict[str, list[Row] | None] = {BASE: None}
    if few_shot_rows is not None:
        prompts[FEW_SHOT] = _conversations(few_shot_rows, "few-shot")
    prompts[TUNED] = None
    scores = {}
    for name, few_shot in prompts.items():
        with nullcontext() if name == TUNED else disable_adapters(model):
            scores[name] = evaluate(
                model,
                tokenizer,
                rows,
                metric=metric,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                few_shot=few_shot,
                progress=name if progress else None,
            )
    tuned = scores[TUNED]
    return Comparison(scores, {name: difference(tuned, other) for name, other in scores.items() if other is not tuned})


def with_system(row: Row, system: str) -> Row:
    """The row with `system` in place of its system message."""
    old, turns = _system_and_turns(row)
    context = row.context and row.context - len(old) + 1
    return replace(row, messages=[{"role": "system", "content": system}, *turns], context=context)


def with_examples(row: Row, examples: Sequence[Row]) -> Row:
    """The row with the examples' turns between its system message and its own; the examples' answers do not count."""
    system, turns = _system_and_turns(row)
    before = [message for example in examples for message in _system_and_turns(example)[1]]
    context = max(row.context, len(system)) + len(before)
    return replace(row, messages=[*system, *before, *turns], context=context)


def _system_and_turns(row: Row) -> tuple[list[Message], list[Message]]:
    messages = _messages(row)
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    return messages[:first], messages[first:]


# ------------------------------------------------------------------------------------------------ rows


def answer_of(row: Row) -> str:
    """The row's own answer: its last message. Raises `InputError` where it is a tool call without text."""
    answer = _messages(row)[-1].get("content")
    if answer is None:
        raise InputError(f"{row.source}: its answer has no text to compare with; write the call as text")
    return answer


def _messages(row: Row) -> list[Message]:
    if row.messages is None:
        raise InputError(
            f"{row.source}: a plain text has no answer to compare; minilora.evaluation.held_out_loss scores it"
        )
    return row.messages


def _conversations(rows: Rows, what: str) -> list[Row]:
    given = given_rows(rows, what)
    for row in given:
        _messages(row)
    return given


def _prompt_tokens(tokenizer: Tokenizer, row: Row) -> list[int]:
    messages = _messages(row)
    if row.pair and tokenizer.chat_template is None:
        return encode_prompt(tokenizer, messages[0]["content"])
    return encode_prompt(tokenizer, messages[:-1], row.tools)


def _scored(metric: Metric, text: str, row: Row) -> dict[str, Score]:
    score = metric(text, row)
    scores = score if isinstance(score, dict) else {getattr(metric, "__name__", "score"): score}
    if not all(isinstance(value, bool | int | float) for value in scores.values()):
        raise InputError(f"{row.source}: the metric gave {score!r}: it must give a bool or a number, or a dict of them")
    return scores


# ------------------------------------------------------------------------------------------------ statistics


def interval(values: Sequence[Score]) -> tuple[float, float]:
    """The 95% interval of a mean: Wilson's where every score is a bool, else mean ± 1.96 standard errors."""
    if all(isinstance(value, bool) for value in values):
        return wilson(sum(values), len(values))
    mean, error = fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return mean - Z95 * error, mean + Z95 * error


def wilson(successes: float, n: int) -> tuple[float, float]:
    """The 95% score interval of a proportion (Wilson 1927, JASA 22; in [0, 1], right for 0 and for n successes)."""
    p = successes / n
    # the p₀ for which |p − p₀| = z √(p₀ (1 − p₀) / n)
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half


def difference(tuned: Scores, other: Scores) -> dict[str, Difference]:
    """Tuned minus other, metric by metric, on the same rows."""
    differences = {}
    for name in tuned.metrics:
        pairs = [(a.scores[name], b.scores[name]) for a, b in zip(tuned.predictions, other.predictions, strict=True)]
        won, lost = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
        differences[name] = Difference(tuned.metrics[name] - other.metrics[name], won, lost, mcnemar(won, lost))
    return differences


def mcnemar(won: int, lost: int) -> float:
    """McNemar's exact two-sided p: rows on which both agree say nothing, the others are fair coins if both are equal.

    p = min(1, 2 P[Binomial(won + lost, 1/2) <= min(won, lost)]) (McNemar 1947, Psychometrika 12).
    """
    n = won + lost
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(won, lost) + 1)) / 2**n)
