"""The guide docs/many_adapters.md: its code blocks are one program, which prints what the comments say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from minilora.adapters.combine import METHODS

GUIDE = (Path(__file__).parents[2] / "docs" / "many_adapters.md").read_text(encoding="utf-8")


@pytest.mark.model
def test_the_program_prints_what_its_comments_say(tmp_path: Path) -> None:
    program = "".join(re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL))
    expected = re.findall(r"^ *print\(.*\)  # (.*)$", program, re.MULTILINE)
    assert len(expected) == program.count("print(")
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", program], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == expected
    assert (tmp_path / "mostly_german" / "adapter_model.safetensors").exists()


def test_the_table_has_every_method() -> None:
    cells = re.findall(r"^\| (`[a-z_`, ]+) \|", GUIDE, re.MULTILINE)
    assert sorted(name for cell in cells for name in re.findall(r"`(\w+)`", cell)) == sorted(METHODS)
