"""The house: a room's `__init__` is its door, and says what the room is for. Its order is import-linter's to check."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import minilora

ROOT = Path(minilora.__file__).parent
ROOMS = sorted(path.parent for path in ROOT.rglob("__init__.py") if path.parent != ROOT)


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=module)
def test_what_is_another_room_s_comes_through_its_door(file: Path) -> None:
    """That is `from minilora.room import name`; from inside only what lies in the same room, or in one around it."""
    here = module(file) if file.name == "__init__.py" else module(file).rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minilora."):
            name = node.module or ""
            path = ROOT.parent.joinpath(*name.split("."))
            room = name.rpartition(".")[0]
            is_inside = path.with_suffix(".py").is_file() and room != "minilora"
            assert not is_inside or f"{here}.".startswith(f"{room}."), f"line {node.lineno}: {name}"


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_door_says_what_the_room_is_for_and_what_to_read_first(room: Path) -> None:
    docstring = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert "Read " in docstring
    for name in re.findall(r"[\w/]+\.py\b", docstring):
        assert (room / name).is_file() or (ROOT / name).is_file() or (ROOT / room.parent / name).is_file(), name


def test_import_minilora_needs_torch_numpy_and_safetensors_alone(tmp_path: Path) -> None:
    """The other dependencies are imported by what needs them."""
    others = ["tokenizers", "huggingface_hub", "jinja2", "gguf", "rich", "tyro", "yaml", "matplotlib", "triton"]
    others += ["transformers", "peft", "bitsandbytes", "pytest", "pandas", "pyarrow", "datasets", "zstandard"]
    program = f"import sys; sys.modules |= dict.fromkeys({others}); import minilora"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_kernels_import_the_codec_and_the_ground_alone() -> None:
    """They lie under nf4, whose dispatch.py loads them; import-linter does not see them, in a folder of their own."""
    for file in (ROOT.parent / "kernels" / "nf4").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minilora"):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                allowed = ("minilora.kernels", "minilora.nf4.codec", "minilora.errors")
                assert all(name.startswith(allowed) for name in names), f"{file.name}: {names}"
