"""The trainers that `python -m benchmarks train` compares, each as its own documentation has it.

All start from the same base and adapter weights, and take the same rows in the same order: AdamW, a cosine schedule
after a warm-up, gradients clipped to 1, adapters in float32.

minilora    `minilora.train`, the function that users call, with its log: packed, as it is by default. Beside others'
            LoRA also with its base in 4 bits, since QLoRA is there to cost no more; and "minilora, transformers'
            class": the same on the transformers model that PEFT has.
PEFT        a plain PyTorch loop around a transformers model with SDPA attention, without the Trainer's own overhead.
            For QLoRA without prepare_model_for_kbit_training, whose float32 head and norms would only slow it down.
TRL         SFTTrainer on the same PEFT model, on rows already tokenized and labelled: its fused head and loss, in
            bf16 its default mixed precision. Its packing needs flash attention, so neither does it pack on a CPU
            nor would it gain from it on the rows of a GPU, which are not padded. Its QLoRA adapters are bfloat16.
Unsloth     FastLanguageModel in the same plain loop, under the mixed precision that its trainer sets; on a GPU, where
            it can be imported. Written from its documentation: it has not run here yet.
"""

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import chain
from tempfile import TemporaryDirectory, gettempdir
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.training_cases import LORA, MAX_GRAD_NORM, MODEL, SEED, Task, base_weights, start_adapter
from benchmarks.turns import Contender
from minilora.adapters.attach import add_adapter
from minilora.adapters.for_training import adapter_parameters
from minilora.data.batches import batches
from minilora.data.examples import Example
from minilora.errors import InputError
from minilora.formats.fetch import model_file
from minilora.formats.gguf.tokenizer import read_gguf_tokenizer
from minilora.formats.load import assemble
from minilora.formats.save_pretrained import save_pretrained
from minilora.nf4.codec import quantize
from minilora.nf4.linear import NF4Linear
from minilora.text.tokenizer import Tokenizer
from minilora.training.config import TrainConfig
from minilora.training.train import train

PAD = 0  # any token: what stands in padding is neither seen nor learned
PADDING = cast(Tokenizer, SimpleNamespace(pad_token_id=PAD))  # all that `train` asks of a tokenizer here


def needed(name: str) -> Any:
    """A package that only the benchmarks need."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install {error.name}") from None


def minilora_qlora(task: Task) -> Contender:
    return minilora(replace(task, case=replace(task.case, quantize=True)))


def minilora(task: Task) -> Contender:
    case = task.case
    return _train(task, assemble(base_weights(case, task.device), case.quantize, True, 64, case.dtype, task.device))


def minilora_on_transformers(task: Task) -> Contender:
    return _train(task, transformers_model(task, _nf4_linear))


def _train(task: Task, model: nn.Module) -> Contender:
    """`minilora.train` on a model to which this gives the adapter."""
    case = task.case
    add_adapter(model, LORA)
    start_adapter(adapter_parameters(model))

    def run() -> list[float]:
        with TemporaryDirectory() as folder:
            config = TrainConfig(
                output_dir=folder,
                learning_rate=case.learning_rate,
                warmup_steps=task.warmup_steps,
                batch_size=case.batch_size,
                max_length=max(len(example.input_ids) for example in task.rows),
                max_grad_norm=MAX_GRAD_NORM,
                group_by_length=False,  # they are already, for everyone
                gradient_checkpointing=case.gradient_checkpointing,
                save_every=None,
                progress=False,
                seed=SEED,
            )
            history = train(model, PADDING, _to_be_shuffled(task), config).history
        return [record["loss"] for record in history if "loss" in record]

    return Contender(model, run)


def _to_be_shuffled(task: Task) -> list[Example]:
    """The rows in such an order that `train`, which shuffles them, comes to that of the task."""
    rows = list(task.rows)
    shuffled = chain.from_iterable(batches(rows, task.case.batch_size, SEED))
    for place, row in zip(shuffled, task.rows, strict=True):
        rows[place] = row
    return rows


def peft(task: Task) -> Contender:
    model = peft_model(task)
    if task.case.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return _plain_loop(task, model, nullcontext())


def trl(task: Task) -> Contender:
    needed("trl")
    return _sft_trainer(task, peft_model(task))


def unsloth(task: Task) -> Contender:
    fast = needed("unsloth").FastLanguageModel  # imported first: it patches transformers and PEFT
    case = task.case
    with TemporaryDirectory() as folder:
        base = assemble(base_weights(case, task.device), case.quantize, True, 64, case.dtype, task.device)
        save_pretrained(base, read_gguf_tokenizer(model_file(MODEL)), folder, in_4_bits=case.quantize)
        del base
        model, _ = fast.from_pretrained(
            folder, max_seq_length=case.length, dtype=case.dtype, load_in_4bit=case.quantize
        )
    model = fast.get_peft_model(
        model,
        r=LORA.r,
        lora_alpha=LORA.lora_alpha,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth" if case.gradient_checkpointing else False,
    )
    start_adapter(_lora_parameters(model))
    return _plain_loop(task, model, torch.autocast(task.device.type, case.dtype))


ON_TRANSFORMERS = "minilora, transformers' class"
CONTENDERS: dict[str, dict[str, Callable[[Task], Contender]]] = {
    "cpu": {"PEFT": peft, "TRL": trl, "minilora": minilora},
    "cuda": {
        "PEFT": peft,
        "TRL": trl,
        "Unsloth": unsloth,
        "minilora": minilora,
        ON_TRANSFORMERS: minilora_on_transformers,
    },
}
ALSO: dict[str, Callable[[Task], Contender]] = {
    "minilora, QLoRA": minilora_qlora,
    ON_TRANSFORMERS: minilora_on_transformers,
}


# --- what they are made of -------------------------------------------------------------------------------------------


def transformers_model(task: Task, in_4_bits: Callable[[Tensor], nn.Module]) -> Any:
    """A transformers model of the same base weights; `in_4_bits` makes a layer of a weight, where they are to be."""
    transformers = needed("transformers")
    weights = base_weights(task.case, task.device)
    config = transformers.AutoConfig.for_model(**weights.config.to_hf())
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=task.case.dtype, attn_implementation="sdpa")
    for name in list(dict(model.named_parameters())):
        path, _, leaf = name.rpartition(".")
        value, module = cast(Tensor, weights.read(name)).to(task.device), model.get_submodule(path)
        if task.case.quantize and isinstance(module, nn.Linear) and path.startswith("model.layers."):
            model.set_submodule(path, in_4_bits(value))
        else:
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    with torch.device(task.device):  # its frequencies are no parameters, and so are still on the meta device
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def peft_model(task: Task) -> Any:
    """The transformers model with PEFT's LoRA of the same start."""
    peft, model = needed("peft"), transformers_model(task, _linear4bit)
    model.is_loaded_in_4bit = task.case.quantize  # how PEFT, TRL and accelerate tell
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(r=LORA.r, lora_alpha=LORA.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    start_adapter(_lora_parameters(model))
    return model


def _linear4bit(weight: Tensor) -> nn.Module:
    """A layer as transformers makes it for BitsAndBytesConfig(load_in_4bit, nf4, double quantization)."""
    bnb = needed("bitsandbytes").nn
    with torch.device("meta"):  # a weight of its own would be drawn at random first
        layer = bnb.Linear4bit(weight.shape[1], weight.shape[0], False, weight.dtype, True, "nf4")
    packed = bnb.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer)
    layer.weight = packed.to(weight.device)
    return cast(nn.Module, layer)


def _nf4_linear(weight: Tensor) -> nn.Module:
    """A layer as minilora makes it, in NF4 with double quantization."""
    return NF4Linear.from_quantized(quantize(weight, block_size=64, double_quant=True), None, weight.dtype)


def _lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's adapter parameters by the names that minilora gives them."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _plain_loop(task: Task, model: nn.Module, precision: AbstractContextManager[None]) -> Contender:
    """Training as PEFT's quicktour has it without a Trainer: the model's own loss, backward, clip, step."""
    transformers = needed("transformers")
    steps = task.steps()

    def run() -> list[float]:
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=task.case.learning_rate, weight_decay=0.0)
        schedule = transformers.get_cosine_schedule_with_warmup(optimizer, task.warmup_steps, len(steps))
        losses = []
        for examples in steps:
            batch = {name: tensor.to(task.device) for name, tensor in padded(examples).items()}
            with precision:
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    return Contender(model, run)


def _sft_trainer(task: Task, model: nn.Module) -> Contender:
    """TRL's trainer: its own collator, loop, precision and fused head, on the rows as they are."""
    trl, datasets, transformers, tokenizers = map(needed, ("trl", "datasets", "transformers", "tokenizers"))
    config = trl.SFTConfig(
        output_dir=gettempdir(),  # which it creates, though nothing is saved
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",
        max_length=None,
        per_device_train_batch_size=task.case.batch_size,
        num_train_epochs=1,
        learning_rate=task.case.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=task.warmup_steps,
        weight_decay=0.0,
        max_grad_norm=MAX_GRAD_NORM,
        bf16=task.case.dtype == torch.bfloat16,
        gradient_checkpointing=task.case.gradient_checkpointing,
        use_cpu=task.device.type == "cpu",
        dataloader_pin_memory=task.device.type == "cuda",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=SEED,
    )
    losses: list[Tensor] = []

    class LossKeepingTrainer(trl.SFTTrainer):  # type: ignore[misc, name-defined]
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = super().training_step(*args, **kwargs)
            losses.append(loss)
            return loss

    vocabulary = tokenizers.models.WordLevel({"<pad>": PAD}, unk_token="<pad>")
    trainer = LossKeepingTrainer(
        model,
        config,
        train_dataset=datasets.Dataset.from_list(
            [{"input_ids": row.input_ids, "labels": row.labels} for row in task.rows]
        ),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(vocabulary), pad_token="<pad>", eos_token="<pad>"
        ),
    )
    trainer.remove_callback(transformers.PrinterCallback)

    def run() -> list[float]:
        trainer.train()
        return [loss.item() for loss in losses]

    return Contender(model, run)


def padded(examples: Sequence[Example]) -> dict[str, Tensor]:
    """input_ids, labels and attention_mask, padded on the right."""

    def pad(rows: list[list[int]], value: int) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

    ids = [example.input_ids for example in examples]
    return {
        "input_ids": pad(ids, PAD),
        "labels": pad([example.labels for example in examples], -100),
        "attention_mask": pad([[1] * len(row) for row in ids], 0),
    }
