"""Files as they are, or as .gz and .zst unpack them: piece by piece, and never a part for the whole."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from minilora.errors import InputError

SUFFIXES = (".gz", ".zst")
PIECE = 4096  # packed bytes at a time: zstd makes up to 32,000 times as many of them


@contextmanager
def open_unpacked(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked if its name says so; what goes wrong while they are read is an InputError."""
    try:
        with _opened(path) as file:
            yield file
    except EOFError as error:
        raise InputError(f"{path}: ends in the middle of the archive; copy or download it again") from error
    except (zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: a damaged archive, or none ({error}); copy or download it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _opened(path: Path) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(_Zstandard(path)))
    return path.open("rb")


class _Zstandard(io.RawIOBase):
    """A .zst file of one or more frames; zstandard's own reader takes one that was cut off for a whole one."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise InputError(f"{path}: .zst needs a package more: pip install zstandard") from error
        self.zstandard: Any = zstandard
        self.file = path.open("rb")
        self.frame: Any = None  # None between two frames
        self.packed, self.unpacked = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self.unpacked:
            packed = self.packed or self.file.read(PIECE)
            if not packed and self.frame is not None:
                raise EOFError
            if not packed:
                return 0
            self._unpack(packed)
        n = min(len(buffer), len(self.unpacked))
        buffer[:n], self.unpacked = self.unpacked[:n], self.unpacked[n:]
        return n

    def _unpack(self, packed: bytes) -> None:
        self.frame = self.frame or self.zstandard.ZstdDecompressor().decompressobj()
        try:
            self.unpacked = memoryview(self.frame.decompress(packed))
        except self.zstandard.ZstdError as error:
            raise zlib.error(str(error)) from error
        self.packed = self.frame.unused_data
        if self.frame.eof:
            self.frame = None
