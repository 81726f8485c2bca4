"""Text of others, where people see it: nothing in it may move the cursor, recolour the screen or turn letters round."""

import re

# C0 but for tab and line feed, DEL, C1; marks that turn the direction of writing; halves of surrogate pairs
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST = 2000  # characters of an error message


def shown(text: str) -> str:
    """The text with its control characters as escapes, such as \\x1b; line ends, tabs and all letters stay."""
    return CONTROL.sub(lambda found: found.group().encode("unicode_escape", "backslashreplace").decode(), text)


def shortened(text: str) -> str:
    """The text, if it is very long with its middle left out."""
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST - 500]} … {len(text) - LONGEST:,} more characters … {text[-500:]}"
