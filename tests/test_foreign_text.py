"""What strangers wrote never steers a terminal, and an error message is never longer than some lines."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from minilora.errors import InputError
from minilora.foreign_text import shortened, shown


@given(st.text() | st.text(st.sampled_from("\x1b\x9b\r\x07\u202e\u2066\ud83e\x00a\n\t[]0m")))
def test_nothing_shown_steers_a_terminal(text: str) -> None:
    safe = shown(text)
    for character in safe:
        assert character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs")
        assert unicodedata.bidirectional(character) not in (
            "LRE",
            "RLE",
            "PDF",
            "LRO",
            "RLO",
            "LRI",
            "RLI",
            "FSI",
            "PDI",
        )
    safe.encode()  # and it can be printed


def test_text_stays_as_it_is() -> None:
    text = "Zürich 中文 👩\u200d🚀 عربي\tcolumn\nline"
    assert shown(text) == text
    assert shown("\x1b[2J\r\x9b1m\u202egpj.exe\ud83e") == "\\x1b[2J\\x0d\\x9b1m\\u202egpj.exe\\ud83e".replace(
        "\\x0d", "\\r"
    )


def test_long_text_keeps_its_two_ends() -> None:
    assert shortened("x" * 2000) == "x" * 2000
    short = shortened("begin" + "x" * 10**7 + "end")
    assert len(short) < 2100
    assert short.startswith("begin")
    assert short.endswith("end")
    assert "9,998,008 more characters" in short


def test_an_error_message_is_short_and_steers_nothing() -> None:
    error = InputError("the key '" + "\x1b]0;title\x07" * 10**6 + "' is not known")
    assert len(str(error)) < 10_000
    assert "\x1b" not in str(error)
    assert str(error).endswith("is not known")
