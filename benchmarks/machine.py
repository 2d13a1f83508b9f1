"""The machine: what it is, and whether anything else is using it."""

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

INSTRUCTION_SETS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
)
"""Of the CPU's flags, those that matrix kernels choose by."""

QUIET_CORES = 0.15
"""More foreign work than this during a run disturbs it; /proc counts in 10 ms, so less cannot be told from none."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the numbers were measured on."""

    cpu: str
    instruction_sets: tuple[str, ...]
    physical_cores: int | None
    logical_cores: int | None
    memory_gb: float
    system: str
    python: str
    load_average: float
    commit: str | None

    @classmethod
    def describe(cls) -> Self:
        """This machine, now."""
        cpuinfo = Path("/proc/cpuinfo")
        fields = _first_processor(cpuinfo.read_text()) if cpuinfo.exists() else {}
        flags = (fields.get("flags") or fields.get("Features") or "").split()
        return cls(
            cpu=_cpu_name(fields),
            instruction_sets=tuple(name for name in INSTRUCTION_SETS if name in flags),
            physical_cores=psutil.cpu_count(logical=False),
            logical_cores=psutil.cpu_count(),
            memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
            system=platform.platform(),
            python=platform.python_version(),
            load_average=os.getloadavg()[0],
            commit=_commit(),
        )

    def __str__(self) -> str:
        sets = ", ".join(self.instruction_sets) or "instruction sets unknown"
        return f"{self.cpu}, {self.logical_cores} logical cores, {self.memory_gb:g} GB; {sets}; {self.system}"


def busy_seconds() -> float:
    """CPU time that all processes, the kernel and (steal) the hypervisor's other guests have used since boot."""
    times = psutil.cpu_times()
    counted = ("user", "nice", "system", "irq", "softirq", "steal")
    return float(sum(getattr(times, name, 0.0) for name in counted))


def wait_until_quiet(limit_s: float, window_s: float = 0.2) -> None:
    """Sleep until other processes leave the machine alone, but not longer than the limit."""
    deadline = time.perf_counter() + limit_s
    while time.perf_counter() < deadline:
        started, busy = time.perf_counter(), busy_seconds()
        time.sleep(window_s)
        if (busy_seconds() - busy) / (time.perf_counter() - started) <= QUIET_CORES:
            return


def _first_processor(cpuinfo: str) -> dict[str, str]:
    pairs = (line.split(":", 1) for line in cpuinfo.split("\n\n", 1)[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _cpu_name(fields: dict[str, str]) -> str:
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields:  # virtual machines hide the marketing name; the family tells the generation
        name += f" (family {fields['cpu family']} model {fields.get('model', '?')})"
    return name


def _commit() -> str | None:
    """The checked-out commit, with a + if tracked files differ from it; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")
