"""What the comparison must know of a runtime: one `Peer`, the only thing a file in `peers/` has to define.

To add a runtime: write `peers/NAME.py` with a `PEER`, add it to the list in `peers/__init__.py`, and its pinned
distributions to `requirements.txt`.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from . import UnavailableError
from .worker import Load


@dataclass(frozen=True)
class Sources:
    """What all peers are made from.

    model: the GGUF file. bundle: Zonda's, compiled from it. work: where the peers' inputs are made and kept.
    peers_python: the interpreter of the peers' environment.
    """

    model: Path
    bundle: Path | None
    work: Path
    peers_python: Path

    @cached_property
    def digest(self) -> str:
        """sha256 of the model file."""
        import hashlib

        with self.model.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True)
class Peer:
    """A runtime that takes part.

    name: on the command line, and its file in `peers/`. title: in the report, with its weights' precision.
    distributions: packages that must be installed; the report gives their versions.
    environment: whose interpreter runs it.
    prepare: makes (or finds) what the runtime loads, in the comparing process; UnavailableError leaves the peer out.
    load: runs in the worker.
    """

    name: str
    title: str
    distributions: tuple[str, ...]
    environment: Literal["zonda", "peers"]
    prepare: Callable[[Sources], Path]
    load: Load

    def python(self, sources: Sources) -> Path:
        """The interpreter that runs this peer."""
        return Path(sys.executable) if self.environment == "zonda" else sources.peers_python

    def versions(self, sources: Sources) -> dict[str, str]:
        """Distribution -> version, as installed in the peer's environment.

        Raises:
            UnavailableError: the environment or one of the distributions is missing.
        """
        return installed_versions(self.python(sources), self.distributions)


def disk_mb(model: Path) -> float:
    """Size of what a runtime loads, a file or a folder with everything in it, in MB."""
    files = [file for file in model.rglob("*") if file.is_file()] if model.is_dir() else [model]
    return sum(file.stat().st_size for file in files) / 1e6


def installed_versions(python: Path, distributions: tuple[str, ...]) -> dict[str, str]:
    """Distribution -> version in the environment of an interpreter; UnavailableError if one is missing."""
    if not python.exists():
        raise UnavailableError(f"no interpreter at {python}; `make bench` makes the peers' environment")
    ask = (
        "import importlib.metadata as m, json, sys\n"
        "found = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({name: found.get(name) for name in sys.argv[1:]}))"
    )
    run = subprocess.run([python, "-c", ask, *distributions], capture_output=True, text=True, check=True)
    versions: dict[str, str | None] = json.loads(run.stdout)
    if missing := [name for name, version in versions.items() if version is None]:
        raise UnavailableError(f"not installed for {python}: {', '.join(missing)}")
    return {name: version for name, version in versions.items() if version is not None}
