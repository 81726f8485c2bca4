"""How OpenMP's threads wait: settled for the command, before libgomp is loaded; left alone by an import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import minilora as ml
from minilora_start import SPINS, wait_briefly

CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
MAPS = Path("/proc/self/maps")
WITH_LIBGOMP = MAPS.exists() and "libgomp" in MAPS.read_text()


@pytest.fixture
def no_choice(monkeypatch):
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")


def test_the_choice_is_made_once(no_choice, monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "to be removed again after the test")
    del os.environ["GOMP_SPINCOUNT"]
    assert wait_briefly() and os.environ["GOMP_SPINCOUNT"] == SPINS
    assert not wait_briefly()


@pytest.mark.parametrize("name, value", [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7")])
def test_a_users_choice_stays(no_choice, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert not wait_briefly()
    assert {name: os.environ.get(name) for name in CHOICES} == dict.fromkeys(CHOICES) | {name: value}


def test_where_there_is_no_libgomp_nothing_is_set(no_choice, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not wait_briefly() and not set(CHOICES) & set(os.environ)


@pytest.mark.skipif(not WITH_LIBGOMP, reason="this PyTorch has another OpenMP")
@pytest.mark.parametrize(
    "command, spins",
    [
        (["-m", "minilora_start", "--version"], SPINS),
        (["-m", "minilora", "--version"], SPINS),
        (["-c", "import minilora; print('minilora', minilora.__version__)"], None),
    ],
    ids=["minilora", "python -m minilora", "import minilora"],
)
def test_what_libgomp_itself_has_read(command, spins):
    environment = {name: value for name, value in os.environ.items() if name not in CHOICES}
    environment["OMP_DISPLAY_ENV"] = "VERBOSE"  # libgomp then says on stderr, when it is loaded, what it goes by
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"minilora {ml.__version__}\n"
    assert "GOMP_SPINCOUNT" in done.stderr
    last = done.stderr[done.stderr.rindex("GOMP_SPINCOUNT") :].splitlines()[0]
    assert (f"'{SPINS}'" in last) == (spins is not None), last
