"""How long the demo takes on the machine at hand: what it has to do, counted, by speeds that a short probe measures.

seconds = tokens to train on / training speed + tokens to read / reading speed + tokens to write / decoding speed
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from minilora.adapters import LoRAConfig, add_adapter, delete_adapter
from minilora.data import Example, pack
from minilora.evaluation import generate_tokens, mean_nll
from minilora.models import Transformer
from minilora.training import label_tokens, summed_loss

PROBE = "probe"
PROMPT, NEW_TOKENS = 8, 4  # the decoding probe's: a short prompt, so that next to nothing is read


@dataclass(frozen=True)
class Work:
    """Tokens to train on, to read (forward passes of losses and prompts) and to write (decoding)."""

    trained: float
    read: float
    written: float


@dataclass(frozen=True)
class Speeds:
    """Tokens a second."""

    training: float
    reading: float
    writing: float

    def seconds(self, work: Work) -> float:
        return work.trained / self.training + work.read / self.reading + work.written / self.writing


def measured_speeds(
    model: Transformer, lora: LoRAConfig, examples: Sequence[Example], batch_size: int, answers: int
) -> Speeds:
    """Speeds of a training step of `batch_size` rows, of reading these and of writing `answers` answers at a time.

    The model, which has no adapter, is left as it was. The first of two calls is not counted: it makes what lasts.
    """
    batch = list(examples[:batch_size])
    tokens = sum(len(example.input_ids) for example in batch)

    def step() -> None:
        (summed_loss(model, pack(batch)) / label_tokens(batch)).backward()

    def write(new_tokens: int) -> None:
        generate_tokens(model, [example.input_ids[:PROMPT] for example in examples[:answers]], new_tokens)

    reading = tokens / _second_call(lambda: mean_nll(model, batch))
    once = _second_call(lambda: write(1))
    written = min(answers, len(examples)) * NEW_TOKENS
    writing = written / max(1e-9, _second_call(lambda: write(1 + NEW_TOKENS)) - once)
    add_adapter(model, lora, PROBE)
    try:
        training = tokens / _second_call(step)
    finally:
        delete_adapter(model, PROBE)
    return Speeds(training, reading, writing)


def _second_call(do: Callable[[], object]) -> float:
    do()
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def mean_length(examples: Sequence[Example]) -> float:
    return fmean(len(example.input_ids) for example in examples)


def in_words(seconds: float) -> str:
    """ "40 seconds" or "8 minutes"."""
    return f"{10 * max(1, round(seconds / 10))} seconds" if seconds < 95 else f"{round(seconds / 60)} minutes"
