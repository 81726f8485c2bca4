import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
from helpers.training import tiny_base

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str, n: int = 0) -> str:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)[n]


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
    exec(block("python", 1), {"ml": ml, "model": model})
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
    exec(block("python", 2), {"ml": ml, "torch": torch, "YourModel": YourModel, "x": torch.randn(4, 16)})
    assert len(load_file("my-adapter/adapter_model.safetensors")) == 4  # A and B of both


def anchors(page: str) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            target, _, anchor = link.partition("#")
            assert (page.parent / target).is_file(), link
            assert not anchor or anchor in anchors((page.parent / target).read_text(encoding="utf-8")), link


def test_the_recipe_is_one_the_command_reads(tmp_path):
    from minilora.app.cli import parse

    (tmp_path / "recipe.yaml").write_text(block("yaml"), encoding="utf-8")
    command = parse(["train", str(tmp_path / "recipe.yaml"), "--learning-rate", "1e-3"])
    assert command.train.output_dir == "output"


def test_every_file_on_the_map_exists():
    for name in re.findall(r"`((?:minilora|tests|notebooks|benchmarks)/[\w*./]*)`", README):
        assert list(ROOT.glob(name)), name


def test_the_commands_it_shows_exist(capsys):
    from minilora.app.cli import parse

    for line in re.findall(r"^minilora (?!train|demo)(.*)$", README, re.MULTILINE):
        parse(line.partition("#")[0].split())
