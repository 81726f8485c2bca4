"""Files that are there whole or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` at the end, unless an exception comes before.

    It lies inside `folder`, so on the same file system, where each move is one atomic rename.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as temporary:
            yield Path(temporary)
            for file in sorted(Path(temporary).rglob("*")):
                target = folder / file.relative_to(temporary)
                if file.is_dir():
                    target.mkdir(exist_ok=True)
                else:
                    file.replace(target)
    except BaseException:
        if is_new:
            with suppress(OSError):  # another process may have written there meanwhile
                folder.rmdir()
        raise
