"""A terminal, for tests of what is shown on one."""

import os
import pty
import sys
import threading

import pytest


class Terminal:
    """Inside the `with`, standard error is a terminal; `text` is what was written there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, columns: int = 80) -> None:
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", str(columns))
        for variable in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(variable, raising=False)

    def __enter__(self) -> "Terminal":
        self._controller, device = pty.openpty()
        self._received: list[bytes] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._before, sys.stderr = sys.stderr, open(device, "w", encoding="utf-8")  # noqa: PTH123 - closed below
        return self

    def _read(self) -> None:
        while True:
            try:
                self._received.append(os.read(self._controller, 4096))
            except OSError:  # EIO: nobody writes there any more
                return

    def __exit__(self, *exception: object) -> None:
        sys.stderr.close()
        sys.stderr = self._before
        self._reader.join()
        os.close(self._controller)

    def text(self) -> str:
        """All that was written, control characters included."""
        return b"".join(self._received).decode()
