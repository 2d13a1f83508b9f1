"""The cores that a process may use, from fakes of /proc and /sys."""

import os

import pytest

from zonda.runtime.engines import ort_session
from zonda.runtime.engines.cpu_threads import cpu_quota, granted_cores


def write(root, files: dict[str, str]):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def topology(siblings: list[str]) -> dict[str, str]:
    return {
        f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{text}\n"
        for cpu, text in enumerate(siblings)
    }


FOUR_CORES = topology(["0,4", "1,5", "2,6", "3,7"] * 2)


@pytest.fixture
def machine(monkeypatch):
    """Says which CPUs there are and which of them are allowed."""

    def set_up(allowed, count=8):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(allowed))
        monkeypatch.setattr(os, "cpu_count", lambda: count)

    return set_up


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        (
            {
                "proc/self/cgroup": "0::/pods/a/b\n",
                "sys/fs/cgroup/pods/a/b/cpu.max": "max 100000\n",
                "sys/fs/cgroup/pods/a/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/pods/cpu.max": "400000 100000\n",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/docker/1\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        # A container's own view: the group's path is that of the host, its limits lie at the top.
        ({"proc/self/cgroup": "0::/docker/abc\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3.0),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 0\n"}, None),
        ({"proc/self/cgroup": "5:memory:/x\n", "sys/fs/cgroup/memory/x/cpu.max": "100000 100000\n"}, None),
    ],
)
def test_the_tightest_quota_of_the_groups_counts(tmp_path, files, quota):
    assert cpu_quota(write(tmp_path, files)) == quota


def test_the_whole_machine_is_left_to_the_runtime(tmp_path, machine):
    machine(range(8))
    assert granted_cores(write(tmp_path, FOUR_CORES)) is None


@pytest.mark.parametrize(("allowed", "cores"), [([0, 4], 1), ([0, 1, 2, 3], 4), ([0, 1, 4], 2), (range(7), 4)], ids=str)
def test_of_allowed_cpus_each_core_counts_once(tmp_path, machine, allowed, cores):
    machine(allowed)
    assert granted_cores(write(tmp_path, FOUR_CORES)) == cores


def test_without_a_topology_each_cpu_is_a_core(tmp_path, machine):
    machine([0, 4])
    assert granted_cores(tmp_path) == 2


@pytest.mark.parametrize(("quota", "cores"), [("250000", 2), ("50000", 1), ("400000", None), ("350000", 3)])
def test_a_quota_below_the_cores_counts_rounded_down(tmp_path, machine, quota, cores):
    machine(range(8))
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{quota} 100000\n"}
    assert granted_cores(write(tmp_path, FOUR_CORES | files)) == cores


def test_a_system_without_affinity_is_left_to_the_runtime(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert granted_cores(tmp_path) is None


@pytest.mark.parametrize(("threads", "granted", "used"), [(None, None, 0), (None, 3, 3), (2, 3, 2), (5, None, 5)])
def test_a_session_takes_what_was_asked_for_or_what_is_granted(tiny_bundle, monkeypatch, threads, granted, used):
    monkeypatch.setattr(ort_session, "granted_cores", lambda: granted)
    session = ort_session.open_session(tiny_bundle / "onnx/onnxruntime.onnx", threads, "cpu")
    assert session.get_session_options().intra_op_num_threads == used
