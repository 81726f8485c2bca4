"""The one entry point: `python -m benchmarks` lists the benchmarks, `python -m benchmarks train` runs one.

Their peers are in an extra of their own: pip install -e ".[benchmarks]".
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch

from benchmarks.output import print_table, write
from minilora.errors import InputError
from minilora.machine import use_available_cores

# name -> module with `run(rounds, device) -> Result`; that of "train" takes `only` too
BENCHMARKS = {
    "train": "benchmarks.train_step",
    "profile": "benchmarks.profile_step",
    "side-by-side": "benchmarks.side_by_side",
    "merge": "benchmarks.merge",
    "kernels": "benchmarks.nf4_products",
    "gpu": "benchmarks.gpu",
}
RESULTS = Path(__file__).parent / "results"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="minilora beside its peers, in one run")
    parser.add_argument("names", nargs="*", metavar="name", help="benchmarks to run; none: list them")
    parser.add_argument("--rounds", type=int, help="rounds to measure; each runs every contender once")
    parser.add_argument("--only", metavar="TEXT", help="of train: the configurations whose name contains this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON and the plot")
    options = parser.parse_args(argv)
    try:
        run(options)
    except InputError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        sys.exit(2)


def run(options: argparse.Namespace) -> None:
    if not options.names:
        for module in BENCHMARKS.values():
            print((importlib.import_module(module).__doc__ or "").splitlines()[0])
    for name in options.names:
        if name not in BENCHMARKS:
            raise InputError(f"there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    if options.only is not None and options.names != ["train"]:
        raise InputError("--only chooses configurations of 'train', which has to be named alone")
    choice = {} if options.only is None else {"only": options.only}
    use_available_cores()
    for name in options.names:
        result = importlib.import_module(BENCHMARKS[name]).run(options.rounds, torch.device(options.device), **choice)
        paths = write(result, options.output)  # first: whatever cannot be shown, it is kept
        print_table(result)
        for path in paths:
            print(path)


if __name__ == "__main__":
    main()
