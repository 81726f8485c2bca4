"""The exception for bad input."""

from minilora.foreign_text import shortened, shown


class InputError(ValueError):
    """Bad input (a file, a key, a row, a value): the message names the thing and the way out in one line.

    The command line prints it without a traceback and exits with code 2. A message may quote what a stranger wrote:
    its control characters are shown as escapes, and it is never longer than some lines.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(shown(shortened(str(message))))
