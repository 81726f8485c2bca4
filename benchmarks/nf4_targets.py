"""What was aimed for on an H100, and whether the measurements meet it: the worst case of each decides."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

from benchmarks.nf4_cases import Case, Speeds

Times = Mapping[str, list[float]]  # seconds of each contender, in each round


@dataclass(frozen=True)
class Target:
    """`value` of every case that it is about must be `at_least` so much."""

    text: str
    at_least: float
    form: str
    is_about: Callable[[Case], bool]
    value: Callable[[Case, Times, Speeds], float | None]

    def line(self, timed: Mapping[Case, Times], speeds: Speeds) -> str:
        """Met or missed, with the worst case measured."""
        values = {case: self.value(case, times, speeds) for case, times in timed.items() if self.is_about(case)}
        measured = {case: value for case, value in values.items() if value is not None}
        aim = f"{self.text}, at least {self.at_least:{self.form}}"
        if not measured:
            return f"{aim}: not measured"
        worst = min(measured, key=lambda case: measured[case])
        verdict = "met" if measured[worst] >= self.at_least else "missed"
        if len(measured) < len(values):
            verdict = f"{verdict} as far as measured ({len(measured)} of {len(values)} cases)"
        return f"{aim}: {verdict}, {measured[worst]:{self.form}} at worst ({worst}), {self._median(measured)} median"

    def _median(self, measured: Mapping[Case, float]) -> str:
        return f"{median(measured.values()):{self.form}}"


def share_of_roofline(case: Case, times: Times, speeds: Speeds) -> float | None:
    """Time at best over the time taken."""
    return case.seconds_at_best(speeds) / median(times["minilora"]) if "minilora" in times else None


def over_bitsandbytes(case: Case, times: Times, speeds: Speeds) -> float | None:
    """How many times as fast as the faster of bitsandbytes' two ways."""
    theirs = [median(times[name]) for name in ("bitsandbytes", "bitsandbytes, dequantized") if name in times]
    return min(theirs) / median(times["minilora"]) if theirs and "minilora" in times else None


def _is_decode(case: Case) -> bool:
    return case.operation == "forward" and case.M == 1


def _is_product(case: Case, few_rows: bool) -> bool:
    return case.M > 0 and (case.M <= 64) == few_rows


TARGETS = (
    Target(
        "share of the roofline, one row, 70B's matrices (67 M weights and more)", 0.8, ".0%",
        lambda case: _is_decode(case) and case.N * case.K >= 60e6, share_of_roofline,
    ),
    Target(
        "share of the roofline, one row, 8B's MLP", 0.6, ".0%",
        lambda case: _is_decode(case) and case.layer in ("8B gate, up", "8B down"), share_of_roofline,
    ),
    Target(
        "times as fast as bitsandbytes, 1 to 64 rows, forward and backward", 1.2, ".2f",
        lambda case: _is_product(case, few_rows=True), over_bitsandbytes,
    ),
    Target(
        "times as fast as bitsandbytes, more rows, forward and backward", 1.0, ".2f",
        lambda case: _is_product(case, few_rows=False), over_bitsandbytes,
    ),
    Target(
        "share of the roofline, dequantization", 0.85, ".0%",
        lambda case: case.operation == "dequantize", share_of_roofline,
    ),
)  # fmt: skip


def target_lines(timed: Mapping[Case, Times], speeds: Speeds) -> list[str]:
    """A line for each target."""
    return [target.line(timed, speeds) for target in TARGETS]
