"""The start of the `minilora` command: what has to be settled before PyTorch is imported, which `import minilora` does.

PyTorch's wheels for Linux bring libgomp. Its threads meet at the end of every parallel loop, some hundred times in a
pass, and who comes first spins: 300,000 turns of a loop, some milliseconds, before it falls asleep. That is right
where every thread has a core. Where two processes share the cores, the one that spins takes its time from the one it
waits for. The number of turns is read once, when the library is loaded (docs/benchmarks.md#two-trainings-side-by-side).
"""

import os
import sys

SPINS = "1000"


def wait_briefly() -> bool:
    """Let OpenMP's threads spin for a short while only: call it before torch is imported.

    True if that changed something. Not where libgomp is not (outside Linux), nor where the user has chosen, in
    OMP_WAIT_POLICY or GOMP_SPINCOUNT.
    """
    if sys.platform != "linux" or "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return False
    os.environ["GOMP_SPINCOUNT"] = SPINS
    return True


def main() -> None:
    """Run the command that `sys.argv` names."""
    wait_briefly()
    from minilora.app import main as run
    from minilora.machine import use_available_cores

    use_available_cores()
    run()


if __name__ == "__main__":
    main()
