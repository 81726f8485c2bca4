"""The picture of `python -m benchmarks train`: bars of speed and memory, and every case's losses on each other."""

from collections.abc import Mapping
from typing import Any, Protocol

from benchmarks.measure import Spread
from benchmarks.turns import Trained

COLORS = {
    "PEFT": "0.6",
    "TRL": "C1",
    "Unsloth": "C2",
    "minilora": "C0",
    "minilora, QLoRA": "C4",
    "minilora, transformers' class": "C3",
}
# where losses lie on each other, the later lines are thinner, so that the earlier ones show around them
WIDTHS = {
    "PEFT": 5.0,
    "TRL": 3.0,
    "Unsloth": 2.0,
    "minilora": 1.0,
    "minilora, QLoRA": 1.0,
    "minilora, transformers' class": 0.5,
}
PANELS_A_ROW = 3
INCHES_A_CASE, INCHES_A_PANEL = 0.62, 2.2


class Measured(Protocol):
    """What is drawn of a case."""

    trained: dict[str, Trained]

    def tokens_per_s(self, name: str) -> list[float]: ...
    def ratio(self, name: str) -> Spread: ...


def figure_size(cases: int) -> tuple[float, float]:
    """Width and height in inches that so many cases need."""
    return 13, 1.5 + INCHES_A_CASE * cases + INCHES_A_PANEL * -(-cases // PANELS_A_ROW)


def plot(measured: Mapping[str, Measured], figure: Any) -> None:
    """Bars in the upper half, a row of them for each case; a panel of losses for each case in the lower."""
    rows = -(-len(measured) // PANELS_A_ROW)
    upper, lower = figure.subfigures(2, 1, height_ratios=[1 + INCHES_A_CASE * len(measured), INCHES_A_PANEL * rows])
    speed_axes, memory_axes = upper.subplots(1, 2, sharey=True)
    for y, case in enumerate(measured.values()):
        _bars(speed_axes, memory_axes, y, case)
    speed_axes.set_title("real tokens/s, median and quartiles (times PEFT's)", fontsize=10)
    memory_axes.set_title("peak memory of the process, MiB (of PEFT's)", fontsize=10)
    speed_axes.set_yticks(range(len(measured)), list(measured), fontsize=9)
    speed_axes.invert_yaxis()
    speed_axes.margins(y=0.02)
    for axes in (speed_axes, memory_axes):
        axes.margins(x=0.18)  # room for the numbers
    panels = lower.subplots(rows, min(PANELS_A_ROW, len(measured)), squeeze=False).flat
    for axes, (name, case) in zip(panels, measured.items(), strict=False):
        _losses(axes, name, case)
    for axes in list(panels)[len(measured) :]:
        axes.set_visible(False)
    lines = {line.get_label(): line for axes in lower.axes for line in axes.lines}
    lower.legend(handles=list(lines.values()), loc="outside lower center", ncols=len(lines), fontsize=9)


def _bars(speed_axes: Any, memory_axes: Any, y: int, case: Measured) -> None:
    height = 0.8 / len(case.trained)
    peer = next(iter(case.trained.values())).peak_mb
    for i, (name, trained) in enumerate(case.trained.items()):
        place = y + (i - (len(case.trained) - 1) / 2) * height
        speed = Spread.of(case.tokens_per_s(name))
        whisker = [[speed.median - speed.low], [speed.high - speed.median]]
        speed_axes.barh(place, speed.median, height, xerr=whisker, color=COLORS[name], error_kw={"lw": 0.8})
        memory_axes.barh(place, trained.peak_mb, height, color=COLORS[name])
        label: dict[str, Any] = {"va": "center", "fontsize": 8, "xytext": (4, 0), "textcoords": "offset points"}
        speed_axes.annotate(f"{speed.median:.0f} ({case.ratio(name).median:.2f})", (speed.high, place), **label)
        memory_axes.annotate(f"{trained.peak_mb:.0f} ({trained.peak_mb / peer:.0%})", (trained.peak_mb, place), **label)


def _losses(axes: Any, name: str, case: Measured) -> None:
    for contender, trained in case.trained.items():
        steps = range(1, len(trained.losses) + 1)
        axes.plot(steps, trained.losses, color=COLORS[contender], lw=WIDTHS[contender], label=contender)
    axes.set_title(f"loss: {name}", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True)
