"""How many cores this process may compute on: the CPUs it is allowed, and the quota of its control group.

A container with a quota sees every core of its host, and threads beyond the quota only take each other's time: they
spin while they wait. Linux only; elsewhere the whole machine is there to be used.
"""

import os
from pathlib import Path

_UNLIMITED = ("max", "-1")


def granted_cores(root: Path = Path("/")) -> int | None:
    """Physical cores that this process may use; None if that is the whole machine.

    Args:
        root: where `proc` and `sys` are.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    allowed = os.sched_getaffinity(0)
    physical = len({_core(root, cpu) for cpu in allowed})
    quota = cpu_quota(root)
    restricted = len(allowed) < (os.cpu_count() or 1)
    if quota is not None and quota < physical:
        return max(1, int(quota))  # rounded down: what is above it is throttled, and the others wait for it
    return physical if restricted else None


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs that the control group grants, version 1 or 2; None without a limit.

    Args:
        root: where `proc` and `sys` are.
    """
    limits = [limit for limit in map(_limit, _groups(root)) if limit is not None]
    return min(limits, default=None)


def _groups(root: Path) -> list[Path]:
    """Folders whose limits apply to this process: its group and all above, in each hierarchy that counts CPU time."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders: list[Path] = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        path = top / group.lstrip("/")
        folders += [path, *(parent for parent in path.parents if parent.is_relative_to(top))]
    return folders


def _limit(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / name).read_text().strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
        return None if quota in _UNLIMITED else float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _core(root: Path, cpu: int) -> str:
    """The hardware threads of a CPU's core; where that is not told, each CPU is a core."""
    try:
        return (root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)
