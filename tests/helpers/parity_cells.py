"""Which cells the parity matrix has, how near is near, and what is known of the cells in which PEFT is another."""

from fnmatch import fnmatchcase as fnmatch
from functools import cache
from typing import Any

from helpers.parity import DTYPES, HALF, Cell, Result, measure
from helpers.parity_layers import LAYERS, MODELS
from helpers.parity_variants import VARIANTS

# --- which cells -----------------------------------------------------------------------------------------------------

ODD = ("Conv2d, groups", "Conv2d, dilated", "Conv2d, circular")
# Rows that are LoRA with another start, scale or optimizer go through the same convolutions as LoRA.
WITH_ODD = ("LoRA", "LoRA-FA", "DoRA", "AdaLoRA", "IA3, outputs", "IA3, inputs", "LoHa", "LoKr")
# Tying is a matter of where the weight lies, not of the variant: one additive variant, and one that is not.
ON_MODELS = ("LoRA", "DoRA")


def has_cell(cell: Cell) -> bool:
    if cell.variant.tied_as_one:
        return cell.layers in MODELS and cell.layers.endswith(", tied, head + embedding") and cell.dtype == "float32"
    if cell.variant.name.endswith("Tucker") and cell.layers not in ("Conv1d", "Conv2d"):  # there is no core elsewhere
        return False
    if cell.layers in MODELS:
        return cell.variant.name in ON_MODELS and cell.dtype == "float32"
    if cell.dtype == "NF4" and not cell.layers.startswith("Linear"):  # only linear layers have a 4-bit form
        return False
    if cell.layers in ODD and cell.variant.name not in WITH_ODD:
        return False
    return cell.dtype not in HALF or (not cell.variant.only_float32 and cell.layers not in ODD)


CELLS = [
    cell
    for variant in VARIANTS
    for layers in [*LAYERS, *MODELS]
    for dtype in DTYPES
    if has_cell(cell := Cell(variant, layers, dtype))
]

# --- what is right ---------------------------------------------------------------------------------------------------

# Relative to float64, or of one library to the other. In float32, sums of some dozens of terms, each off by at most
# 6e-8, come to a few 1e-7; a gradient is the product of several such sums. Adam divides by |g|, so where g is a
# thousandth of its mean, so is the precision of its step. A start is a singular vector or an eigenvector: as far off
# as the roundings of the matrix are large beside the gap to the next singular value.
FLOAT32 = {"start": 1e-4, "forward": 2e-6, "gradients": 5e-6, "5 steps": 1e-4, "merge": 2e-6}

# In half precision, in units of half the distance from 1 to the next number: what a handful of roundings, one after
# the other, may come to. Whether minilora is as exact as PEFT is the question of AGAINST_PEFT.
UNIT = {"bfloat16": 2**-9, "float16": 2**-12}
ROUNDINGS = {"forward": 4, "gradients": 16, "5 steps": 16, "merge": 4}

# The most that minilora's error in half precision may be, as a multiple of PEFT's. PEFT keeps in float32 what goes into
# its adapters and what they do with it, four bytes for each number that the backward pass needs; minilora keeps it in
# the model's dtype, two bytes: its y is rounded once where PEFT's is rounded twice, and its A x once more than PEFT's.
AGAINST_PEFT = {"forward": 1.5, "gradients": 1.8, "5 steps": 1.8, "merge": 1.1}


def wrong(errors: dict[str, float], dtype: str) -> set[str]:
    """The quantities in which a side is not as near to float64 as it should be."""
    if dtype in HALF:
        return {q for q, error in errors.items() if error > ROUNDINGS[q] * UNIT[dtype]}
    return {q for q, error in errors.items() if error > FLOAT32[q]}


# Where PEFT's numbers are not those of the equation, and why: (variant, layers, dtype, quantity) -> reason.
KNOWN = {
    ("*", "Conv2d, circular", "*", "*"): "PEFT's adapter does not take over the padding_mode of the convolution",
    ("DoRA", "Conv2d, groups", "*", "*"): "PEFT takes the norm of BA without its groups, which is no weight's norm",
    ("*", "*, tied, *", "*", "merge"): "PEFT merges into the shared weight in place, which changes its other use too",
    ("*", "*", "NF4", "merge"): "PEFT rounds the merged weight to 4 bits again; minilora's becomes dense",
    ("OLoRA", "*", "NF4", "*"): "PEFT takes s·B₀A₀ off W and rounds the rest to 4 bits again; minilora leaves W alone",
    ("LoRA-FA", "*", "*", "5 steps"): "PEFT projects the gradient in bfloat16",
    ("LoRA-GA", "Conv1D (GPT-2)", "*", "start"): "PEFT scales B₀ by the number of inputs, not of outputs",
    ("LoRA-GA", "*", "*", "start"): "a randomized decomposition of the gradient: both draw other numbers for it",
    ("PiSSA_niter_4", "*", "*", "start"): "a randomized decomposition of W: both draw other numbers for it",
    ("LoHa, Tucker", "*", "*", "gradients"): "PEFT's gradients of hada_w1_a and hada_w2_a take the other one's core",
    ("LoHa, Tucker", "*", "*", "5 steps"): "PEFT's gradients of hada_w1_a and hada_w2_a take the other one's core",
    ("LoRA, tied as one", "*", "*", "start"): "PEFT draws the same numbers, and puts them elsewhere",
    ("LoRA, tied as one", "*", "*", "gradients"): "PEFT has two gradients for what the two share, one for each",
    ("LoRA, tied as one", "*", "*", "5 steps"): "PEFT's optimizer steps twice for what the two share",
}
# What PEFT fails on without saying so: (variant, layers, dtype) -> reason.
CRASHES = {
    ("*", "Conv2d, dilated", "*"): "PEFT's adapter does not take over the dilation: the shapes differ",
    ("LoRA-FA", "Conv*", "*"): "PEFT's optimizer takes the weight of a convolution for a matrix",
    ("OLoRA", "Conv1D (GPT-2)", "*"): "PEFT decomposes the weight as it is stored, transposed: the shapes differ",
    ("LoHa", "*", "NF4"): "PEFT takes the packed bytes of a 4-bit layer for its weight",
    ("LoKr*", "*", "NF4"): "PEFT takes the packed bytes of a 4-bit layer for its weight",
    ("LoKr, Tucker", "Conv1d", "*"): "PEFT asks for a view of a tensor whose memory does not allow it",
    ("LoRA, orthogonal", "*", "NF4"): "PEFT makes A and B of the integer type of the packed weight",
    ("LoftQ", "*", "*"): "PEFT's LoftQ needs scipy and a CUDA device",
}
# What PEFT does not say, where minilora refuses: (variant, layers) -> what it does instead.
AS_LORA = "PEFT starts an embedding as LoRA does without this start, and does not say so"
SILENT = {(name, "Embedding"): AS_LORA for name in ("LoRA, orthogonal", "PiSSA*", "OLoRA", "EVA")}
# Where both compute the same, but not the equation of the paper: (variant, layers) -> why.
KRON = "not the ⊗ of the paper: PEFT multiplies in another order, and minilora as PEFT, so that adapters mean the same"
FOLLOWS_PEFT = {("LoKr", "Conv1d"): KRON, ("LoKr, factored", "Conv1d"): KRON}


used: set[tuple[str, ...]] = set()  # which of these said something of a cell


def lookup(reasons: dict[Any, str], *names: str) -> str | None:
    for patterns, why in reasons.items():
        if all(map(fnmatch, names, patterns)):
            used.add(patterns)
            return why
    return None


def known_reason(cell: Cell, quantity: str) -> str | None:
    return lookup(KNOWN, cell.variant.name, cell.layers, cell.dtype, quantity)


def crash(cell: Cell) -> str | None:
    return lookup(CRASHES, cell.variant.name, cell.layers, cell.dtype)


def follows_peft(cell: Cell) -> str | None:
    return lookup(FOLLOWS_PEFT, cell.variant.name, cell.layers)


@cache
def result_of(cell: Cell) -> Result:
    return measure(cell)
