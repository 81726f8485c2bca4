import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
from helpers.training import tiny_base

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str, n: int = 0, page: str = "README.md") -> str:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)[n]


@pytest.mark.model
def test_the_example_works_when_pasted(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", block("python")], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    tuned, base = (line.partition(":")[2].strip() for line in done.stdout.splitlines())
    assert tuned == "go" != base
    assert (tmp_path / "first-run/merged/model.safetensors").exists()
    assert (tmp_path / "first-run/adapter/adapter_model.safetensors").exists()


def test_the_example_is_fifteen_lines_or_fewer():
    assert len([line for line in block("python").splitlines() if line.strip()]) <= 15


def test_the_variants_it_shows_can_be_added():
    import minilora as ml

    model = tiny_base(nf4=True)  # as the example above them leaves it
    ml.add_adapter(model, ml.LoRAConfig(r=4, target_modules="all-linear"))
    exec(block("python", 0, "docs/adapters.md"), {"ml": ml, "model": model})
    assert ml.adapter_names(model) == ["default", "dora", "ia3", "pissa"]


def test_your_own_model_can_be_any_module(tmp_path, monkeypatch):
    import torch
    from safetensors.torch import load_file

    import minilora as ml

    class YourModel(torch.nn.Sequential):
        def __init__(self):
            layers = {"encoder": torch.nn.Linear(16, 8), "relu": torch.nn.ReLU(), "head": torch.nn.Linear(8, 2)}
            super().__init__(OrderedDict(layers))

    monkeypatch.chdir(tmp_path)
    exec(
        block("python", 1, "docs/adapters.md"),
        {"ml": ml, "torch": torch, "YourModel": YourModel, "x": torch.randn(4, 16)},
    )
    assert len(load_file("my-adapter/adapter_model.safetensors")) == 4  # A and B of both


def anchors(page: str) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_leads_somewhere(page):
    path = ROOT / page
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            target, _, anchor = link.partition("#")
            assert (path.parent / target).is_file(), link
            assert not anchor or anchor in anchors((path.parent / target).read_text(encoding="utf-8")), link


def test_the_recipe_is_one_the_command_reads(tmp_path):
    from minilora.app.cli import parse

    (tmp_path / "recipe.yaml").write_text(block("yaml", 0, "docs/training.md"), encoding="utf-8")
    command = parse(["train", str(tmp_path / "recipe.yaml"), "--learning-rate", "1e-3"])
    assert command.train.output_dir == "output"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_file_that_is_named_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in re.findall(r"`((?:minilora|kernels|tests|docs|notebooks|benchmarks)/[\w*./]*)`", text):
        assert list(ROOT.glob(name)), name


def test_the_readme_is_short_and_has_a_row_for_every_room():
    assert len(README.splitlines()) <= 150
    for room in (ROOT / "minilora").iterdir():
        assert not (room / "__init__.py").is_file() or f"| `minilora/{room.name}/` |" in README, room


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_commands_that_are_shown_exist(page, capsys):
    from minilora.app.cli import parse

    for line in re.findall(r"^minilora (?!train|demo)(.*)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE):
        parse(line.partition("#")[0].split())
