"""What `python -m benchmarks train` trains: its configurations, their rows, their base weights, their least work."""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapters.lora_config import LoRAConfig
from minilora.app.bfcl import load_bfcl
from minilora.data.batches import batches
from minilora.data.examples import Example, encode_rows
from minilora.errors import InputError
from minilora.formats.fetch import model_file
from minilora.formats.gguf.tokenizer import read_gguf_tokenizer
from minilora.formats.gguf.weights import GGUFCheckpoint
from minilora.formats.load import Checkpoint
from minilora.models.config import ModelConfig
from minilora.models.transformer import Transformer

MODEL = "smollm2-135m-instruct"
DEMO_LENGTH = 180  # tokens; the demo leaves longer rows out
HELD_OUT_ROWS = 64
LORA = LoRAConfig(r=16, lora_alpha=32, target_modules="all-linear")
SEED, MAX_GRAD_NORM = 0, 1.0
WARMUP = 1  # rounds that are not counted: the first has AdamW's moments to make

LLAMA: dict[str, Any] = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
                         "max_position_embeddings": 8192, "rope_theta": 500000.0}  # fmt: skip
LLAMA_1B = LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                    "num_attention_heads": 32, "tie_word_embeddings": True}  # fmt: skip
LLAMA_8B = LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                    "num_attention_heads": 32, "tie_word_embeddings": False}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One configuration. `length` None: the demo's rows, each learned in its answer; else rows of so many tokens.

    `shape` is the config.json of a model of random weights; None is SmolLM2-135M, read from its GGUF file.
    """

    label: str
    length: int | None
    batch_size: int
    quantize: bool
    dtype: torch.dtype
    gradient_checkpointing: bool = False
    rounds: int = 4
    learning_rate: float = 2e-4
    shape: Mapping[str, Any] | None = field(default=None, hash=False)
    also: tuple[str, ...] = ()
    """contenders beside those of every case"""
    by_length: bool = True  # of the demo's rows those of like length together: little padding for those who pad

    def __str__(self) -> str:
        parts = [self.label, "QLoRA" if self.quantize else "LoRA", "bf16" if self.dtype == torch.bfloat16 else "fp32"]
        return ", ".join(parts + ["checkpointing"] * self.gradient_checkpointing)


BF16, FP32 = torch.bfloat16, torch.float32
ALSO = ("minilora, QLoRA", "minilora, transformers' class")
CASES = {
    "cpu": [
        Case("8 demo rows", None, 8, False, BF16, rounds=32, learning_rate=2e-3, also=ALSO),  # held-out
        Case("4 demo rows", None, 4, False, FP32, rounds=49, also=ALSO),  # 50 losses, to be PEFT's
        Case("4 demo rows in any order", None, 4, False, FP32, rounds=8, by_length=False, also=ALSO),
        Case("8 demo rows", None, 8, True, BF16, rounds=8),
        Case("4 x 512", 512, 4, False, BF16),
        Case("4 demo rows", None, 4, True, FP32, rounds=8),
        Case("4 x 512", 512, 4, False, FP32, rounds=2),
        Case("4 x 512", 512, 4, True, BF16),
        Case("4 x 512", 512, 4, False, BF16, gradient_checkpointing=True, rounds=3),
        Case("1 x 2048", 2048, 1, False, BF16),
        Case("1 x 2048", 2048, 1, True, BF16, gradient_checkpointing=True, rounds=3),
    ],
    "cuda": [
        Case("1B, 4 x 2048", 2048, 4, False, BF16, rounds=10, shape=LLAMA_1B),
        Case("1B, 4 x 2048", 2048, 4, True, BF16, gradient_checkpointing=True, rounds=10, shape=LLAMA_1B),
        Case("8B, 2 x 2048", 2048, 2, True, BF16, gradient_checkpointing=True, rounds=10, shape=LLAMA_8B),
    ],
}


@dataclass(frozen=True)
class Task:
    """A case with the rows of its steps, in their order: all that a contender is told."""

    case: Case
    rows: list[Example]
    held_out: list[Example]
    device: torch.device

    def steps(self) -> list[list[Example]]:
        """The rows of every step."""
        size = self.case.batch_size
        return [self.rows[i : i + size] for i in range(0, len(self.rows), size)]

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate rises: a tenth."""
        return math.ceil(len(self.rows) / self.case.batch_size / 10)


def make_task(case: Case, steps: int, device: torch.device) -> Task:
    """A case's rows for so many steps. The demo's also get held-out ones: its validation rows."""
    count = steps * case.batch_size
    if case.shape is not None:
        return Task(case, _random_rows(case, count), [], device)
    tokenizer, splits = read_gguf_tokenizer(model_file(MODEL)), load_bfcl()
    held_out: list[Example] = []
    if case.length is None:
        rows = encode_rows(splits["train"], tokenizer, DEMO_LENGTH).examples[:count]
        order = batches(rows, case.batch_size, SEED, group_by_length=case.by_length)
        rows = [rows[i] for batch in order for i in batch]
        held_out = encode_rows(splits["validation"], tokenizer, DEMO_LENGTH).examples[:HELD_OUT_ROWS]
    else:
        rows = _cut(encode_rows(splits["train"], tokenizer).examples, case.length)[:count]
    if len(rows) < count:
        raise InputError(f"{case}: there are rows for {len(rows) // case.batch_size} steps, not for {steps}")
    return Task(case, rows, held_out, device)


def _cut(examples: list[Example], length: int) -> list[Example]:
    """The rows packed, then cut into equal ones. Every token is learned: no head is saved at any of them."""
    ids = [id for example in examples for id in example.input_ids]
    rows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    return [Example(row, [-100, *row[1:]]) for row in rows]


def _random_rows(case: Case, count: int) -> list[Example]:
    """Rows of any tokens, every one learned: with random weights there is nothing to know about them."""
    assert case.shape is not None and case.length is not None
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(case.shape["vocab_size"], (count, case.length), generator=generator)
    return [Example(row, [-100, *row[1:]]) for row in ids.tolist()]


# --- where every contender starts ------------------------------------------------------------------------------------


def base_weights(case: Case, device: torch.device) -> Checkpoint:
    """The base's configuration and tensors, by Hugging Face's names, rounded to the case's dtype."""
    if case.shape is None:
        return _RoundedGGUF(case.dtype)
    return _RandomWeights(ModelConfig.from_hf(case.shape), case.dtype, device)


class _RoundedGGUF(GGUFCheckpoint):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(model_file(MODEL))
        self.rounded_to = dtype

    def read(self, name: str) -> Tensor:
        return super().read(name).to(self.rounded_to)


class _RandomWeights:
    """Tensors drawn when they are asked for, each from a seed of its own: equal in every process on one device."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        with torch.device("meta"):
            self._shapes = {name: tuple(p.shape) for name, p in Transformer(config).named_parameters()}

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def where(self, name: str) -> str:
        return f"random weights: {name}"

    def read(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        # N(0, 1 / in_features): the activations keep their size from layer to layer
        values = torch.empty(shape, device=self.device).normal_(generator=_generator(name, self.device))
        return values.mul_(shape[1] ** -0.5).to(self.dtype)


@torch.no_grad()
def start_adapter(parameters: Mapping[str, nn.Parameter]) -> None:
    """Give `<path>.lora_A` and `<path>.lora_B` the start they have by default, drawn from a seed of their name's.

    A is uniform within 1 / sqrt(in_features), as Kaiming's with sqrt(5) has it; B is zero.
    """
    for name, parameter in parameters.items():
        if name.endswith("lora_B"):
            parameter.zero_()
            continue
        bound = parameter.shape[1] ** -0.5
        A = torch.empty(parameter.shape).uniform_(-bound, bound, generator=_generator(name, torch.device("cpu")))
        parameter.copy_(A)


def _generator(name: str, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(zlib.crc32(name.encode()))


# --- the least work --------------------------------------------------------------------------------------------------


def least_flops(config: ModelConfig, examples: list[Example]) -> float:
    """Operations that no step on these rows can do without."""
    return sum(least_work(config, examples))


def least_work(config: ModelConfig, examples: list[Example]) -> tuple[float, float, float]:
    """The same of the frozen weights, of A and B, and of the head: 4 N_frozen + 6 N_trained a token.

    A product with a frozen weight is needed forward and for the input's gradient (2 + 2 a weight), with a trained one
    also for its own gradient (+ 2). The head counts only where a token has a label. Not counted: attention's scores,
    which at 2048 tokens are a third more in SmolLM2, the recomputation of checkpointing, and all that is elementwise.
    """
    with torch.device("meta"):
        model = Transformer(config)
    linears = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    frozen = sum(linear.weight.numel() for linear in linears)
    trained = sum(LORA.r * (linear.in_features + linear.out_features) for linear in linears)
    tokens = sum(len(example.input_ids) for example in examples)
    labelled = sum(label != -100 for example in examples for label in example.labels[1:])
    return tokens * 4.0 * frozen, tokens * 6.0 * trained, labelled * 4.0 * model.lm_head.weight.numel()
