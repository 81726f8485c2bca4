"""The roofline plot of the benchmark `kernels`."""

from collections.abc import Mapping
from statistics import median
from typing import Any

from benchmarks.nf4_cases import Case, Operation, Speeds
from benchmarks.nf4_targets import Times

COLOURS = {"minilora": "C3", "bitsandbytes": "C0", "bitsandbytes, dequantized": "C9", "dense": "C7",
           "Unsloth": "C2", "gemlite, affine int4": "C4", "fused kernel": "C1", "one-pass + cuBLAS": "C8",
           "one-pass kernel": "C1", "plain PyTorch": "C5", "fused, other table": "C6"}  # fmt: skip
# of minilora, which takes the faster: thin lines
PARTS = ("fused kernel", "fused, other table", "one-pass + cuBLAS", "one-pass kernel")


def plot(timed: Mapping[Case, Times], speeds: Speeds, figure: Any) -> None:
    """Above forward, below backward: operations a second over M for three shapes; at the right dequantization."""
    dtype = next(iter(timed)).dtype  # the first is enough to look at; the table has all
    timed = {case: times for case, times in timed.items() if case.dtype == dtype}
    products = {case: times for case, times in timed.items() if case.M}
    layers = _three(products)
    grid = figure.add_gridspec(2, len(layers) + 1)
    operations: tuple[Operation, ...] = ("forward", "backward")
    for row, operation in enumerate(operations):
        for column, layer in enumerate(layers):
            chosen = {c: t for c, t in products.items() if (c.layer, c.operation) == (layer, operation)}
            axes = figure.add_subplot(grid[row, column])
            _roofline(axes, chosen, speeds)
            axes.set(xlabel="M, rows of x" if row else None, ylabel=None if column else "TFLOP/s")
    _bandwidth(figure.add_subplot(grid[:, -1]), {c: t for c, t in timed.items() if c.operation == "dequantize"}, speeds)
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        new = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        handles = new | handles  # a line, rather than the bar of the same name
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=8)


def _three(timed: Mapping[Case, Times]) -> list[str]:
    """The smallest, the middle and the largest matrix of those that were timed."""
    layers = [case.layer for case in sorted(timed, key=lambda case: case.N * case.K)]
    unique = list(dict.fromkeys(layers))
    return list(dict.fromkeys([unique[0], unique[len(unique) // 2], unique[-1]])) if unique else []


def _roofline(axes: Any, timed: Mapping[Case, Times], speeds: Speeds) -> None:
    """Operations a second over M, below what bandwidth and arithmetic allow."""
    if not timed:
        return
    rows = [case.M for case in timed]
    roof = [case.operations / case.seconds_at_best(speeds) / 1e12 for case in timed]
    axes.plot(rows, roof, color="black", linewidth=2.5, label="roofline, NF4")
    axes.fill_between(rows, roof, [10 * max(roof)] * len(roof), color="black", alpha=0.06)
    names = dict.fromkeys(name for times in timed.values() for name in times)
    for name in sorted(names, key=lambda name: name == "minilora"):  # ours on top
        points = [(c.M, c.operations / median(t[name]) / 1e12) for c, t in timed.items() if name in t]
        thick = 2.0 if name == "minilora" else 0.8 if name in PARTS else 1.3
        style = "--" if name in PARTS else "-"
        line = {"color": COLOURS[name], "linewidth": thick, "label": name}
        axes.plot(*zip(*points, strict=True), style, marker=".", **line)
    case = next(iter(timed))
    axes.set(xscale="log", yscale="log", ylim=(None, 2 * max(roof)))
    axes.set_xticks(rows, [str(M) for M in rows], fontsize=7, rotation=45 if len(rows) > 6 else 0)
    axes.minorticks_off()
    axes.set_title(f"{case.layer}, {case.N}x{case.K}: {case.operation}", fontsize=9)
    axes.grid(alpha=0.25)


def _bandwidth(axes: Any, timed: Mapping[Case, Times], speeds: Speeds) -> None:
    """A bar for each shape and contender, beside the bandwidth."""
    names = list(dict.fromkeys(name for times in timed.values() for name in times if name not in PARTS))
    for i, name in enumerate(names):
        values = [case.bytes / median(t[name]) / 1e9 if name in t else 0.0 for case, t in timed.items()]
        y = [n + (i - (len(names) - 1) / 2) * 0.8 / len(names) for n in range(len(values))]
        axes.barh(y, values, height=0.8 / len(names), color=COLOURS[name], label=name)
    axes.axvline(speeds.bytes_per_s / 1e9, color="black", linewidth=2.5)
    axes.set_yticks(range(len(timed)), [case.layer for case in timed], fontsize=8)
    axes.invert_yaxis()
    axes.set_title("dequantization; black: bandwidth of a copy", fontsize=9)
    axes.set(xlabel="GB/s")
