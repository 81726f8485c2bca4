# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # NF4 from first principles
#
# LoRA leaves the weight $W$ of a layer alone. Then $W$ need not be kept in a format that one can train; it only has to
# be good enough to compute with. **QLoRA** (Dettmers et al. 2023, [arXiv 2305.14314](https://arxiv.org/abs/2305.14314),
# sections 2 and 3) keeps it in about four bits a weight instead of sixteen, in a format called **NF4**, 4-bit
# NormalFloat.
#
# Four bits can tell 16 values apart. So there are three questions, and this notebook answers them in order:
#
# 1. A tensor has large and small weights. How can 16 values serve both? *(Blocks, each with a scale of its own.)*
# 2. *Which* 16 values? *(Quantiles of the normal distribution.)*
# 3. What do the scales themselves cost, and can that be less? *(Double quantization.)*
#
# Along the way we build NF4 in 20 lines that agree with bitsandbytes, the reference implementation, to the last bit;
# we measure what it does to the weights of SmolLM2-135M; and we find out that NF4 is not quite the best code there is.
#
# **Nothing here is to be believed on our word.** Where the text states an equation or a number, a cell asserts it.

# %%
import logging
import math
from itertools import pairwise
from statistics import NormalDist

import gguf
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

from minilora.formats import model_file

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it looks for kernels that do not concern us here
from bitsandbytes import functional as bnb  # noqa: E402

torch.manual_seed(0)
torch.set_num_threads(1)

BLUES = ["#74aed9", "#4189c4", "#1f5fa5", "#0b2f63"]
RED, GREY = "#d95f02", "#9a9a9a"
plt.rcParams |= {
    "figure.figsize": (7, 3.6),
    "figure.dpi": 110,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def rms(x: Tensor) -> float:
    """The root of the mean square: how large the numbers of x are, typically."""
    return x.square().mean().sqrt().item()


# %% [markdown]
# ## 0. The weights, and a confession
#
# We look at SmolLM2-135M-Instruct, the model that this library's demo fine-tunes.

# %%
reader = gguf.GGUFReader(model_file("smollm2-135m-instruct"))
tensors = {tensor.name: tensor for tensor in reader.tensors}


def weight(name: str) -> Tensor:
    tensor = tensors[name]
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))


GATE, EMBEDDING = "blk.14.ffn_gate.weight", "token_embd.weight"
for name in (GATE, EMBEDDING):
    w = weight(name)
    print(f"{name:24s} {tensors[name].tensor_type.name}  {tuple(w.shape)}  rms {rms(w):.3f}")
assert tensors[GATE].tensor_type.name == "Q4_1"
assert tensors[EMBEDDING].tensor_type.name == "Q8_0"
assert all(t.tensor_type.name == "Q4_1" for n, t in tensors.items() if n.startswith("blk.") and "norm" not in n)

# %% [markdown]
# The confession is in the second column. To be small, *this file has been quantized before*. Every linear layer is in
# `Q4_1`: for each run of 32 weights the file holds a start $m$, a step $d$ and 32 whole numbers $k$ from 0 to 15, and
# the weight is $m + d\,k$. So these weights lie on a uniform 4-bit grid, another grid for every 32. The embedding is in
# `Q8_0`, 8 bits, and much closer to what was trained.
#
# How far is the file from the true weights? They are gone, but rounding to a grid of step $d$ makes an error anywhere
# between $-d/2$ and $d/2$, whose mean square is $\frac1d\int_{-d/2}^{d/2} e^2\,de = d^2/12$. Hence the size of the
# error that is already there:


# %%
def error_in_file(name: str) -> float:
    """Estimated rms error of what the file holds, relative to the rms of the weights: sqrt(mean d²/12) / rms(w)."""
    bytes_per_block = {"Q4_1": 20, "Q8_0": 34}[tensors[name].tensor_type.name]  # both start with d in float16
    d = tensors[name].data.reshape(-1, bytes_per_block)[:, :2].copy().view(np.float16).astype(np.float32)
    return math.sqrt((d**2).mean() / 12) / rms(weight(name))


for name in (GATE, EMBEDDING):
    print(f"{name:24s} is off by about {error_in_file(name):.1%}")
assert 0.07 < error_in_file(GATE) < 0.09
assert error_in_file(EMBEDDING) < 0.01

w = weight(GATE)
assert all(len(run.unique()) <= 16 for run in w.view(-1, 32)[:1000])  # the grid, seen from outside

# %% [markdown]
# So in what follows "the weights" are those of the file: the model that the demo really starts from. Where the file's
# grid could fool us we look at the embedding, or at normal random numbers, as well.
#
# What do weights look like? Left, all 884,736 of one layer, in units of their rms, against the normal distribution.
# Right, the same weights, but each run of 64 divided by *its own* rms.

# %%
blocks = w.view(-1, 64)
by_tensor = (w / rms(w)).flatten()
by_block = (blocks / blocks.square().mean(1, keepdim=True).sqrt()).flatten()


def kurtosis(x: Tensor) -> float:
    """Mean fourth power of x in units of its rms: 3 for a normal distribution, more with fat tails."""
    return ((x / rms(x)) ** 4).mean().item()


edges = np.linspace(-6, 6, 61)
centres = (edges[1:] + edges[:-1]) / 2
normal = np.array([NormalDist().pdf(x) for x in centres])
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
for axis, values, title in zip(
    axes, (by_tensor, by_block), ("Scaled by the tensor's rms", "Scaled by the rms of each 64"), strict=True
):
    axis.hist(values, bins=edges, density=True, color=BLUES[0])
    axis.plot(centres, normal, color="black", linewidth=1.5)
    axis.annotate("normal", (2.0, NormalDist().pdf(2.0) * 1.5))
    axis.set(yscale="log", ylim=(1e-5, 1), xlim=(-6, 6), xlabel="weight / rms", title=title)
    axis.annotate(f"kurtosis {kurtosis(values):.2f}", (-5.7, 0.35), color=BLUES[2])
axes[0].set_ylabel("density (logarithmic)")
figure.tight_layout()
plt.show()

assert w.numel() == 884_736
assert kurtosis(by_tensor) > 5
assert 2.9 < kurtosis(by_block) < 3.3

row_rms = w.square().mean(1, keepdim=True).sqrt()
print(f"rms of a row from {row_rms.min():.2f} to {row_rms.max():.2f}; kurtosis within rows {kurtosis(w / row_rms):.2f}")
assert 6 < row_rms.max() / row_rms.min() < 7
assert kurtosis(w / row_rms) < 3.5

# %% [markdown]
# Taken as a whole the weights are *not* normal: the tails are fat, because some rows of $W$ are up to six times larger
# than others. But 64 neighbours among themselves are normal, almost exactly. Remember this: it is what NF4 bets on.
#
# ## 1. Blocks
#
# Cut the flattened tensor into blocks of 64. For each block keep one number, the largest magnitude, and divide by it:
#
# $$ c = \max_i |w_i|, \qquad s_i = w_i / c \in [-1, 1]. $$
#
# $c$ is called **absmax**. Whatever 16 values we choose between $-1$ and $1$, they now serve large and small blocks
# alike, and one exceptional weight spoils the resolution of its own block only, not that of the tensor.

# %%
c = blocks.abs().amax(1, keepdim=True)
s = blocks / c
assert s.abs().max() == 1
assert (s.abs() == 1).any(1).all()  # every block uses its whole range
print(f"absmax from {c.min():.3f} to {c.max():.3f}: the largest is {c.max() / c.min():.0f} times the smallest")
assert c.max() / c.min() > 20

# %% [markdown]
# ## 2. Which 16 values?
#
# The obvious choice is an even spacing. But weights are not spread evenly: most lie near zero. Values out where there
# are few weights are wasted.
#
# NF4's choice: **every value should stand for the same share of the weights.** If weights are normal, that means
# *quantiles*: cut the area under the bell curve into equal slices and take the place of each. With $\Phi^{-1}$ the
# inverse of the normal distribution function ("below which $x$ does a share $p$ lie?"):
#
# $$ x_i = \Phi^{-1}(p_i), \qquad p_i \text{ evenly spaced.} $$
#
# Three details make this the actual table:
#
# * $\Phi^{-1}(0) = -\infty$ and $\Phi^{-1}(1) = \infty$, so the outermost $p$ must stay inside. The middle of the last
#   of 16 slices is $1 - \frac1{32}$, of 15 slices $1 - \frac1{30}$; NF4 takes the mean of both, cut to seven digits:
#   0.9677083.
# * Zero must be exact: many things in a network are zero for a reason. Evenly spaced $p$ on both sides of zero, with
#   16 values, cannot be symmetric *and* hit it. So the sides are made apart: 8 values above zero, 7 below, and zero.
# * All are divided by the largest, so that they run from $-1$ to $1$.


# %%
def quantiles(p: Tensor) -> Tensor:
    return torch.tensor([NormalDist().inv_cdf(x) for x in p.tolist()])


P = 0.9677083
assert abs(P - (1 - (1 / 32 + 1 / 30) / 2)) < 1e-7

above = quantiles(torch.linspace(P, 0.5, 9)[:-1])  # 8 values; the last, p = 0.5, is zero itself
below = -quantiles(torch.linspace(P, 0.5, 8)[:-1])  # 7 values
raw = torch.cat([below, torch.zeros(1), above]).sort().values
code = raw / raw.max()
print(code)

assert torch.equal(code, bnb.get_4bit_type("nf4", device="cpu"))  # all 16 are bitsandbytes', to the last bit

# %%
UNIFORM = torch.linspace(-1, 1, 16)  # 16 values, no zero among them
INT4 = torch.arange(-7, 8) / 7  # 15 values, with a zero; what "4-bit integers" means

figure, (top, bottom) = plt.subplots(
    2, 1, figsize=(9, 4.8), sharex=True, gridspec_kw={"height_ratios": [2.2, 1], "hspace": 0.08}
)
x = np.linspace(-2.3, 2.3, 1001)
pdf = np.array([NormalDist().pdf(v) for v in x])
top.plot(x, pdf, color="black", linewidth=1.5)
slices = [-np.inf, *((raw[1:] + raw[:-1]) / 2).tolist(), np.inf]
for i in range(16):
    inside = (x >= slices[i]) & (x <= slices[i + 1])
    top.fill_between(x[inside], pdf[inside], color=BLUES[i % 2], alpha=0.55, linewidth=0)
for value in raw.tolist():
    top.plot([value, value], [0, NormalDist().pdf(value)], color=RED, linewidth=1.6)
top.set(ylim=(0, 0.46), yticks=[], title="NF4: each value stands for nearly the same share of a normal distribution")
top.spines["left"].set_visible(False)
for y, values, colour, label in (
    (2, code, RED, "NF4"),
    (1, UNIFORM, BLUES[3], "16 even"),
    (0, INT4, BLUES[3], "int4"),
):
    bottom.plot([v * raw[-1] for v in values.tolist()], [y] * len(values), "|", color=colour, ms=15, mew=1.8)
    bottom.annotate(label, (-2.5, y), va="center", color=colour)
ticks = [-1, -0.5, 0, 0.5, 1]
bottom.set_xticks([t * raw[-1].item() for t in ticks], [str(t) for t in ticks])
bottom.set(ylim=(-0.6, 2.6), yticks=[], xlim=(-2.5, 2.3), xlabel="value of the code (1 = absmax)")
bottom.spines["left"].set_visible(False)
for axis in (top, bottom):
    axis.grid(visible=False)
plt.show()

shares = torch.tensor([NormalDist().cdf(b) - NormalDist().cdf(a) for a, b in pairwise(slices)])
print("share of each value in percent:", [round(100 * share, 1) for share in shares.tolist()])
assert shares.min() > 0.055
assert shares.max() < 0.072
assert abs(shares.sum() - 1) < 1e-6

# %% [markdown]
# The blue slices have nearly the same area: 5.6% to 7.1% each (one sixteenth is 6.25%). The values crowd together where
# the weights are, at the price of wide gaps at the ends, where there are few.
#
# ## 3. Quantize and dequantize, in 20 lines
#
# To quantize is to replace each $s_i$ by the index of the nearest of the 16 values. No distances are needed: the border
# between two neighbours is their midpoint, so the index is simply *the number of midpoints below* $s_i$. Two indices of
# 4 bits share a byte. To dequantize is to look the value up and multiply:
#
# $$ q_i = \#\{\,j : m_j < s_i\,\}, \qquad w_i' = \mathrm{code}[q_i] \cdot c . $$


# %%
midpoints = (code[1:] + code[:-1]) / 2


def quantize(w: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes, uint8 (n/2,), and absmax, float32 (n/64,)."""
    blocks = w.reshape(-1, 64)
    c = blocks.abs().amax(1, keepdim=True)
    s = blocks * (1 / c)
    q = (s.unsqueeze(-1) > midpoints).sum(-1).to(torch.uint8).view(-1, 2)
    return q[:, 0] * 16 + q[:, 1], c.view(-1)


def dequantize(packed: Tensor, c: Tensor) -> Tensor:
    q = torch.stack([packed // 16, packed % 16], dim=1).view(-1, 64)
    return (code[q.int()] * c.unsqueeze(1)).view(-1)


packed, absmax = quantize(w)
restored = dequantize(packed, absmax).view(w.shape)

# bitsandbytes, on the same weights: the same bytes, and the same weights back
theirs, state = bnb.quantize_4bit(w, quant_type="nf4")
assert torch.equal(packed, theirs.view(-1))
assert torch.equal(absmax, state.absmax)
assert torch.equal(restored, bnb.dequantize_4bit(theirs, state))

bits = 8 * (packed.nbytes + absmax.nbytes) / w.numel()
print(f"{bits} bits a weight")
assert bits == 4 + 32 / 64 == 4.5

# %% [markdown]
# `minilora.nf4` is the same, with a short last block, odd lengths and blocks of zeros taken care of, and fast.

# %%
from minilora import nf4  # noqa: E402

q = nf4.quantize(w, double_quant=False)
assert torch.equal(q.codes, packed)
assert torch.equal(q.absmax, absmax)
assert torch.equal(nf4.dequantize(q), restored)

# %% [markdown]
# Let us watch it happen to half a block. Above, 32 weights as they are in the file, on 16 even steps from their
# smallest to their largest. Below, where they go: each to the nearest of NF4's 16 values times the absmax of the block.

# %%
in_first_half = (w.view(-1, 64)[:, :32].abs().amax(1) == absmax).nonzero().flatten()
BLOCK = in_first_half[100].item()  # any block would do; this way its largest weight is among the 32 we see
before, after = w.view(-1, 64)[BLOCK, :32], restored.view(-1, 64)[BLOCK, :32]
grid = torch.linspace(before.min(), before.max(), 16)
assert (before.unsqueeze(1) - grid).abs().amin(1).max() < 0.02 * (grid[1] - grid[0])  # d and m are kept in float16
assert set(after.tolist()) <= set((code * absmax[BLOCK]).tolist())

figure, axis = plt.subplots(figsize=(9, 3))
axis.vlines(grid, 0.96, 1.16, color=GREY, linewidth=1)
axis.vlines(code * absmax[BLOCK], -0.16, 0.04, color=GREY, linewidth=1)
for a, b in zip(before.tolist(), after.tolist(), strict=True):
    axis.plot([a, b], [1, 0], color=BLUES[1], linewidth=1)
axis.plot(before, torch.ones(32), "o", color=BLUES[3], markersize=5)
axis.plot(after, torch.zeros(32), "o", color=RED, markersize=5)
axis.set(ylim=(-0.3, 1.3), xlabel="weight", title="32 weights, and the 16 values they may take")
axis.set_yticks([0, 1], ["NF4", "in the file"])
axis.tick_params(axis="y", length=0)
axis.spines["left"].set_visible(False)
axis.grid(visible=False)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## 4. The error
#
# How large is $w' - w$? A weight lies somewhere between two neighbouring values, a gap $g$ apart, and goes to the
# nearer. If it can lie anywhere in the gap, the mean square of the error is $g^2/12$, as we found for the file. The
# code's gaps are multiplied by the absmax $c$ of the block, so
#
# $$ \text{rms error} \approx \sqrt{\frac1n \sum_i \frac{(c\,g_i)^2}{12}} \qquad
# (g_i: \text{the gap in which } s_i \text{ lies}). $$
#
# (The largest weight of each block, with $s_i = \pm 1$, is exact and has no gap.) This says what a good code is:
# **small gaps where many weights are.**


# %%
def to_code(w: Tensor, values: Tensor) -> Tensor:
    """w with each block of 64 rounded to the given values between -1 and 1 times its absmax."""
    blocks = w.reshape(-1, 64)
    c = blocks.abs().amax(1, keepdim=True)
    return (values[torch.bucketize(blocks / c, (values[1:] + values[:-1]) / 2)] * c).view(w.shape)


def relative_error(w: Tensor, values: Tensor) -> float:
    return rms(to_code(w, values) - w) / rms(w)


gap = code.diff()[(torch.bucketize(s, code) - 1).clamp(0, 14)]  # the gap in which each s lies
gap[s.abs() == 1] = 0
predicted, measured = rms(c * gap) / math.sqrt(12) / rms(w), rms(restored - w) / rms(w)
print(f"error relative to the weights: predicted {predicted:.2%}, measured {measured:.2%}")
assert math.isclose(predicted, measured, rel_tol=0.03)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
x = torch.linspace(-1, 1, 4001)
left.plot(x, x, color=GREY, linewidth=1)
left.plot(x, code[torch.bucketize(x, midpoints)], color=RED, linewidth=1.8)
left.set(xlabel="w / absmax", ylabel="w′ / absmax", title="16 steps, finest in the middle", aspect="equal")

inner = s.abs() < 1
for values, colour in ((code, RED), (UNIFORM, BLUES[2])):
    error = ((to_code(w, values) - w).view(-1, 64) / c)[inner]
    between = torch.bucketize(s[inner], values) - 1  # the number of the gap
    squared = torch.bincount(between, weights=error.square(), minlength=15) / torch.bincount(between, minlength=15)
    right.stairs(squared.sqrt(), values, baseline=None, color=colour, linewidth=2)
    right.plot((values[1:] + values[:-1]) / 2, values.diff() / math.sqrt(12), ".", color="black", markersize=4)
density = torch.histogram(s[inner], bins=80, range=(-1, 1))
right.stairs(density.hist / density.hist.max() * 0.035, density.bin_edges, fill=True, color=BLUES[0], alpha=0.4)
right.annotate("NF4", (-0.66, 0.068), color=RED)
right.annotate("16 even values", (-0.24, 0.042), color=BLUES[2])
right.annotate("where the weights are", (-0.36, 0.004), fontsize=9)
right.set(xlabel="w / absmax", ylabel="rms error / absmax", ylim=(0, 0.1), title="Error in each gap; dots: gap / √12")
figure.tight_layout()
plt.show()

# %% [markdown]
# NF4 is the better code in the middle and the worse one at the ends. Does that pay? We compare three codes on a few
# layers of the model, on its embedding, and on normal random numbers.

# %%
NORMAL = torch.randn(1 << 20)
samples = {
    "attention query, block 14": weight("blk.14.attn_q.weight"),
    "MLP gate, block 14": w,
    "MLP down, block 29": weight("blk.29.ffn_down.weight"),
    "embedding (8-bit in the file)": weight(EMBEDDING)[::16],
    "normal random numbers": NORMAL,
}
codes = {"int4": (INT4, BLUES[0]), "16 even": (UNIFORM, BLUES[2]), "NF4": (code, RED)}
errors = {kind: [relative_error(sample, values) for sample in samples.values()] for kind, (values, _) in codes.items()}

figure, axis = plt.subplots(figsize=(8.5, 4))
y = np.arange(len(samples))
for i, (kind, (_, colour)) in enumerate(codes.items()):
    bars = axis.barh(y + 0.27 * (i - 1), [100 * e for e in errors[kind]], height=0.25, color=colour, label=kind)
    axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
axis.set_yticks(y, samples)
axis.invert_yaxis()
axis.set(xlabel="rms error, % of the rms of the weights", xlim=(0, 18), title="Three codes, blocks of 64")
axis.legend(loc="lower right")
axis.grid(axis="y", visible=False)
figure.tight_layout()
plt.show()

for i, name in enumerate(samples):
    against_even, against_int4 = 1 - errors["NF4"][i] / errors["16 even"][i], 1 - errors["NF4"][i] / errors["int4"][i]
    print(f"{name:30s} NF4's error is {against_even:.0%} below 16 even values', {against_int4:.0%} below int4's")
    assert 0.08 < against_even < 0.27
    assert 0.14 < against_int4 < 0.32

embedding = samples["embedding (8-bit in the file)"]
column_rms = embedding.square().mean(0).sqrt()
assert column_rms.max() > 8 * column_rms.min()
assert kurtosis(embedding / column_rms) < 3.2  # normal within a column, ...
mixed = embedding.reshape(-1, 64)
assert kurtosis(mixed / mixed.square().mean(1, keepdim=True).sqrt()) > 5  # ... but not within a block

# %% [markdown]
# NF4 wins everywhere, and for free: it needs the same 4 bits. About a tenth less error than 16 even values; a sixth
# less than int4, which also wastes one of its 16 codes. Not a miracle, but a clear gain. (The embedding gains more: its
# columns are of very different size, a block runs across 64 of them, and so has fat tails.)
#
# **Did the file's grid fool us?** Its weights sit on 16 even values already. To see whether that matters, do the same
# to normal random numbers: put them on `Q4_1`'s grid first, then into NF4, and compare with NF4 directly.


# %%
def q4_1(w: Tensor) -> Tensor:
    """Round every 32 weights to 16 even steps between their smallest and their largest."""
    runs = w.view(-1, 32)
    m = runs.amin(1, keepdim=True)
    d = (runs.amax(1, keepdim=True) - m) / 15
    return (m + d * ((runs - m) / d).round()).view(w.shape)


on_grid = q4_1(NORMAL)
direct, through_grid = relative_error(NORMAL, code), relative_error(on_grid, code)
total = rms(to_code(on_grid, code) - NORMAL) / rms(NORMAL)
print(f"NF4's error on normal numbers {direct:.2%}; on the same numbers from a Q4_1 grid {through_grid:.2%}")
print(f"both roundings together, against the original numbers: {total:.2%}")
assert math.isclose(direct, through_grid, rel_tol=0.02)
grid_error = rms(on_grid - NORMAL) / rms(NORMAL)
assert math.isclose(total, math.hypot(grid_error, through_grid), rel_tol=0.03)

# %% [markdown]
# It did not: the two grids have nothing to do with each other, and the error is the same to within 2%. But *both*
# errors are in the model that the demo trains, and independent errors add like the sides of a right triangle,
# $\sqrt{e_1^2 + e_2^2}$: it would do a little better from the original weights.
#
# ### What does it do to a layer?
#
# A layer computes $y = Wx$, and $W'x - Wx = (W' - W)x$. The errors of single weights are independent of each other and
# of $x$; they add up in $y$ the same random way the weights do. So for a random $x$, $y$ is off by the same percentage
# as $W$, neither more nor less. That is an error of one part in eleven. QLoRA's discovery is that a network bears it,
# and that adapters trained *on top of the quantized weights* make up for it.

# %%
x = torch.randn(w.shape[1], 512)
off = rms((restored - w) @ x) / rms(w @ x)
print(f"W is off by {measured:.1%}, y by {off:.1%}")
assert math.isclose(off, measured, rel_tol=0.02)
assert 1 / 12 < measured < 1 / 10

# %% [markdown]
# ## 5. Is NF4 the best code?
#
# The recipe was: equal shares. Are they equal on real weights?

# %%
used = torch.bincount(torch.stack([packed // 16, packed % 16], 1).view(-1).int(), minlength=16) / w.numel()
entropy = -(used * used.log2()).sum().item()

figure, axis = plt.subplots(figsize=(8, 3))
axis.bar(range(16), 100 * used, color=BLUES[1])
axis.axhline(100 / 16, color="black", linestyle=":", linewidth=1)
axis.annotate("equal shares", (13.1, 6.5))
axis.set_xticks(range(16), [f"{v:.2f}" for v in code.tolist()], fontsize=8)
axis.set(xlabel="code", ylabel="% of the weights", title="How often each value is used")
axis.grid(axis="x", visible=False)
figure.tight_layout()
plt.show()

print(f"{entropy:.2f} of 4 bits are used; absmax is on average {(c.mean() / rms(w)):.2f} times the rms of the weights")
assert 3.85 < entropy < 3.9
assert 0.09 < used.max() < 0.11
assert used.min() < 0.02

# %% [markdown]
# Not at all! The middle is used five times as often as the ends. The quantiles assumed that the value 1 stands for
# 1.85 times the rms, the outermost quantile. But 1 stands for the absmax, and the largest of 64 normal numbers is
# typically larger:

# %%
expected_absmax = NORMAL.view(-1, 64).abs().amax(1).mean().item()
print(f"outermost quantile {raw.max():.2f}, expected absmax of 64 normal numbers {expected_absmax:.2f}")
assert abs(raw.max() - 1.85) < 0.005
assert abs(expected_absmax - 2.60) < 0.02
assert 5 < used.max() / used.min() < 6

# %% [markdown]
# (Yoshida 2023, [arXiv 2306.06965](https://arxiv.org/abs/2306.06965), pointed this out, and also that equal use would
# not make the error smallest anyway.) How much better could 16 values be? The values with the *least squared error* are
# found by going back and forth: give each weight to the nearest value, then move each value to the mean of its weights
# (Lloyd's algorithm, 1957: k-means in one dimension). A weight's error is multiplied by its $c$, so it counts $c^2$.


# %%
def lloyd(w: Tensor, values: Tensor, keep_ends_and_zero: bool, rounds: int = 60) -> Tensor:
    blocks = w.view(-1, 64)
    c = blocks.abs().amax(1, keepdim=True)
    s, importance = (blocks / c).flatten(), c.square().expand(-1, 64).flatten()
    for _ in range(rounds):
        nearest = torch.bucketize(s, (values[1:] + values[:-1]) / 2)
        total = torch.bincount(nearest, weights=importance, minlength=16)
        values = (torch.bincount(nearest, weights=importance * s, minlength=16) / total).float()
        if keep_ends_and_zero:
            values[0], values[7], values[15] = -1, 0, 1
    return values


TRAIN, TEST = NORMAL[: 1 << 18], NORMAL[1 << 19 :]  # not judged on the numbers it was fitted to
nf4_error = relative_error(TEST, code)
gains = {}
for keep in (False, True):
    gains[keep] = 1 - relative_error(TEST, lloyd(TRAIN, code, keep)) / nf4_error
    print(f"the best 16 values{' with -1, 0 and 1 among them' if keep else ''}: {gains[keep]:.1%} less error than NF4")
assert 0.04 < gains[False] < 0.06
assert 0.02 < gains[True] < 0.035

# %% [markdown]
# Five percent; three if zero and the largest weight of each block are to stay exact. NF4 is not the best code, but
# nearly, and checkpoints and kernels everywhere agree on its 16 values. minilora keeps to them.
#
# ## 6. Double quantization
#
# The 16 values cost 4 bits a weight. The other half bit is absmax: 32 bits for every 64 weights. Larger blocks would
# make it cheaper, and the error larger, since $c$ is then the maximum of more weights. Or: quantize absmax itself.
#
# $$ c \;\approx\; \mathrm{map}[k]\cdot C + \bar c, \qquad
# \bar c = \operatorname{mean}(c), \quad C = \max |c - \bar c| \text{ in a block of 256 } c\text{'s}, $$
#
# with $k$ in 8 bits. The mean is taken off first because all $c$ are positive, and the 256 values of $\mathrm{map}$ lie
# on both sides of zero. They are the *dynamic* 8-bit numbers (Dettmers 2015,
# [arXiv 1511.04561](https://arxiv.org/abs/1511.04561)): on either side 64 even steps from 0.1 to 1, 32 from 0.01 to
# 0.1, and so on down to a single one below $10^{-6}$. The cost in bits a weight:
#
# $$ \underbrace{4}_{\text{code}} + \underbrace{\frac{8}{64}}_{k} + \underbrace{\frac{32}{64 \cdot 256}}_{C} = 4.127 $$

# %%
double = nf4.quantize(w)
table = nf4.dynamic_map()
assert torch.equal(table, bnb.create_dynamic_map())
assert [((table > 0.1**i / 10) & (table < 0.1**i)).sum().item() for i in range(7)] == [64, 32, 16, 8, 4, 2, 1]

packed_2, state_2 = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)  # bitsandbytes' name for it
assert torch.equal(double.codes, packed_2.view(-1))
assert torch.equal(double.absmax, state_2.absmax)
assert torch.equal(double.nested_absmax, state_2.state2.absmax)
assert torch.equal(nf4.dequantize(double), bnb.dequantize_4bit(packed_2, state_2))

# the formula, by hand
k, C, mean = double.absmax, double.nested_absmax, double.offset
assert k.dtype == torch.uint8
assert torch.equal(mean, absmax.mean())
by_hand = (table[k.int()].view(-1, 256) * C.unsqueeze(1)).view(-1) + mean
assert torch.equal(by_hand, nf4.dequantize_absmax(double))

bits = 8 * (double.codes.nbytes + double.absmax.nbytes + double.nested_absmax.nbytes) / w.numel()
print(f"{bits:.3f} bits a weight, {4.5 - bits:.3f} less")
assert bits == 4 + 8 / 64 + 32 / (64 * 256)
assert round(bits, 3) == 4.127
assert round(4.5 - bits, 3) == 0.373

absmax_error = rms(by_hand - absmax) / rms(absmax)
double_error = rms(nf4.dequantize(double) - w) / rms(w)
print(f"absmax is off by {absmax_error:.1%}; the weights by {double_error:.2%} instead of {measured:.2%}")
assert absmax_error < 0.01
assert double_error / measured < 1.01
assert math.isclose(double_error, math.hypot(measured, absmax_error), rel_tol=0.002)

# %% [markdown]
# An absmax that is off by half a percent makes 64 weights half a percent larger or smaller. Beside the 9.4% of the code
# this is nothing: the triangle $\sqrt{9.4^2 + 0.5^2}$ again. Here is the whole trade, for all block sizes:

# %%
SIZES = [32, 64, 128, 256, 512, 1024]
curves = {}
for double_quant in (False, True):
    points = []
    for size in SIZES:
        one = nf4.quantize(w, block_size=size, double_quant=double_quant)
        cost = 4 + (8 / size + 32 / (256 * size) if double_quant else 32 / size)
        points.append((cost, 100 * rms(nf4.dequantize(one) - w) / rms(w)))
    curves[double_quant] = points

figure, axis = plt.subplots(figsize=(7.5, 4))
for double_quant, colour, label in ((False, BLUES[2], "absmax in float32"), (True, RED, "double quantization")):
    costs, values = zip(*curves[double_quant], strict=True)
    axis.plot(costs, values, "o-", color=colour, label=label)
for size, (cost, value) in zip(SIZES, curves[False], strict=True):
    axis.annotate(f"{size}", (cost, value), xytext=(6, 5), textcoords="offset points", color=BLUES[2], fontsize=9)
axis.plot(*curves[True][1], "o", color=RED, markersize=11, fillstyle="none")
axis.annotate("QLoRA", curves[True][1], xytext=(9, 2), textcoords="offset points", color=RED)
axis.set(xlabel="bits a weight", ylabel="rms error, % of the weights' rms", xlim=(3.98, 5.05), ylim=(8, 12.5))
axis.set_title("Smaller blocks: less error, more bits (labels: block size)")
axis.legend()
figure.tight_layout()
plt.show()

(single_64, error_64), (double_64, double_error_64) = curves[False][1], curves[True][1]
single_256, error_256 = curves[False][3]
assert single_256 == 4.125  # as cheap as 64 with double quantization, ...
assert error_256 > 1.09 * double_error_64  # ... and a tenth worse

# %% [markdown]
# Double quantization moves the whole curve to the left and hardly up. For the price of blocks of 256 one has the
# accuracy of blocks of 64. For the linear layers of SmolLM2, together:

# %%
n = sum(t.n_elements for name, t in tensors.items() if name.startswith("blk.") and "norm" not in name)
megabytes = {name: n * bits / 8 / 1e6 for name, bits in (("bfloat16", 16), ("NF4", 4.5), ("NF4, double", double_64))}
print(f"{n:,} weights:", ", ".join(f"{name} {size:.1f} MB" for name, size in megabytes.items()))
assert n == 106_168_320
assert [round(size, 1) for size in megabytes.values()] == [212.3, 59.7, 54.8]

# %% [markdown]
# ## 7. Computing with it
#
# No processor multiplies NF4 numbers. A layer makes $W'$ for one product and drops it again, in the forward pass and
# once more in the backward pass (QLoRA, equation 5):
#
# $$ y = x\,W'^\top, \qquad \frac{\partial L}{\partial x} = \frac{\partial L}{\partial y}\,W', \qquad
# W' = \mathrm{dequantize}(q, c). $$
#
# There is no gradient for $W$: it is frozen. LoRA's matrices beside it learn.

# %%
from minilora import NF4Linear  # noqa: E402

linear = nn.Linear(576, 1536, bias=False)
linear.weight.data = w
layer = NF4Linear.from_linear(linear)
x = torch.randn(8, 576, requires_grad=True)
y = layer(x)
y.sum().backward()

W = nf4.dequantize(double)
torch.testing.assert_close(y, x @ W.T)
torch.testing.assert_close(x.grad, torch.ones(8, 1536) @ W)
assert list(layer.parameters()) == []  # nothing to train
kept = sum(buffer.nbytes for buffer in layer.buffers())
print(f"the layer holds {kept:,} bytes; in bfloat16 it would be {2 * w.numel():,}")
assert 3.8 < 2 * w.numel() / kept < 3.9

# %% [markdown]
# ## What to take with you
#
# * Weights are normal *64 at a time*. NF4 scales each block of 64 by its absmax and rounds to 16 quantiles of the
#   normal distribution.
# * A weight goes to the value whose index is the number of midpoints below it; the way back is a lookup and a product.
# * The error is about $\sqrt{\text{mean } (c\,g)^2/12}$: 9.4% of the weights, and as much of the layer's output. An
#   even 4-bit code does a tenth worse; the best possible one would do 5% better.
# * Double quantization takes the half bit that absmax costs down to an eighth, and adds next to no error: 4.127 bits.
#
# **Try:** Make NF3, with 8 values, by the same recipe, and predict its error from the gaps before you measure it. Use
# $\sqrt{\text{mean square}}$ times 2.6 instead of the maximum as the scale of a block, cutting off what is larger: is
# that better? Sort the rows of a weight by size before cutting it into blocks of 1024: does the error come down, and
# why?
#
# To use the real thing: `minilora.load("smollm2-135m-instruct", quantize="nf4")`.
