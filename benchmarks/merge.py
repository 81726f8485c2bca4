"""merge: what is left of an adapter (SmolLM2-135M, the demo's task) after it was merged in each of several ways.

Two QLoRA adapters are trained on the demo's rows: at the demo's learning rate, and at a tenth of it, the usual one.
Every merged model is compared with the tuned model before the merge, on rows that nothing here was fitted to or chosen
on: loss of the answers, KL divergence of all predictions, and layer by layer how much of the wanted change of the
weights is kept, cosine and relative error of the realised one, and the relative error of the change of the output.
Beside the library's merges stand some that were tried and left out.
"""

import math
import re
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.measure import machine
from benchmarks.output import Result
from minilora.adapters.attach import add_adapter, disable_adapters, set_adapter
from minilora.adapters.layer import AdaptedLayer
from minilora.adapters.lora_config import LoRAConfig
from minilora.adapters.merge import merge, unload, unmerge
from minilora.adapters.targets import adapted_layers
from minilora.app.bfcl import load_bfcl
from minilora.data.examples import Example, encode_rows
from minilora.errors import InputError
from minilora.evaluation.general_ability import passages, perplexity
from minilora.formats.load import load
from minilora.merging.into_nf4 import merge_to_lora, merge_to_nf4
from minilora.merging.report import compare_changes
from minilora.models.transformer import Transformer
from minilora.nf4 import rounding
from minilora.nf4.codec import dequantize, quantize
from minilora.nf4.linear import NF4Linear
from minilora.progress import with_progress
from minilora.text.tokenizer import Tokenizer
from minilora.torch_helpers import randomized_svd
from minilora.training.config import TrainConfig
from minilora.training.train import train
from minilora.variants.calibration.input_moments import input_moments

MODEL = "smollm2-135m-instruct"
LORA = LoRAConfig(r=16, lora_alpha=32, target_modules="all-linear")
STEPS, BATCH_SIZE, MAX_LENGTH, SEED = 32, 8, 180, 0
STRONG, GENTLE = "learning rate 2e-3", "learning rate 2e-4"
LEARNING_RATES = {STRONG: 2e-3, GENTLE: 2e-4}
CALIBRATION_ROWS, HELD_OUT_ROWS = 32, 32
ROWS_SEEN = 24  # of validation: on these the methods were chosen
LOFTQ_ROUNDS = 5

BASE, TUNED, REQUANTIZED = "base, no adapter", "tuned, not merged", "NF4, requantized"
LIBRARY = ("bfloat16", "NF4, merge_to_nf4", "NF4 + rank 4, merge_to_lora")

Merge = Callable[[Transformer], None]


# --- the ways to merge ------------------------------------------------------------------------------------------------


def requantize(model: Transformer) -> None:
    """NF4(W'), every weight to the nearest value: what merging into a 4-bit layer does elsewhere."""
    for layer in adapted_layers(model).values():
        W = layer.merged_weight()[0]
        layer.put_in_place(NF4Linear.from_quantized(quantize(W), layer.base_layer.bias, torch.bfloat16))


def requantize_where_it_pays(model: Transformer) -> None:
    """Of each block of 64 the requantized one where it is nearer to W' than the base's, else the base's."""
    for layer in adapted_layers(model).values():
        base, W = layer.base_layer, layer.merged_weight()[0]
        old, new = base.dequantize(torch.float32), dequantize(quantize(W))
        worse = [(Q - W).view(-1, base.block_size).square().sum(1, keepdim=True) for Q in (old, new)]
        chosen = torch.where(worse[1] < worse[0], new.view(-1, base.block_size), old.view(-1, base.block_size))
        _put(layer, chosen.view(W.shape))


def loftq(model: Transformer, r: int) -> None:
    """NF4 and a LoRA of rank r in turn, as LoftQ fits them to dense weights (arXiv 2310.08659), here to W'."""
    for layer in adapted_layers(model).values():
        W = layer.merged_weight()[0]
        BA = torch.zeros_like(W)
        for _ in range(LOFTQ_ROUNDS):
            Q = dequantize(quantize(W - BA))
            U, S, Vh = randomized_svd(W - Q, r + 8, 4)
            BA = (U[:, :r] * S[:r]) @ Vh[:r]
        _put(layer, Q + BA)


def _put(layer: AdaptedLayer, W: Tensor) -> None:
    """Use this weight, in the layer's compute dtype, in which an NF4Linear would dequantize it."""
    layer.put_in_place(layer.kind.with_weight(layer.base_layer, W.to(torch.bfloat16), layer.base_layer.bias))


def by_gptq_alone(model: Transformer, batches: list[Tensor]) -> None:
    """merge_to_nf4 without coordinate descent."""
    with patch.object(rounding, "descend", lambda q, w, c, H: q):
        merge_to_nf4(model, batches)


def merges(batches: list[Tensor]) -> dict[str, Merge]:
    """Every way to merge, by what the table calls it; none of them changes the adapter."""
    return {
        "bfloat16": merge,
        REQUANTIZED: requantize,
        "NF4, requantized where it pays": requantize_where_it_pays,
        "NF4, GPTQ alone": lambda model: by_gptq_alone(model, batches),
        "NF4, merge_to_nf4": lambda model: merge_to_nf4(model, batches),
        "NF4 + rank 4, LoftQ": lambda model: loftq(model, 4),
        "NF4 + rank 4, merge_to_lora": partial(_to_lora, 4),
        "NF4 + rank 8, merge_to_lora": partial(_to_lora, 8),
    }


def _to_lora(r: int, model: Transformer) -> None:
    merge_to_lora(model, r, f"rank {r}")


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Of one model on the held-out rows; the last four layer by layer."""

    loss: float
    """nats a token of the answers"""
    kl: float
    """nats a token, from the unmerged tuned model to this one, over whole rows"""
    perplexity: float
    """of general English"""
    seconds: float
    """that the merge took"""
    kept: list[float]
    """share of the wanted change of the weights that is in the realised one"""
    cosines: list[float]
    """of the wanted and the realised change of the weights"""
    errors: list[float]
    """relative, of the change of the weights"""
    output_errors: list[float]
    """relative, of the change of the output, for held-out inputs"""


Reference = list[Tensor]  # log-probabilities (T, vocabulary) of the tuned model, float16, row by row


@torch.no_grad()
def log_probabilities(model: Transformer, examples: list[Example]) -> Iterator[Tensor]:
    device = next(model.parameters()).device
    for example in examples:
        yield model(torch.tensor([example.input_ids], device=device))[0].float().log_softmax(-1)


def loss_and_kl(model: Transformer, examples: list[Example], reference: Reference) -> tuple[float, float]:
    loss = kl = answer_tokens = tokens = 0.0
    predictions = with_progress(log_probabilities(model, examples), len(examples), "merge, loss and KL", "rows")
    for example, log_q, log_p in zip(examples, predictions, reference, strict=True):
        log_p = log_p.float().log_softmax(-1)  # a distribution again after it was rounded to float16
        labels = torch.tensor(example.labels, device=log_q.device)[1:]
        labelled = labels != -100
        loss -= log_q[:-1][labelled].gather(1, labels[labelled, None]).sum().item()
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        answer_tokens, tokens = answer_tokens + labelled.sum().item(), tokens + len(log_q)
    return loss / answer_tokens, kl / tokens


@torch.no_grad()
def compare(
    model: Transformer,
    calibration: list[Example],
    held_out: list[Example],
    english: Callable[[Transformer], float],
    names: Collection[str] | None = None,
) -> dict[str, Scores]:
    """Scores of the base, the tuned model and its merges, all or those named; the model is then unmerged again."""
    predictions = with_progress(log_probabilities(model, held_out), len(held_out), "merge, predictions", "rows")
    reference = [log_p.half() for log_p in predictions]
    device = next(model.parameters()).device
    inputs = [[torch.tensor([e.input_ids], device=device) for e in examples] for examples in (calibration, held_out)]
    layers = adapted_layers(model)
    bases = {path: layer.kind.weight(layer.base_layer) for path, layer in layers.items()}
    wanted = {path: layer.merged_weight()[0] - bases[path] for path, layer in layers.items()}
    moments = input_moments(model, layers, inputs[1], lambda model, ids: model(ids))

    def scores(seconds: float = 0.0) -> Scores:
        paths = with_progress(layers, len(layers), "merge, changes", "layers")
        changes = [layer_change(layers[path], bases[path], wanted[path], moments[path]) for path in paths]
        by_layer = [list(values) for values in zip(*changes, strict=True)]
        return Scores(*loss_and_kl(model, held_out, reference), english(model), seconds, *by_layer)

    found = {TUNED: scores()}
    with disable_adapters(model):
        found = {BASE: scores()} | found
    chosen = {name: merge_ for name, merge_ in merges(inputs[0]).items() if names is None or name in names}
    for name, merge_in_this_way in with_progress(chosen.items(), len(chosen), "merge", "ways to merge"):
        started = time.perf_counter()
        merge_in_this_way(model)
        found[name] = scores(time.perf_counter() - started)
        unmerge(model)
        set_adapter(model, "default")
    return found


def layer_change(layer: AdaptedLayer, W: Tensor, D: Tensor, H: Tensor) -> tuple[float, ...]:
    """Kept, cosine, relative error, and that of the output, ‖X (R − D)ᵀ‖ / ‖X Dᵀ‖, for the wanted change D of W."""
    now = weight_in_use(layer)
    if layer.merged and not isinstance(layer.base_layer, NF4Linear):
        W = W.to(layer.base_layer.weight.dtype).float()  # against the base in the same format
    E = now - W - D
    return *compare_changes(D, now, W), math.sqrt(((E @ H) * E).sum().item() / ((D @ H) * D).sum().item())


def weight_in_use(layer: AdaptedLayer) -> Tensor:
    """W of what the layer computes with now, in float32: merged, with its active adapters, or without them."""
    base = layer.base_layer
    if layer.acting_adapters():
        return layer.merged_weight()[0]
    return base.dequantize(torch.float32) if isinstance(base, NF4Linear) else base.weight.float()


# --- the benchmark ----------------------------------------------------------------------------------------------------


def run(rounds: int | None, device: torch.device) -> Result:
    """Train the adapters, merge them. Nothing here is timed in rounds, so that `rounds` has no meaning."""
    if rounds is not None:
        raise InputError("the benchmark merge is not timed in rounds: leave --rounds out")
    where = machine(device)
    model, tokenizer = load(MODEL, quantize="nf4", dtype=torch.bfloat16, device=device)
    splits = load_bfcl()
    training, validation = (
        encode_rows(splits[name], tokenizer, MAX_LENGTH).examples for name in ("train", "validation")
    )
    held_out = validation[ROWS_SEEN:][:HELD_OUT_ROWS]
    english = partial(english_perplexity, tokenizer)
    scores, rows = {}, []
    for adapter in LEARNING_RATES:
        add_trained_adapter(model, tokenizer, training, LEARNING_RATES[adapter])
        names = None if adapter == STRONG else (*LIBRARY, REQUANTIZED)
        scores[adapter] = compare(model, training[:CALIBRATION_ROWS], held_out, english, names)
        rows += [{"adapter": adapter} | _row(name, of_name, model) for name, of_name in scores[adapter].items()]
        unload(model)
    return Result(
        benchmark="merge",
        title=f"A QLoRA adapter after merging: SmolLM2-135M, r=16, {STEPS} steps",
        machine=where,
        settings={
            "model": MODEL,
            "lora": asdict(LORA),
            "train": asdict(training_settings(LEARNING_RATES[STRONG])),
            "learning rates": LEARNING_RATES,
            "calibration": f"{CALIBRATION_ROWS} training rows",
            "held out": f"{len(held_out)} rows of validation, from row {ROWS_SEEN} on",
        },
        rows=rows,
        raw={adapter: {name: asdict(values) for name, values in of.items()} for adapter, of in scores.items()},
        plot=partial(_plot, scores),
    )


def training_settings(learning_rate: float, folder: str = "") -> TrainConfig:
    return TrainConfig(
        learning_rate=learning_rate, betas=(0.9, 0.95), warmup_steps=10, max_steps=STEPS, batch_size=BATCH_SIZE,
        max_length=MAX_LENGTH, save_every=None, seed=SEED, output_dir=folder,
    )  # fmt: skip


def add_trained_adapter(
    model: Transformer, tokenizer: Tokenizer, examples: list[Example], learning_rate: float
) -> None:
    torch.manual_seed(SEED)
    add_adapter(model, LORA)
    with tempfile.TemporaryDirectory() as folder:
        train(model, tokenizer, examples, training_settings(learning_rate, folder))
    model.eval()


def english_perplexity(tokenizer: Tokenizer, model: Transformer) -> float:
    return perplexity(model, tokenizer, passages())


def _row(name: str, scores: Scores, model: Transformer) -> dict[str, str]:
    return {
        "model": name,
        "held-out loss": f"{scores.loss:.3f}",
        "KL to tuned": f"{scores.kl:.4f}",
        "perplexity, English": f"{scores.perplexity:.1f}",
        "kept": f"{median(scores.kept):.0%}",
        "cosine": f"{median(scores.cosines):.3f}",
        "rel. error": f"{median(scores.errors):.2f}",
        "of output": f"{median(scores.output_errors):.2f}",
        "MiB": f"{megabytes(name, model):.0f}",
        "seconds": f"{scores.seconds:.0f}",
    }


def megabytes(name: str, model: Transformer) -> float:
    """MiB of the layers with adapters as they are stored: bfloat16, or NF4 with a float32 LoRA beside it, if any."""
    layers = adapted_layers(model).values()
    shapes = [layer.kind.shape for layer in layers]
    if name == "bfloat16":
        return sum(2 * out * inputs for out, inputs in shapes) / 2**20
    r = LORA.r if name == TUNED else int(re.search(r"rank (\d+)", f"{name} rank 0")[1])  # type: ignore[index]
    in_nf4 = sum(buffer.nbytes for layer in layers for buffer in layer.base_layer.buffers())
    return (in_nf4 + sum(4 * r * (out + inputs) for out, inputs in shapes)) / 2**20


def _plot(scores: dict[str, dict[str, Scores]], figure: Any) -> None:
    strong_axes, gentle_axes, layer_axes = figure.subplots(1, 3, width_ratios=[2, 2, 1.8])
    for axes, adapter in ((strong_axes, STRONG), (gentle_axes, GENTLE)):
        names = list(scores[adapter])[::-1]
        colors = ["C1" if name == REQUANTIZED else "C0" if "merge_to" in name else "0.7" for name in names]
        bars = axes.barh(names, [scores[adapter][name].loss for name in names], color=colors)
        axes.bar_label(bars, fmt="%.3f", fontsize=7, padding=2)
        axes.axvline(scores[adapter][TUNED].loss, color="0.3", linewidth=0.8, linestyle=":")
        axes.margins(x=0.22)  # room for the numbers
        axes.set_title(f"held-out loss, {adapter}", fontsize=9)
        axes.tick_params(labelsize=7)
    for color, name in zip(("C1", "C2", "C0", "C3"), (REQUANTIZED, *LIBRARY[1:], LIBRARY[0]), strict=True):
        layer_axes.plot(sorted(scores[STRONG][name].output_errors), color=color, label=name)
    layer_axes.set_title("error of the output, 2e-3", fontsize=9)
    layer_axes.set_xlabel("layers, sorted", fontsize=8)
    layer_axes.set_ylim(0, 1.7)  # room for the legend
    layer_axes.tick_params(labelsize=7)
    layer_axes.legend(fontsize=7, loc="upper left")
