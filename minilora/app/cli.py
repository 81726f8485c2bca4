"""The `minilora` command: demo, train, eval, chat, merge, kernels. Flags and help come from the dataclasses below."""

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
import yaml
from rich.console import Console

import minilora as ml
from minilora import variants
from minilora.adapters import LoRAConfig
from minilora.app import kernel_table
from minilora.app.demo import DemoConfig, run_demo
from minilora.app.recipe import read_recipe
from minilora.app.report import comparison_table, write_text
from minilora.app.run_rows import rows_of_a_run
from minilora.auto_dtype import auto_dtype
from minilora.data import SUFFIXES, Row, batches, collate, encode_rows
from minilora.devices import default_device
from minilora.errors import InputError
from minilora.evaluation import stream
from minilora.foreign_text import shown
from minilora.formats import saved_dtype
from minilora.formats.gguf import OutType
from minilora.merging import MergeReport
from minilora.models import Transformer
from minilora.text import Tokenizer
from minilora.training import DivergedError, TrainConfig, language_model_loss, seed_everything

ABOUT = "LoRA and QLoRA from scratch: train, evaluate, chat with and merge adapters. --version prints the version."
CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)  # --r, not --lora.r
EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130  # 128 + SIGINT, as shells have it
BATCHES_FOR_A_START = 16  # that EVA and LoRA-GA look at
GGUF_FLOATS = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


@dataclass
class ModelOptions:
    """Which base model, and how it is held in memory."""

    model: str = "smollm2-135m-instruct"
    """a known name, a Hugging Face folder, a .gguf file, or a Hugging Face Hub id"""
    quantize: Literal["nf4", "none"] = "nf4"
    """nf4: the linear layers are held in 4 bits (QLoRA); none: they are not quantized (LoRA)"""
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    """of activations and of the weights that are not quantized; auto: bfloat16 where the device is fast at it"""
    device: str = field(default_factory=default_device)
    """cuda, xpu, mps or cpu; by default what there is"""

    def load(self, adapter: str | None = None) -> tuple[Transformer, Tokenizer]:
        """The model with the adapter of a PEFT folder on it, if one is named, and its tokenizer."""
        quantize = None if self.quantize == "none" else self.quantize
        model, tokenizer = ml.load(self.model, quantize=quantize, dtype=self.dtype, device=self.device)
        if adapter is not None:
            ml.load_adapter(model, adapter)
        return model, tokenizer


@dataclass
class Demo(DemoConfig):
    """Watch a real 135M-parameter model learn function calling through QLoRA, in minutes on a CPU.

    It says first how long it will take; --small takes less, and --test-rows 8 --max-steps 8 shows just the way.
    """

    def run(self) -> None:
        run_demo(self)


@dataclass
class Train:
    """Fine-tune a model with LoRA or QLoRA: `minilora train recipe.yaml`, or flags alone, or both."""

    data: dict[str, float] | str | list[str] = ""
    """training rows: files or patterns (.json, .jsonl, .csv, .parquet; .gz, .zst), or each with its weight"""
    eval_data: str | list[str] | None = None
    """held-out rows for the validation loss"""
    split: float | None = None
    """in the place of eval_data: hold out this share of the training rows, chosen by what they say"""
    max_rows: int | None = None
    """train on the first so many of the rows that are left"""
    base: ModelOptions = field(default_factory=ModelOptions)
    lora: LoRAConfig = field(default_factory=lambda: LoRAConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    """Which layers to adapt and how, in the names of PEFT's `LoraConfig`."""
    train: TrainConfig = field(default_factory=TrainConfig)

    def run(self) -> None:
        if not self.data:
            raise InputError("no training rows: give --data FILE, or a recipe with `data: FILE`")
        rows, eval_rows = rows_of_a_run(self.data, self.eval_data, self.split, self.max_rows, self.train.skip_bad_rows)
        model, tokenizer = self.base.load()
        seed_everything(self.train.seed)  # A is drawn now
        ml.add_adapter(model, self.lora)
        if self.lora.init_lora_weights in ("eva", "lora_ga"):
            start_from_data(model, tokenizer, rows, self.lora.init_lora_weights, self.train)
        result = ml.train(model, tokenizer, rows, self.train, eval_rows=eval_rows)
        print(f"adapter saved to {result.adapter_dir}")


def start_from_data(model: Transformer, tokenizer: Tokenizer, rows: list[Row], start: str, config: TrainConfig) -> None:
    """Have EVA or LoRA-GA look at the first training batches, in the order in which training will take them."""
    options = {"mask_history": config.mask_history, "skip_bad_rows": config.skip_bad_rows}
    examples = encode_rows(rows, tokenizer, config.max_length, **options).examples
    if not examples:
        raise InputError(f"no training row has a token to learn within max_length={config.max_length}")
    grouped = config.group_by_length and not config.packing
    order = batches(examples, config.batch_size, config.seed, group_by_length=grouped)
    first = [collate([examples[i] for i in indices], tokenizer.pad_token_id) for indices in order[:BATCHES_FOR_A_START]]
    getattr(variants, start).initialize(model, [batch._asdict() for batch in first], forward=language_model_loss)


@dataclass
class Eval:
    """Score an adapter on held-out rows, against its own base and the base with examples in the prompt."""

    data: str | list[str]
    """held-out rows: files or patterns, as for train"""
    adapter: str
    """PEFT adapter folder"""
    few_shot_data: str | list[str] | None = None
    """rows (not the held-out ones) whose first four become the examples of the few-shot prompt"""
    max_new_tokens: int = 64
    output: str | None = None
    """write all scores and answers to this JSON file"""
    base: ModelOptions = field(default_factory=ModelOptions)

    def run(self) -> None:
        rows = ml.load_rows(self.data)
        examples = ml.load_rows(self.few_shot_data)[:4] if self.few_shot_data else None
        model, tokenizer = self.base.load(self.adapter)
        comparison = ml.compare(model, tokenizer, rows, few_shot_rows=examples, max_new_tokens=self.max_new_tokens)
        Console().print(comparison_table(comparison.scores, "tuned"))
        if self.output:
            write_text(Path(self.output), json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False))


@dataclass
class Chat:
    """Talk to a model, with or without an adapter. An empty line or Ctrl-D ends it."""

    adapter: str | None = None
    """PEFT adapter folder"""
    prompt: str | None = None
    """answer this one message and exit"""
    system: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the likeliest token every time"""
    base: ModelOptions = field(default_factory=ModelOptions)

    def run(self) -> None:
        model, tokenizer = self.base.load(self.adapter)
        messages = [{"role": "system", "content": self.system}] if self.system else []
        if self.prompt is None and sys.stdin.isatty():
            print("An empty line or Ctrl-D ends the chat.")
        questions = iter(_ask, "") if self.prompt is None else filter(None, [self.prompt])
        for question in questions:
            messages.append({"role": "user", "content": question})
            answer = ""
            for piece in stream(
                model, tokenizer, messages, max_new_tokens=self.max_new_tokens, temperature=self.temperature
            ):
                print(shown(piece), end="", flush=True)
                answer += piece
            print()
            messages.append({"role": "assistant", "content": answer})


def _ask() -> str:
    """The next line from a person or a pipe; an empty one at its end."""
    typed = sys.stdin.isatty()
    try:
        return input("> " if typed else "").strip()
    except EOFError:
        if typed:
            print()  # the shell's prompt comes on a line of its own
        return ""


@dataclass
class Merge:
    """Add an adapter into its base and write a model that needs no adapter code: a folder, or a GGUF file.

    With --quantize nf4 (the default, right after QLoRA) the adapter is added to the dequantized weights it
    was trained on; with --quantize none to the original ones. Never into NF4: what that would lose, and
    what the merge loses, is shown first (docs/merging.md). Who reads which output: docs/serving.md.
    """

    adapter: str
    """PEFT adapter folder"""
    output: str
    """folder to write, for transformers and vLLM; or model.gguf, for llama.cpp and Ollama"""
    outtype: OutType | None = None
    """the weights' type in a .gguf file: q8_0 unless given"""
    base: ModelOptions = field(default_factory=ModelOptions)

    def run(self) -> None:
        to_gguf = self.output.endswith(".gguf")
        if self.outtype and not to_gguf:
            raise InputError(f"--outtype is of GGUF files, and {self.output} is a folder: end its name in .gguf")
        outtype = self.outtype or "q8_0"
        model, tokenizer = self.base.load(self.adapter)
        dtype = saved_dtype(model) if self.base.dtype == "auto" else getattr(torch, self.base.dtype)
        written = GGUF_FLOATS.get(outtype, outtype) if to_gguf else str(dtype).removeprefix("torch.")
        report = ml.merge_report(model, [written, "nf4"])
        console = Console()
        console.print(report.summary_table())
        MergeReport(report.of(written)).show_warnings(console)
        if "nf4" in report.formats and (nf4 := report.summary("nf4")).erased:
            loss = f"the adapter would be lost in {nf4.erased} of {nf4.layers} layers"
            console.print(f"nf4 is there to compare: were the merged model rounded to it, {loss}", highlight=False)
        if to_gguf:
            ml.save_gguf(model, tokenizer, self.output, outtype=outtype)
            print(f"merged model saved to {self.output}, for llama-server --model; beside it a Modelfile for Ollama")
        else:
            ml.save_pretrained(model, tokenizer, self.output, dtype=dtype)
            print(f"merged model saved to {self.output}; load it with --quantize none")


@dataclass
class Kernels:
    """Show which NF4 kernels this GPU uses: only those that have shown on it that they are right and faster."""

    warm: str | None = None
    """try them now for this model's shapes; only its configuration is read (of a GGUF file, its header)"""
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    """in which that model computes"""
    clear: bool = False
    """first forget what was found, on every device"""
    device: str = field(default_factory=default_device)

    def run(self) -> None:
        if self.clear:
            kernel_table.clear()
        if self.warm is not None:
            dtype = auto_dtype(self.device).dtype if self.dtype == "auto" else getattr(torch, self.dtype)
            kernel_table.warm(self.warm, dtype, self.device)
        kernel_table.show(self.device)


Command = Demo | Train | Eval | Chat | Merge | Kernels
RULES = tyro.constructors.ConstructorRegistry()


@RULES.primitive_rule
def _value_of_any_type(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Any, the values of eva_config and the like, is read as in a recipe: `--eva-config rho 1.5 whiten true`."""
    if info.type is not Any:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="VALUE",
        instance_from_str=lambda words: yaml.safe_load(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )


def parse(argv: list[str]) -> Command:
    """The command `argv` names, filled from its flags, and for `train RECIPE.yaml` from the recipe first.

    Raises InputError for a value that a config refuses; help, and flags that are none, end in tyro's own SystemExit.
    """
    recipe = Train()
    if argv[:1] == ["train"] and argv[1:2] and not argv[1].startswith("-"):
        if argv[1].endswith(SUFFIXES):
            raise InputError(f"{argv[1]} holds rows and is no recipe: give --data {argv[1]}")
        recipe = read_recipe(argv[1], recipe)
        argv = ["train", *argv[2:]]
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return _parsed(argv, recipe)
    except SystemExit as end:
        refused = _input_error_behind(end)
    if refused is not None:  # a config's own words, which tyro would put in a box under a name of its own
        raise refused from None
    return _parsed(argv, recipe)  # once more, to be seen


def _parsed(argv: list[str], recipe: Train) -> Command:
    train = Annotated[Train, tyro.conf.subcommand("train", default=recipe)]
    command = Demo | train | Eval | Chat | Merge | Kernels
    with RULES:
        return tyro.cli(command, prog="minilora", description=ABOUT, args=argv, config=CONFIG)


def _input_error_behind(error: BaseException | None) -> InputError | None:
    while error is not None and not isinstance(error, InputError):
        error = error.__context__
    return error


def main(argv: list[str] | None = None) -> None:
    """Run one command; what goes wrong is one line on stderr: exit code 2 for bad input, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--version"]:
        print(f"minilora {ml.__version__}")
        return
    try:
        parse(argv).run()
    except InputError as error:
        print(f"minilora: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except (DivergedError, OSError) as error:  # of the system: a disk that is full, a pipe that is closed
        print(f"minilora: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except KeyboardInterrupt as interrupt:
        print(f"\nminilora: interrupted. {interrupt}".rstrip(), file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
