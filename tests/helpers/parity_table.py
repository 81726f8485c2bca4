"""docs/parity.md: what is said of each cell of the parity matrix, and the tables."""

import math
import re
import statistics
from collections.abc import Iterable
from importlib.metadata import version

from helpers.architectures import architectures_table
from helpers.markdown import Notes, table
from helpers.parity import HALF, Cell
from helpers.parity_cells import (
    CELLS,
    FLOAT32,
    ODD,
    ROUNDINGS,
    SILENT,
    WITH_ODD,
    crash,
    follows_peft,
    has_cell,
    known_reason,
    lookup,
    result_of,
    wrong,
)
from helpers.parity_layers import LAYERS, MODELS
from helpers.parity_variants import VARIANTS, Variant

# --- what is said of a cell ------------------------------------------------------------------------------------------


def refusal(side: str, why: str) -> str:
    """An error message without what is particular to the test's layers."""
    _, _, message = why.partition(": ")
    message = re.sub(r"^[\w.]+( is an? |: )(\w+: )?", "", message)
    message = re.sub(r"init_lora_weights='\w+' (needs .*?)(, not .*|: .*)", r"this start \1", message)
    message = re.sub(r".*(is an? )?[Ee]mbedding: ", "", message)
    message = re.sub(r".*([Tt]arget module|layers types).*", "it has this variant for other kinds of layers", message)
    return f"{side} refuses: {message or 'not implemented'}"


def say(cell: Cell, notes: Notes, numbers: str) -> str:
    """The text of one cell; `numbers`: what it says where both libraries are right."""
    result = result_of(cell)
    refused = {side: why["all"] for side, why in result.refusals.items() if "all" in why}
    errors = result.errors.get("PEFT", {})
    off = wrong(errors, cell.dtype)
    if cell.dtype not in HALF:
        off |= wrong({"start": result.difference.get("start", 0.0)}, cell.dtype)
    remarks = [reason for quantity in sorted(off) if (reason := known_reason(cell, quantity))]
    if follows := follows_peft(cell):
        remarks, off = [follows], set()
    if refused.keys() >= {"minilora", "PEFT"}:
        return "–" + notes.mark(refusal("minilora", refused["minilora"]))
    if "PEFT" in refused:
        return "ours" + notes.mark(crash(cell) or refusal("PEFT", refused["PEFT"]))
    if "minilora" in refused:
        word = "–" if off & {"forward", "gradients"} else "PEFT"
        silent = lookup(SILENT, cell.variant.name, cell.layers)
        return word + notes.mark(refusal("minilora", refused["minilora"]), *remarks, *[silent] if silent else [])
    if off & {"forward", "gradients"}:
        return "≠" + notes.mark(*remarks)
    if follows and cell.dtype in HALF:
        return "=" + notes.mark(*remarks)
    no_merge = [refusal(f"{side}'s merge", why["merge"]) for side, why in result.refusals.items() if "merge" in why]
    return numbers + notes.mark(*remarks, *no_merge[:1])


def power_of_ten(error: float) -> str:
    """The power of ten that is not below it."""
    return f"1e{math.ceil(math.log10(error))}" if error > 0 else "0"


def comparable(cell: Cell, quantities: Iterable[str]) -> dict[str, float]:
    """How far minilora is from PEFT, in the quantities in which PEFT is right."""
    result = result_of(cell)
    off = wrong(result.errors.get("PEFT", {}), cell.dtype) if not follows_peft(cell) else set()
    if result.difference.get("start", 0.0) > FLOAT32["start"]:
        off.add("start")
    return {q: result.difference[q] for q in quantities if q in result.difference and q not in off}


def exact_cell(cell: Cell, notes: Notes) -> str:
    differences = comparable(cell, ("forward", "gradients", "merge"))
    return say(cell, notes, power_of_ten(max(differences.values(), default=0.0)))


def ratios(cell: Cell, quantities: Iterable[str], side: str = "PEFT") -> dict[str, float]:
    """minilora's distance from float64 as a multiple of PEFT's."""
    errors = result_of(cell).errors
    if "minilora" not in errors or side not in errors or wrong(errors["PEFT"], cell.dtype) or follows_peft(cell):
        return {}
    mine, theirs = errors["minilora"], errors[side]
    return {q: mine[q] / theirs[q] for q in quantities if q in mine and q in theirs}


def half_cell(cells: list[Cell], notes: Notes) -> str:
    texts = []
    for cell in cells:
        worst = max(ratios(cell, ("forward", "gradients", "merge")).values(), default=0.0)
        texts.append(say(cell, notes, f"{worst:.1f}"))
    words = not any(text[0].isdigit() for text in texts)  # the same ones for both
    return texts[0] if words and len(set(texts)) == 1 else " / ".join(texts)


# --- the document ----------------------------------------------------------------------------------------------------


SHORT = {"Linear, no bias": "no bias", "Conv1D (GPT-2)": "GPT-2"}


def find(variant: Variant, layers: str, dtype: str) -> Cell | None:
    cell = Cell(variant, layers, dtype)
    return cell if has_cell(cell) else None


def exact_table(notes: Notes) -> str:
    columns = [(layers, "float32") for layers in LAYERS if layers not in ODD]
    header = [SHORT.get(layers, layers) for layers, _ in columns] + ["NF4", "NF4, no bias"]
    columns += [("Linear", "NF4"), ("Linear, no bias", "NF4")]

    def row(variant: Variant) -> list[str]:
        cells = [find(variant, *column) for column in columns]
        return [variant.name, *[exact_cell(cell, notes) if cell else "" for cell in cells]]

    return table(["", *header], [row(variant) for variant in VARIANTS if not variant.tied_as_one])


def odd_table(notes: Notes) -> str:
    def row(variant: Variant) -> list[str]:
        return [variant.name, *[exact_cell(Cell(variant, layers, "float32"), notes) for layers in ODD]]

    return table(["", *ODD], [row(variant) for variant in VARIANTS if variant.name in WITH_ODD])


def half_table(notes: Notes) -> str:
    columns = [layers for layers in LAYERS if layers not in ODD]

    def row(variant: Variant) -> list[str]:
        pairs = [[cell for dtype in HALF if (cell := find(variant, layers, dtype))] for layers in columns]
        return [variant.name, *[half_cell(pair, notes) for pair in pairs]]

    rows = [row(variant) for variant in VARIANTS if not variant.only_float32 and not variant.tied_as_one]
    return table(["", *[SHORT.get(layers, layers) for layers in columns]], rows)


def quantities_table() -> str:
    """By variant and quantity: the worst in float32 and NF4, the median in half precision."""

    def row(variant: Variant) -> list[str]:
        exact = [cell for cell in CELLS if cell.variant is variant and cell.dtype not in HALF]
        half = [cell for cell in CELLS if cell.variant is variant and cell.dtype in HALF]
        texts = []
        for q in ("start", *ROUNDINGS):
            found = [comparable(cell, [q])[q] for cell in exact if q in comparable(cell, [q])]
            texts.append(power_of_ten(max(found)) if found else "")
        for q in ROUNDINGS:
            medians = []
            for side in ("PEFT", "PEFT, half"):
                found = [ratios(cell, [q], side)[q] for cell in half if q in ratios(cell, [q], side)]
                medians.append(f"{statistics.median(found):.1f}" if found else "")
            texts.append(" / ".join(medians) if all(medians) else "")
        return [variant.name, *texts]

    header = ["", "start", *ROUNDINGS, *[f"{q}, half" for q in ROUNDINGS]]
    return table(header, [row(variant) for variant in VARIANTS])


def tied_table(notes: Notes) -> str:
    on_models = [(cell.variant, cell.layers.rpartition(", ")[2]) for cell in CELLS if cell.layers in MODELS]
    columns = list(dict.fromkeys(on_models))

    def row(model: str) -> list[str]:
        cells = [find(variant, f"{model}, {on}", "float32") for variant, on in columns]
        return [model, *[exact_cell(cell, notes) if cell else "" for cell in cells]]

    models = dict.fromkeys(name.rpartition(", ")[0] for name in MODELS)
    return table(["", *[f"{variant.name}: {on}" for variant, on in columns]], [row(model) for model in models])


def document() -> str:
    """docs/parity.md."""
    notes = Notes([])
    tables = {
        "exact": exact_table(notes),
        "odd": odd_table(notes),
        "half": half_table(notes),
        "quantities": quantities_table(),
        "tied": tied_table(notes),
        "architectures": architectures_table(),
    }
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "peft", "transformers", "bitsandbytes"))
    remarks = "\n".join(f"{number}. {text}" for number, text in enumerate(notes.texts, 1))
    return TEXT.format(versions=versions, cells=len(CELLS), notes=remarks, **tables)


TEXT = """\
# Parity with PEFT

<!-- Written by `python tests/test_parity.py --write`; a test compares it with what runs. -->

Every cell below runs in the tests, against the PEFT that is installed, on the same base weights and with the same
adapter parameters: the output, the gradient of the input and of every parameter, the way of every parameter in five
steps of AdamW (SGD in half precision), and the weights and the output after a merge. Who is right where the two differ
is decided by a third computation: the equation of the paper, in float64, with autograd, on dense weights.

Written with {versions}; {cells} cells, on one CPU thread.

| cell | means |
| --- | --- |
| `1e-7` | the same: the largest relative difference between minilora and PEFT, rounded up to a power of ten |
| `0` | the same bits |
| `=` | half precision: the same up to rounding, by the same equation |
| `0.9` | half precision: minilora's distance from float64, as a multiple of PEFT's (the worst quantity) |
| ours | minilora agrees with float64; PEFT refuses the layer, or fails |
| ≠ | minilora agrees with float64, and PEFT does not |
| PEFT | minilora refuses the layer, with an error that says so; PEFT computes it |
| – | neither computes it |
| blank | not run: see the end |
| ¹ | a remark, at the end: how PEFT differs, or why one of the two refuses |

## float32, and NF4 with float32 arithmetic

The largest difference of output, gradients and merged weights. GPT-2 stands for its linear layer, transformers'
Conv1D.

{exact}

Convolutions in groups, with dilation, and with circular padding:

{odd}

## bfloat16 / float16

No two orders of rounding give the same bits, so both are measured against float64. PEFT runs its adapters in float32
beside the model and keeps float32 activations for them; minilora runs them in the model's dtype, with float32 masters.

{half}

## Quantity by quantity

Left: the largest difference between minilora and PEFT over all layers, in float32 and NF4. Right, in half precision:
the median of minilora's distance from float64 as a multiple of PEFT's, whose adapters are in float32 (the default) /
in the model's dtype.

{quantities}

## Tied embeddings

A small Llama and GPT-2 with the adapter on the head, on the embedding, or on both, whose base weights are one tensor
or two. float32.

{tied}

## On other people's models

A tiny model of each architecture, frozen, with LoRA (r=4). Three steps of AdamW reach every number that trains; the
folder gives the same output when it is loaded again, and in PEFT; so does the merged model, in memory and, saved by
transformers, from the disk. What of these models is special is in `tests/adapters/test_other_models.py`.

{architectures}

## Remarks

{notes}

## What there is not

- Prompt tuning, prefix tuning and P-tuning: they change what goes into the model and its cache, and no layer, so that
  they have no place under the contract of a variant.
- OFT and BOFT: they multiply W, which the contract allows; nobody has written them.
- LoRA on the joint in_proj of nn.MultiheadAttention under PEFT's names (`target_parameters` can adapt `in_proj_weight`;
  or `out_proj` is a target like any other).
- Combining biases, updates of `target_parameters`, or a copy of a layer with an update of it. Copies among themselves,
  and rows, are combined by their differences from the base, which PEFT refuses or forgets.
- `ensure_weight_tying` of copies over more than a pair (T5, BART) in PEFT: its forward fails, on our folders too;
  LoRA over more than a pair it loads with equal outputs, and trains the embeddings apart.
- A resized embedding under an adapter of it, or of the head: `resize_token_embeddings` is refused before a change, with
  PEFT it stops half-way. Where the model was resized first, the folder has the new rows (`save_embedding_layers`).
- A scaling of its own for (IA)³, VeRA, copies, rows and biases: `scale_adapter` refuses them.
- Layers in 4 bits on the fast path of nn.TransformerEncoderLayer, which reads weights: `NF4Linear` says how to switch
  it off, and an adapter on the layer does it by itself.

## What is not run

- Half precision for the rows that differ from LoRA in their start or optimizer only: those are float32 in any case.
- Grouped, dilated and circular convolutions in half precision, and for rows that compute a convolution as LoRA does.
- NF4 for layers that have no 4-bit form: only linear layers do.
- LoHa and LoKr with a Tucker core for what is not a 1d or 2d convolution.
- Tied models for other variants: tying concerns where a weight lies; there is one variant that adds to W and one that
  does not.
- Dropout, where DoRA is another: minilora's is m/‖V‖ (W x + s·BA dropout(x)), in PEFT W sees the dropped input too.
"""
