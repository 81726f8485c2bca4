"""Which folders hold a process's limits, on systems as Linux distributions and containers show them."""

import pytest

from minilora import cgroups


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
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(cgroups, "MEMBERSHIP", tmp_path / "membership")
    if membership is not None:
        (tmp_path / "membership").write_text(membership)
    assert list(cgroups.group_folders("cpu")) == [tmp_path / name for name in ("", "cpu", *folders)]
