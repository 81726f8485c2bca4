"""Control groups and cores, read from folders like Linux's own, as distributions and containers show them."""

import os

import pytest
import torch

from minilora import machine


@pytest.mark.parametrize(
    "membership, folders",
    [
        pytest.param("0::/\n", [], id="version 2, in a container"),
        pytest.param(
            "0::/user.slice/job.scope\n", ["user.slice/job.scope", "user.slice"], id="version 2, a service or a job"
        ),
        pytest.param("0::/../other\n", [], id="version 2, a group outside the container"),
        pytest.param(
            "4:memory:/docker/7\n3:cpu,cpuacct:/batch/7\n2:cpuset:/x\n0::/\n",
            ["cpu/batch/7", "cpu/batch"],
            id="version 1",
        ),
        pytest.param(None, [], id="no Linux"),
    ],
)
def test_the_groups_around_a_process(monkeypatch, tmp_path, membership, folders):
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "membership")
    if membership is not None:
        (tmp_path / "membership").write_text(membership)
    assert list(machine.group_folders("cpu")) == [tmp_path / name for name in ("", "cpu", *folders)]


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """A machine of 64 cores, and a function that gives a group of it a file."""
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    (tmp_path / "membership").write_text("3:cpu,cpuacct:/outer/inner\n0::/outer/inner\n")

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    return write


@pytest.mark.parametrize(
    "files, cores",
    [
        ({}, 64),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),  # with one thread half a core would be left over
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu.max": "6400000 50000\n"}, 64),  # more than the machine has
        ({"outer/cpu.max": "300000 100000\n", "outer/inner/cpu.max": "max 100000\n"}, 3),
        ({"outer/cpu.max": "300000 100000\n", "outer/inner/cpu.max": "100000 50000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/outer/inner/cpu.cfs_quota_us": "50000\n", "cpu/outer/inner/cpu.cfs_period_us": "50000\n"}, 1),
    ],
)
def test_the_tightest_quota_counts(groups, files, cores):
    for path, text in files.items():
        groups(path, text)
    assert machine.available_cores() == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux can be told the cores")
def test_cores_that_the_process_may_not_run_on_do_not_count():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert machine.available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    "quota, before, environment, after",
    [
        ("100000", 2, {}, 1),
        ("300000", 2, {}, 2),  # fewer threads than cores are somebody's choice
        ("100000", 2, {"OMP_NUM_THREADS": "2"}, 2),
        ("100000", 2, {"MKL_NUM_THREADS": "2"}, 2),
    ],
)
def test_pytorch_has_no_more_threads_than_cores(groups, monkeypatch, quota, before, environment, after):
    groups("cpu.max", f"{quota} 100000\n")
    for name in machine.CHOSEN_BY_THE_USER:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    was = torch.get_num_threads()
    try:
        torch.set_num_threads(before)
        machine.use_available_cores()
        assert torch.get_num_threads() == after
    finally:
        torch.set_num_threads(was)
