"""The file of the verdicts: damaged, of another device, locked, or where nothing can be written."""

import fcntl
import json
import logging
from pathlib import Path

import pytest

from minilora.nf4 import kernel_verdicts
from minilora.nf4.kernel_verdicts import Verdicts

DEVICE = {"GPU": "Fake 100", "driver": "1.2", "source": "abc"}


def filled(folder: Path) -> Verdicts:
    verdicts = Verdicts(folder, DEVICE)
    with verdicts.trial("gemv"):
        verdicts.kinds["gemv"] = ""
        verdicts.times["gemv, 64x64"] = {1: (2.5, 3.0)}
    return verdicts


def test_what_is_kept_is_read(tmp_path: Path) -> None:
    filled(tmp_path)
    again = Verdicts(tmp_path, DEVICE)
    assert again.kinds == {"gemv": ""} and again.times == {"gemv, 64x64": {1: (2.5, 3.0)}}
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".lock"}


@pytest.mark.parametrize("part", DEVICE)
def test_another_device_version_or_source_knows_nothing(tmp_path: Path, part: str) -> None:
    path = filled(tmp_path).path
    other = Verdicts(tmp_path, DEVICE | {part: "other"})
    assert other.kinds == {} and other.path != path


CONTENT = {"device": DEVICE, "trying": None, "kinds": {"gemv": ""}, "times": {"gemv, 64x64": {"1": [1.0, 2.0]}}}


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "{",
        "[]",
        "3",
        "\x80\x04\x95K\x01.",  # a pickle
        "[" * 100_000,
        json.dumps(CONTENT)[:-5],
        json.dumps(CONTENT | {"device": DEVICE | {"GPU": "Another"}}),
        json.dumps(CONTENT | {"kinds": ["gemv"]}),
        json.dumps(CONTENT | {"times": {"gemv, 64x64": {"one": [1.0, 2.0]}}}),
        json.dumps(CONTENT | {"times": {"gemv, 64x64": {"1": [1.0]}}}),
        json.dumps(CONTENT | {"times": {"gemv, 64x64": {"1": ["a", "b"]}}}),
        json.dumps(CONTENT | {"times": {"gemv, 64x64": 1}}),
        json.dumps({key: value for key, value in CONTENT.items() if key != "trying"}),
    ],
    ids=lambda text: text[:12] or "empty",
)
def test_a_damaged_or_foreign_file_is_ignored_and_written_anew(tmp_path: Path, damaged: str) -> None:
    path = Verdicts(tmp_path, DEVICE).path
    path.write_text(json.dumps(CONTENT))
    assert Verdicts(tmp_path, DEVICE).kinds == {"gemv": ""}, "this one is taken"
    path.write_text(damaged, encoding="latin-1")
    verdicts = Verdicts(tmp_path, DEVICE)
    assert verdicts.kinds == {} and verdicts.times == {}
    with verdicts.trial("matmul"):
        verdicts.kinds["matmul"] = ""
    assert Verdicts(tmp_path, DEVICE).kinds == {"matmul": ""}


def test_a_trial_begins_with_what_others_have_found(tmp_path: Path) -> None:
    ours, theirs = Verdicts(tmp_path, DEVICE), filled(tmp_path)
    assert ours.kinds == {}
    with theirs.trial("matmul"):
        theirs.kinds["matmul"] = "wrong"
    ours.kinds["matmul"], ours.kinds["backward"] = "", ""
    with ours.trial("backward"):
        assert ours.kinds == {"gemv": "", "matmul": "wrong", "backward": ""}, "what failed anywhere has failed"
        ours.times["gemv, 64x64"][2] = (1.0, 2.0)
    assert Verdicts(tmp_path, DEVICE).times == {"gemv, 64x64": {1: (2.5, 3.0), 2: (1.0, 2.0)}}


def test_the_kind_on_trial_stands_in_the_file(tmp_path: Path) -> None:
    verdicts = Verdicts(tmp_path, DEVICE)
    with pytest.raises(ValueError, match="out of the trial"), verdicts.trial("gemv"):
        assert json.loads(verdicts.path.read_text())["trying"] == "gemv"
        raise ValueError("out of the trial")
    assert json.loads(verdicts.path.read_text())["trying"] is None


def test_a_lock_that_stays_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_verdicts, "LOCK_SECONDS", 0.02)
    verdicts = filled(tmp_path)
    with verdicts.path.with_suffix(".lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="locked by another process"), verdicts.trial("gemv"):
            pytest.fail("the other is in its trial")
    with verdicts.trial("gemv"):
        pass


@pytest.mark.parametrize("what", ["no folder", "no lock", "no file"])
def test_where_nothing_can_be_kept_trials_go_on_and_it_is_said_once(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"

    def impossible(*_: object) -> None:
        raise OSError("not here")

    if what == "no folder":
        folder.write_text("a file")
    elif what == "no lock":
        monkeypatch.setattr(fcntl, "flock", impossible)
    else:
        monkeypatch.setattr(Path, "replace", impossible)
    verdicts = Verdicts(folder, DEVICE)
    for kind in ("gemv", "matmul"):
        with verdicts.trial(kind):
            verdicts.kinds[kind] = ""
    assert verdicts.kinds == {"gemv": "", "matmul": ""}
    (text,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert text.startswith("every process will have to try the NF4 kernels anew: ")
    monkeypatch.undo()
    assert Verdicts(folder, DEVICE).kinds == {}
