import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest

from minilora.errors import InputError
from minilora.formats import fetch
from minilora.formats.fetch import Wheel, wheel_file


@pytest.fixture
def pypi(tmp_path, monkeypatch):
    """A wheel that `pip download` will find: returns it, its pinned description and the list of pip calls made."""
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))
    served = tmp_path / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(served, "w") as archive:
        archive.writestr("toy/data.txt", "hello")
    calls = []

    def pip(command, scratch, came):
        calls.append(command)
        (destination,) = (command[i + 1] for i, word in enumerate(command) if word == "--dest")
        (tmp_path / destination / served.name).write_bytes(served.read_bytes())
        return 0, ""

    monkeypatch.setattr(fetch, "_run", pip)
    members = {"toy/data.txt": hashlib.sha256(b"hello").hexdigest()}
    return served, Wheel("toy", "1.0", hashlib.sha256(served.read_bytes()).hexdigest(), 0.1, members), calls


def test_a_member_is_fetched_once(pypi):
    _, wheel, calls = pypi
    assert wheel_file(wheel, "toy/data.txt").read_text() == "hello"
    assert wheel_file(wheel, "toy/data.txt").read_text() == "hello"
    assert len(calls) == 1


def test_a_truncated_wheel_in_the_cache_is_fetched_again(pypi, tmp_path):
    served, wheel, calls = pypi
    folder = tmp_path / "cache" / "toy-1.0"
    folder.mkdir(parents=True)
    (folder / served.name).write_bytes(served.read_bytes()[:50])
    assert wheel_file(wheel, "toy/data.txt").read_text() == "hello"
    assert len(calls) == 1


@pytest.mark.parametrize("content", ["", "jello"])
def test_a_damaged_member_in_the_cache_is_unpacked_again(pypi, content):
    _, wheel, calls = pypi
    path = wheel_file(wheel, "toy/data.txt")
    path.write_text(content)
    assert wheel_file(wheel, "toy/data.txt").read_text() == "hello"
    assert len(calls) == 1  # the wheel itself is whole


def test_a_pip_in_the_current_folder_is_not_run(pypi, tmp_path, monkeypatch):
    _, wheel, calls = pypi
    wheel_file(wheel, "toy/data.txt")
    (tmp_path / "pip.py").write_text("print('not this one')")
    [command] = calls
    as_fetched = command[: command.index("download")]
    told = subprocess.run([*as_fetched, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert told.startswith("pip ")
    unsafe = subprocess.run([sys.executable, "-m", "pip"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert unsafe.stdout == "not this one\n"


def test_another_file_than_the_pinned_one_is_refused(pypi):
    _, wheel, _ = pypi
    with pytest.raises(InputError, match="SHA-256"):
        wheel_file(replace(wheel, sha256="0" * 64), "toy/data.txt")


def test_a_member_that_is_not_there_is_named(pypi):
    _, wheel, _ = pypi
    with pytest.raises(InputError, match=r"toy==1.0 has no file 'toy/other.txt'"):
        wheel_file(wheel, "toy/other.txt")


def test_no_network_is_one_clear_error(pypi, monkeypatch):
    _, wheel, _ = pypi
    failed = 1, "WARNING: retrying\nERROR: No matching distribution found"
    monkeypatch.setattr(fetch, "_run", lambda *_: failed)
    with pytest.raises(InputError, match=r"toy==1\.0: ERROR: No matching distribution.*check the network"):
        wheel_file(wheel, "toy/data.txt")


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch, tmp_path):
    for name in ("MINILORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(fetch.Path, "home", homeless)
    with pytest.raises(InputError, match="set MINILORA_CACHE to a folder"):
        fetch.cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch.cache_folder() == tmp_path / "minilora"
