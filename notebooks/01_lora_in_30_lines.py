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
# # LoRA in 30 lines
#
# A large model is a pile of linear layers, $y = Wx + b$. To fine-tune it is to find a better $W$ for each of them:
# $W + \Delta W$. **LoRA** (Hu et al. 2021, [arXiv 2106.09685](https://arxiv.org/abs/2106.09685), section 4.1) leaves
# $W$ alone and learns $\Delta W$ as a product of two thin matrices:
#
# $$
# y = Wx + b + s\,B A x, \qquad
# A \in \mathbb{R}^{r \times \mathrm{in}},\quad B \in \mathbb{R}^{\mathrm{out} \times r},\quad s = \frac{\alpha}{r},
# \qquad r \ll \min(\mathrm{in}, \mathrm{out}).
# $$
#
# In this notebook you will
#
# 1. write that layer in 30 lines, and see that it computes what PEFT, the library everybody uses, computes;
# 2. see why a product of thin matrices is enough, and what the rank $r$ buys;
# 3. derive its gradients by hand, and understand why $B$ starts at zero and $A$ does not;
# 4. see what the scale $s$ is for, and why $\alpha/\sqrt r$ may be the better one;
# 5. merge the result back into $W$, so that it costs nothing to use.
#
# **Nothing here is to be believed on our word.** Where the text states an equation or a number, a cell below it asserts
# that very thing; the test suite runs them all.

# %%
import copy
import inspect
import logging
import math
import warnings

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it; what it lacks does not concern us
warnings.filterwarnings("ignore", message="IProgress not found")

torch.manual_seed(0)
torch.set_num_threads(1)

BLUES = ["#74aed9", "#4189c4", "#1f5fa5", "#0b2f63"]  # light to dark: small rank to large
RED = "#d95f02"
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


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a − b| / |b|, the size of a matrix being the root of the sum of its squares (Frobenius)."""
    return ((a - b).norm() / b.norm()).item()


# %% [markdown]
# ## 1. The layer
#
# This is all of it. `base` is the layer we fine-tune; its $W$ and $b$ are frozen. $A$ is random, $B$ is zero.
# (A batch holds one $x$ per row, so $Ax$ is written `x @ A.T`.)


# %%
class LoRALinear(nn.Module):
    """y = W x + b + s·B A x, with W and b frozen."""

    def __init__(self, base: nn.Linear, r: int = 8, alpha: float = 8):
        super().__init__()
        self.base = base.requires_grad_(False)  # W (out, in) and b (out,)
        self.A = nn.Parameter(torch.empty(r, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, r))
        self.s = alpha / r
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # uniform between ±1/√in

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.s * (x @ self.A.T) @ self.B.T

    def delta(self) -> torch.Tensor:
        return self.s * self.B @ self.A  # ΔW (out, in)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        merged = copy.deepcopy(self.base)
        merged.weight += self.delta()
        return merged


# %%
last_method, starts_on = inspect.getsourcelines(LoRALinear.merge)  # the class starts on line 1 of its cell
print(starts_on + len(last_method) - 1, "lines")
assert starts_on + len(last_method) - 1 <= 30

# %% [markdown]
# Note the order of the products in `forward`. `(x @ A.T) @ B.T` first squeezes $x$ through $r$ numbers and then spreads
# them out again. $\Delta W$ itself, as large as $W$, is never built while training.
#
# Is it right? We give PEFT the same layer and the same $A$ and $B$ (not zero, or there would be nothing to see), and
# compare the output and every gradient.

# %%
import peft  # noqa: E402


def peft_layer(base: nn.Linear, r: int, alpha: float) -> nn.Module:
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"])
    return peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config).base_model.model[0]


base = nn.Linear(64, 48)
ours, theirs = LoRALinear(base, r=4, alpha=8), peft_layer(base, r=4, alpha=8)
A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
with torch.no_grad():
    ours.B.normal_()
    A.copy_(ours.A)
    B.copy_(ours.B)

x, target = torch.randn(32, 64), torch.randn(32, 48)
for layer in (ours, theirs):
    F.mse_loss(layer(x), target).backward()

errors = {
    "output": relative_error(ours(x), theirs(x)),
    "gradient of A": relative_error(ours.A.grad, A.grad),
    "gradient of B": relative_error(ours.B.grad, B.grad),
}
for name, error in errors.items():
    print(f"{name:15s} relative difference to PEFT: {error:.1e}")
    assert error < 1e-6  # float32 keeps 7 digits, and the sums are taken in another order

# %% [markdown]
# And over a whole training run: 20 steps of AdamW from the same start, compared loss by loss.


# %%
def losses(layer: nn.Module, parameters: list[nn.Parameter]) -> list[float]:
    optimizer, history = torch.optim.AdamW(parameters, lr=1e-2), []
    for _ in range(20):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


our_losses, their_losses = losses(ours, [ours.A, ours.B]), losses(theirs, [A, B])
worst = max(abs(a - b) / b for a, b in zip(our_losses, their_losses, strict=True))
print(f"loss {our_losses[0]:.4f} -> {our_losses[-1]:.4f}; largest relative difference to PEFT's {worst:.1e}")
assert our_losses[-1] < our_losses[0]
assert worst < 1e-6

# %% [markdown]
# `minilora.LoRALinear` is the same layer grown up: dropout, several adapters at once, a base in 4 bits, one rounding
# less in bfloat16. Its formula is still this one:

# %%
from minilora.adapters import LoRA, LoRAConfig  # noqa: E402
from minilora.adapters import LoRALinear as MiniloraLinear  # noqa: E402

grown_up = MiniloraLinear(base)
grown_up.adapters["default"] = LoRA(base, LoRAConfig(r=4, lora_alpha=8))
grown_up.active = ["default"]
with torch.no_grad():
    grown_up.adapters["default"].lora_A.copy_(ours.A)
    grown_up.adapters["default"].lora_B.copy_(ours.B)
assert relative_error(grown_up(x), ours(x)) < 1e-6

# %% [markdown]
# ## 2. What it saves
#
# A full $\Delta W$ has $\mathrm{out}\cdot\mathrm{in}$ numbers to learn; $A$ and $B$ together have
# $r\,(\mathrm{in} + \mathrm{out})$. Let us count for SmolLM2-135M, the model this library's demo fine-tunes: 30 blocks,
# each with seven linear layers.

# %%
HIDDEN, KEYS_VALUES, MLP, BLOCKS, VOCABULARY = 576, 192, 1536, 30, 49_152
shapes = {  # (in, out)
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN, KEYS_VALUES),
    "v_proj": (HIDDEN, KEYS_VALUES),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (HIDDEN, MLP),
    "up_proj": (HIDDEN, MLP),
    "down_proj": (MLP, HIDDEN),
}
in_one_block = sum(n_in * n_out for n_in, n_out in shapes.values()) + 2 * HIDDEN  # and two normalizations
ALL_PARAMETERS = VOCABULARY * HIDDEN + BLOCKS * in_one_block + HIDDEN  # the head is the embedding; a last normalization
assert ALL_PARAMETERS == 134_515_008

print("                  W  A and B, r = 16")
for name, (n_in, n_out) in shapes.items():
    layer = LoRALinear(nn.Linear(n_in, n_out, bias=False), r=16)
    trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert trained == 16 * (n_in + n_out)  # r (in + out)
    print(f"{name:10s} {n_in * n_out:8,d}  {trained:7,d}  {trained / (n_in * n_out):6.1%}")

trained = BLOCKS * sum(16 * (n_in + n_out) for n_in, n_out in shapes.values())
total = ALL_PARAMETERS + trained
print(f"\nthe whole model: {trained:,} trained of {total:,}, {trained / total:.1%}")
assert trained == 4_884_480

# %% [markdown]
# The saving is in memory. Training a float32 parameter with AdamW takes 16 bytes: itself, its gradient and two running
# averages. A frozen parameter needs no gradient and no averages: 2 bytes in bfloat16. (In 4 bits, half a byte; that is
# QLoRA, and the next notebook.)

# %%
weight = nn.Parameter(torch.randn(1000))
optimizer = torch.optim.AdamW([weight])
weight.sum().backward()
optimizer.step()
averages = optimizer.state[weight]
kept = [weight, weight.grad, averages["exp_avg"], averages["exp_avg_sq"]]
assert sum(tensor.nbytes for tensor in kept) / weight.numel() == 16

everything, with_lora = ALL_PARAMETERS * 16 / 1e9, (ALL_PARAMETERS * 2 + trained * 16) / 1e9
print(f"weights, gradients and averages: {everything:.2f} GB to train everything, {with_lora:.2f} GB with LoRA")
assert round(everything, 2) == 2.15
assert round(with_lora, 2) == 0.35

# %% [markdown]
# ## 3. Why low rank is enough
#
# *Rank $r$* says: $\Delta W$ can only look at $r$ directions of its input (the rows of $A$) and only write to $r$
# directions of its output (the columns of $B$). That is a bet: the change that a task asks for is concentrated in a few
# directions. Pretrained models make it a good one (Aghajanyan et al. 2020,
# [arXiv 2012.13255](https://arxiv.org/abs/2012.13255); the LoRA paper, section 7).
#
# What is the best that rank $r$ could ever do? There is an exact answer (Eckart and Young, 1936). Take the singular
# value decomposition $\Delta W^* = \sum_i \sigma_i u_i v_i^\top$, $\sigma_1 \ge \sigma_2 \ge \dots$; keep the first
# $r$ terms. No matrix of rank $r$ is closer, and what is left has the size
#
# $$ \min_{\operatorname{rank} M \le r} \lVert \Delta W^* - M \rVert_F^2 = \sum_{i > r} \sigma_i^2 . $$
#
# We make a toy task whose wanted change we know: a handful of strong directions and a tail of weak ones.

# %%
OUT, IN, TOKENS = 48, 64, 256
U, _ = torch.linalg.qr(torch.randn(OUT, OUT))
V, _ = torch.linalg.qr(torch.randn(IN, IN))
sigma = torch.cat([torch.tensor([4.0, 3.0, 2.0, 1.5]), 0.4 * 0.8 ** torch.arange(OUT - 4)])
wanted = U @ torch.diag(sigma) @ V[:, :OUT].T  # ΔW*
base = nn.Linear(IN, OUT)

# Inputs with XᵀX/n = I (every direction equally often), so that the loss is |ΔW* − ΔW|² exactly.
X = torch.linalg.qr(torch.randn(TOKENS, IN)).Q * TOKENS**0.5
assert torch.allclose(X.T @ X / TOKENS, torch.eye(IN), atol=1e-5)
with torch.no_grad():
    Y = base(X) + X @ wanted.T  # what the fine-tuned layer should answer


def squared_error(layer: nn.Module) -> torch.Tensor:
    return (layer(X) - Y).square().sum(1).mean()


assert math.isclose(squared_error(base).item(), sigma.square().sum().item(), rel_tol=1e-4)


def floor(r: int) -> float:
    """What no ΔW of rank r can get below: Σ σᵢ² over i > r."""
    return sigma[r:].square().sum().item()


# %% [markdown]
# Now train: LoRA at ranks 1, 2, 4 and 8, and for comparison the full matrix.


# %%
def train(layer: nn.Module, steps: int = 800, lr: float = 0.02) -> list[float]:
    parameters = [p for p in layer.parameters() if p.requires_grad]
    optimizer, history = torch.optim.Adam(parameters, lr=lr), []
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = squared_error(layer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        history.append(loss.item())
    return history


RANKS = [1, 2, 4, 8]
students = {r: LoRALinear(copy.deepcopy(base), r=r, alpha=r) for r in RANKS}
curves = {r: train(student) for r, student in students.items()}
full = copy.deepcopy(base).requires_grad_(True)
full.bias.requires_grad_(False)
full_curve = train(full)

print("rank  numbers   loss   the least that this rank allows")
for r in RANKS:
    print(f"{r:4d}  {r * (IN + OUT):7d}  {curves[r][-1]:6.3f}  {floor(r):6.3f}")
    assert floor(r) * (1 - 1e-4) <= curves[r][-1] <= floor(r) * 1.01  # never below, and almost there
print(f"full  {IN * OUT:7d}  {full_curve[-1]:6.3f}   0")
assert full_curve[-1] < 1e-4

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
left.bar(range(1, 17), sigma[:16], color=[BLUES[3]] * 4 + ["#cccccc"] * 12)
left.set(xlabel="i", ylabel="singular value σᵢ", title="The wanted change: four strong directions")
left.set_xticks([1, 4, 8, 12, 16])
left.grid(axis="x", visible=False)
for r, colour in zip(RANKS, BLUES, strict=True):
    right.plot(curves[r], color=colour, linewidth=2)
    right.axhline(floor(r), color="black", linestyle=":", linewidth=1)
    right.annotate(f"r = {r}", (400, floor(r) * 1.25), color=colour)
right.plot(full_curve, color=RED, linewidth=2)
right.annotate("full ΔW", (14, 0.1), color=RED)
right.set(xscale="log", yscale="log", xlim=(1, 800), ylim=(0.02, 60), xlabel="step", ylabel="loss")
right.set_title("Each rank goes to its limit (dotted)")
figure.tight_layout()
plt.show()

# %% [markdown]
# Every rank ends on its dotted line: training $A$ and $B$ *finds* the best matrix of that rank. Going from rank 1 to 4
# takes 15 off the loss, from 4 to 8 less than 0.4, because the task has four strong directions. That is what choosing
# $r$ is about.
#
# And what it finds is not merely as good as the first four terms of the decomposition. It is those four terms.

# %%
best_of_rank_4 = U[:, :4] @ torch.diag(sigma[:4]) @ V[:, :4].T
learned = students[4].delta().detach()
print(f"learned ΔW against the best of rank 4: relative difference {relative_error(learned, best_of_rank_4):.1e}")
assert curves[1][-1] - curves[4][-1] > 15
assert curves[4][-1] - curves[8][-1] < 0.4
assert torch.linalg.matrix_rank(learned) == 4
assert relative_error(learned, best_of_rank_4) < 0.01

# %% [markdown]
# ## 4. The gradients, by hand
#
# Let a batch be $X$ (one token a row) and $G$ the gradient of the loss with respect to the output $Y$, in the same
# shape as $Y$. With $H = XA^\top$, the $r$ numbers per token, the layer is $Y = XW^\top + b + s\,HB^\top$. One rule
# does it all: if $Y = PQ^\top$ then $\partial L/\partial Q = G^\top P$ and $\partial L/\partial P = GQ$. Use it for
# $HB^\top$, then for $XA^\top$ and $XW^\top$:
#
# $$
# \frac{\partial L}{\partial B} = s\,G^\top H, \qquad
# \frac{\partial L}{\partial A} = s\,(GB)^\top X, \qquad
# \frac{\partial L}{\partial X} = GW + s\,(GB)A .
# $$
#
# In float64, where rounding hides nothing:

# %%
torch.set_default_dtype(torch.float64)
layer = LoRALinear(nn.Linear(7, 5), r=3, alpha=6)
nn.init.normal_(layer.B)
x = torch.randn(4, 7, requires_grad=True)
target = torch.randn(4, 5)


def loss_of(A: torch.Tensor, B: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = layer.base(x) + layer.s * (x @ A.T) @ B.T
    return (y - target).square().sum()


loss_of(layer.A, layer.B, x).backward()

with torch.no_grad():
    W, A, B, s = layer.base.weight, layer.A, layer.B, layer.s
    G = 2 * (layer(x) - target)  # of the squared error
    H = x @ A.T
    by_hand = {"B": s * G.T @ H, "A": s * (G @ B).T @ x, "x": G @ W + s * (G @ B) @ A}
by_autograd = {"B": layer.B.grad, "A": layer.A.grad, "x": x.grad}
for name in by_hand:
    torch.testing.assert_close(by_hand[name], by_autograd[name])

# %% [markdown]
# Autograd agrees. And so does the definition of a derivative, which trusts neither: move one number at a time by
# $\pm\varepsilon$ and see how the loss changes,
# $\bigl(L(\theta + \varepsilon) - L(\theta - \varepsilon)\bigr)/2\varepsilon$.


# %%
def finite_differences(name: str, epsilon: float = 1e-5) -> torch.Tensor:
    values = {"A": layer.A.detach().clone(), "B": layer.B.detach().clone(), "x": x.detach().clone()}
    gradient = torch.zeros_like(values[name])
    for i in range(gradient.numel()):
        around = []
        for step in (epsilon, -epsilon):
            moved = values[name].clone()
            moved.view(-1)[i] += step
            around.append(loss_of(**(values | {name: moved})).item())
        gradient.view(-1)[i] = (around[0] - around[1]) / (2 * epsilon)
    return gradient


for name in by_hand:
    error = relative_error(finite_differences(name), by_hand[name])
    print(f"gradient of {name}: finite differences differ by {error:.0e}")
    assert error < 1e-7

# %% [markdown]
# Look at the two formulas again, and write $\partial L/\partial W = G^\top X$ for the gradient that full fine-tuning
# would use:
#
# $$
# \frac{\partial L}{\partial B} = s\,\frac{\partial L}{\partial W} A^\top, \qquad
# \frac{\partial L}{\partial A} = s\,B^\top \frac{\partial L}{\partial W} .
# $$
#
# LoRA sees the full gradient through two small windows. $B$ learns what the gradient says about the directions that $A$
# reads; $A$ learns what it says about the directions that $B$ writes.

# %%
with torch.no_grad():
    full_gradient = G.T @ x
    torch.testing.assert_close(layer.B.grad, s * full_gradient @ A.T)
    torch.testing.assert_close(layer.A.grad, s * B.T @ full_gradient)

# %% [markdown]
# ### Why $B$ starts at zero, and $A$ does not
#
# * $B = 0$ makes $\Delta W = 0$: training starts from the model we were given, not from a damaged one.
# * With $B = 0$ the gradient of $A$, $s B^\top(\dots)$, is zero at the first step: only $B$ moves. From the second step
#   on, both do.
# * If $A$ were zero as well, the gradient of $B$, $s (\dots)A^\top$, would be zero too, and nothing would ever move.

# %%
fresh = LoRALinear(nn.Linear(7, 5), r=3, alpha=6)
assert torch.equal(fresh(x), fresh.base(x))  # starts as the model we were given

(fresh(x) - target).square().sum().backward()
assert fresh.A.grad.abs().max() == 0
assert fresh.B.grad.abs().max() > 0

stuck = LoRALinear(nn.Linear(7, 5), r=3, alpha=6)
nn.init.zeros_(stuck.A)
(stuck(x) - target).square().sum().backward()
assert stuck.A.grad.abs().max() == 0
assert stuck.B.grad.abs().max() == 0
torch.set_default_dtype(torch.float32)

# %% [markdown]
# ## 5. The scale
#
# What is $s = \alpha/r$ for? It should let you change $r$ without having to look for the learning rate again. Does it?
# Take one step of gradient descent with learning rate $\eta$, from $B = 0$, on one token $x$ with output gradient $g$.
# The formulas above give $B = -\eta\,s\,g\,(Ax)^\top$, so that for this $x$ the output moves by
#
# $$ s\,B A x = -\eta\, s^2\, \lVert Ax \rVert^2\, g . $$
#
# The entries of $A$ are uniform between $\pm 1/\sqrt{\mathrm{in}}$, with variance $1/(3\,\mathrm{in})$, so
# $\lVert Ax \rVert^2 \approx r\,\lVert x \rVert^2 / (3\,\mathrm{in})$: it grows with $r$. So the size of the move goes
# like
#
# $$
# s^2\, r = \begin{cases}
# \alpha^2 / r & \text{with } s = \alpha/r \text{ (LoRA): the larger } r, \text{ the less it learns,} \\
# \alpha^2     & \text{with } s = \alpha/\sqrt r \text{ (rsLoRA): the same for all } r.
# \end{cases}
# $$
#
# This is the argument of rsLoRA (Kalajdzievski 2023, [arXiv 2312.03732](https://arxiv.org/abs/2312.03732)) in its
# smallest form.


# %%
ALPHA = 8
scale = {"α/r": lambda r: ALPHA / r, "α/√r": lambda r: ALPHA / math.sqrt(r)}


def move_after_one_step(r: int, s: float, lr: float = 0.1) -> float:
    layer = LoRALinear(nn.Linear(1024, 16), r=r)
    layer.s = s
    x, g = torch.randn(1, 1024), torch.randn(1, 16)
    before = layer(x)
    before.backward(g)  # g is the gradient with respect to the output
    with torch.no_grad():
        layer.B -= lr * layer.B.grad
        move = layer(x) - before
        expected = -lr * s**2 * (x @ layer.A.T).square().sum() * g
    torch.testing.assert_close(move, expected, rtol=1e-3, atol=1e-4)  # move is a difference: a few digits are lost
    return (move.norm() / g.norm()).item()


ranks = [2**i for i in range(2, 9)]
moves = {
    kind: torch.tensor([[move_after_one_step(r, s(r)) for _ in range(50)] for r in ranks]).mean(1)
    for kind, s in scale.items()
}
for kind, s in scale.items():  # η s² |Ax|² ≈ η s² r |x|² / (3 in), and |x|² ≈ in
    predicted = torch.tensor([0.1 * s(r) ** 2 * r / 3 for r in ranks])
    torch.testing.assert_close(moves[kind], predicted, rtol=0.3, atol=0)  # ≈: means of 50 random draws


def slope(kind: str) -> float:
    """The power of r with which the move grows: the slope of a line through (log r, log move)."""
    log_r, log_move = torch.tensor(ranks).float().log(), moves[kind].log()
    log_r, log_move = log_r - log_r.mean(), log_move - log_move.mean()
    return (log_r @ log_move / log_r.square().sum()).item()


print({kind: f"r to the power {slope(kind):+.2f}" for kind in moves})
assert abs(slope("α/r") + 1) < 0.1
assert abs(slope("α/√r")) < 0.1

# %%
figure, axes = plt.subplots()
for kind, colour, name in (("α/√r", RED, "s = α/√r  (rsLoRA)"), ("α/r", BLUES[2], "s = α/r  (LoRA)")):
    axes.plot(ranks, moves[kind], "o-", color=colour)
    axes.annotate(name, (ranks[2], moves[kind][2] * 1.35), color=colour)
axes.set(xscale="log", yscale="log", xticks=ranks, xlabel="rank r", ylabel="move of the output / |g|")
axes.set(title="How far one step moves the output", ylim=(0.005, 8))
axes.set_xticks(ranks, [str(r) for r in ranks])
axes.minorticks_off()
plt.show()

# %% [markdown]
# ## 6. Merging
#
# $Wx + s\,BAx = (W + s\,BA)\,x$. After training, one addition per layer turns the adapter into an ordinary weight: same
# answers, and nothing extra to compute.

# %%
student = students[4]
merged = student.merge()
assert type(merged) is nn.Linear
assert relative_error(merged(X), student(X)) < 1e-6
torch.testing.assert_close(merged.weight, base.weight + student.s * student.B @ student.A)

# %% [markdown]
# Two warnings. Adding and then subtracting does **not** restore $W$, because both round; keep the original if you want
# to go back (`minilora.unmerge` does). And a coarse format may swallow a small $\Delta W$: bfloat16 keeps 8 binary
# digits, so where a number of $\Delta W$ is less than $1/512$ of that of $W$, adding it changes nothing.

# %%
W = torch.randn(1000, 1000).bfloat16()
small = (W.float().abs() / 600) * torch.randn_like(W.float()).sign()  # 1/600 of each number of W
tenth = 0.1 * torch.randn(1000, 1000)  # a tenth of the size of W

swallowed = ((W.float() + small).bfloat16() == W).float().mean().item()
there_and_back = (((W.float() + tenth).bfloat16().float() - tenth).bfloat16() != W).float().mean().item()
print(f"bfloat16: an update of 1/600 leaves {swallowed:.0%} of the weights as they were")
print(f"bfloat16: adding and subtracting changes {there_and_back:.0%} of the weights for good")
assert swallowed == 1
assert there_and_back > 0.05

# %% [markdown]
# In 4 bits, the format in which QLoRA keeps $W$, it is far worse. Merge, quantize again, and look at what became of
# $\Delta W$: hardly anything that points its way. So minilora merges into the dequantized weight, never back into
# 4 bits.

# %%
from minilora.nf4 import dequantize, quantize  # noqa: E402

W = dequantize(quantize(0.02 * torch.randn(1024, 1024)), torch.float32)  # what the 4 bits stand for
delta = torch.randn(1024, 8) @ torch.randn(8, 1024)
delta *= 5e-4 / delta.square().mean().sqrt()  # rank 8, a fortieth of the size of W

realised = dequantize(quantize(W + delta), torch.float32) - W
cosine = F.cosine_similarity(realised.flatten(), delta.flatten(), dim=0).item()
print(f"NF4: cosine between the change we wanted and the change we got {cosine:.2f}")
assert cosine < 0.1

# %% [markdown]
# ## What to take with you
#
# * $y = Wx + b + s\,BAx$: two thin matrices beside a frozen one, $r(\mathrm{in}+\mathrm{out})$ numbers instead of
#   $\mathrm{in}\cdot\mathrm{out}$.
# * Rank $r$ can reach $\sum_{i>r}\sigma_i^2$ and no less; training gets there.
# * $\partial L/\partial B$ and $\partial L/\partial A$ are the full gradient seen through $A$ and $B$. One of the two
#   must start away from zero; $B = 0$ keeps the start harmless.
# * $s$ decides how fast the adapter learns; with $\alpha/\sqrt r$ it does not depend on the rank.
# * Merged, it is free.
#
# **Try:** Give the toy task ten equal singular values and predict the loss of each rank before you run it. Start with
# $A = 0$ and a random $B$: does it train as well? Adam divides each gradient by its own size; what does that make of
# the argument of section 5, and of its figure?
#
# To use the real thing: `minilora.add_adapter(model, minilora.LoRAConfig(r=16, target_modules="all-linear"))`.
