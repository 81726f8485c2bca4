"""The exception for bad input."""


class InputError(ValueError):
    """Bad input (a file, a key, a row, a value): the message names the thing and the way out in one line.

    The command line prints it without a traceback and exits with code 2.
    """
