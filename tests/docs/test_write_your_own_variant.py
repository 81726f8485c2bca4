"""The guide docs/write_your_own_variant.md does what it says, block by block."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = (Path(__file__).parents[2] / "docs" / "write_your_own_variant.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n# (\S+\.py)\n(.*?)```", GUIDE, re.DOTALL)


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(cwd)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The guide's files, each made of the blocks that name it, in their order."""
    for name, code in BLOCKS:
        with (tmp_path / name).open("a", encoding="utf-8") as file:
            file.write(code)
    return tmp_path


def test_every_block_of_python_names_its_file() -> None:
    assert len(BLOCKS) == GUIDE.count("```python")


def test_the_variant_has_at_most_40_lines() -> None:
    (code,) = [code for name, code in BLOCKS if name == "mora.py"]
    assert len([line for line in code.splitlines() if line.strip()]) <= 40


def test_the_variant_is_the_equation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """compress and expand as the guide writes them, feature by feature."""
    import torch
    from torch import nn

    from minilora.adapters import adapter as registry

    monkeypatch.setattr(registry, "_variants", list(registry._variants))  # what the block registers is gone afterwards
    monkeypatch.syspath_prepend(str(folder))
    import mora

    adapter = mora.MoRA(nn.Linear(23, 14), mora.MoRAConfig(r=1))
    nn.init.normal_(adapter.M)
    x, n = torch.randn(23), 6  # ⌊√(23 + 14)⌋
    compressed = torch.stack([sum(x[k] for k in range(23) if k % n == j) for j in range(n)])
    expanded = torch.stack([(adapter.M @ compressed)[i % n] for i in range(14)])
    torch.testing.assert_close(adapter(x), expanded)
    torch.testing.assert_close(adapter.delta() @ x, expanded)


def test_it_passes_trains_saves_loads_and_merges(folder: Path) -> None:
    done = run("try_mora.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    first, last = (float(loss) for loss in re.findall(r"loss (\S+)", done.stdout))
    assert last < first / 5
    assert (folder / "mora/adapter_model.safetensors").exists()


def test_its_pytest_file_passes(folder: Path) -> None:
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mora.py", cwd=folder)
    assert done.returncode == 0, done.stdout


def test_the_mistake_it_shows_gives_the_message_it_shows(folder: Path) -> None:
    code = (folder / "mora.py").read_text(encoding="utf-8")
    rows = "torch.arange(self.kind.out_features, device=self.M.device) % self.n"
    assert code.count(rows) == 1
    (folder / "mora.py").write_text(code.replace(rows, rows.replace("%", "//")), encoding="utf-8")
    done = run("try_mora.py", cwd=folder)
    (shown,) = re.findall(r"```text\n(AssertionError: .*?)```", GUIDE, re.DOTALL)
    assert " ".join(shown.split()) in " ".join(done.stderr.split())


def test_the_initialisation_passes(folder: Path) -> None:
    done = run("try_row_space.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    (code,) = [code for name, code in BLOCKS if name == "row_space.py"]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
