"""The verdicts of the kernels' trials, in the user's cache folder: a JSON file for each device.

    device    GPU, driver, torch, Triton and a hash of the kernels' source: a file of another device is ignored
    kinds     kernel, dtype, … -> "" where the kernel is right, else what is wrong with it
    times     the same, and the weight's shape -> rows of x -> microseconds of the kernel and of PyTorch
    trying    the kind on trial, while it is: a process that a kernel kills leaves it in the file

One process at a time is in a trial, and reads the file first. So a `trying` that it finds has killed another process,
and nothing that others have written is lost. A damaged file is written anew.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

LOCK_SECONDS = 60.0  # longer than compiling a kernel's variants takes
logger = logging.getLogger("minilora")


class Verdicts:
    """`kinds` and `times` of one device, in memory and in its file."""

    def __init__(self, folder: Path, device: Mapping[str, str]) -> None:
        self.device = dict(device)
        digest = hashlib.sha256(json.dumps(self.device, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"{digest[:16]}.json"
        self.kinds: dict[str, str] = {}
        self.times: dict[str, dict[int, tuple[float, float]]] = {}
        self._is_kept = True
        self._read()

    @contextmanager
    def trial(self, kind: str) -> Iterator[None]:
        """Inside, `kinds` and `times` are what every process has found so far, and what is added to them is kept.

        Raises TimeoutError if other processes are in their trials for a minute.
        """
        with ExitStack() as stack:
            try:
                if self._is_kept:
                    stack.enter_context(_locked(self.path.with_suffix(".lock")))
            except TimeoutError:
                raise
            except (OSError, ImportError) as error:  # there is no lock to be had
                self._keep_no_longer(error)
            if killer := self._read():
                self.kinds[killer] = (
                    "a process ended while it was on trial; `minilora kernels --clear` lets it try again"
                )
            self._write(trying=kind)
            try:
                yield
            finally:
                self._write()

    def _read(self) -> str | None:
        """Add what the file says to what is known, and return its `trying`."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8")) if self._is_kept else {}
            if found["device"] != self.device:
                return None
            kinds = {str(kind): str(fault) for kind, fault in found["kinds"].items()}
            times = {
                shape: {int(M): (float(kernel), float(pytorch)) for M, (kernel, pytorch) in rows.items()}
                for shape, rows in found["times"].items()
            }
            trying = found["trying"]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        self.kinds = kinds | {kind: fault for kind, fault in self.kinds.items() if fault or kind not in kinds}
        for shape, rows in times.items():
            self.times[shape] = rows | self.times.get(shape, {})
        return None if trying is None else str(trying)

    def _write(self, trying: str | None = None) -> None:
        if not self._is_kept:
            return
        content = {"device": self.device, "trying": trying, "kinds": self.kinds, "times": self.times}
        try:
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(content), encoding="utf-8")
            partial.replace(self.path)
        except OSError as error:
            self._keep_no_longer(error)

    def _keep_no_longer(self, error: Exception) -> None:
        self._is_kept = False
        logger.warning("every process will have to try the NF4 kernels anew: %s", error)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Inside, this process has the lock, unless it dies. Raises TimeoutError, or OSError where there are no locks."""
    import fcntl  # not on Windows

    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + LOCK_SECONDS
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{path} is locked by another process") from None
                time.sleep(0.002)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing would not do while a forked process has the file open
