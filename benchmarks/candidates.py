"""Who is to take part: the runtimes that were asked for, Zonda once a bundle, and what each of them loads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import BenchmarkError, UnavailableError
from .peer import Peer, Sources
from .peers import PEERS
from .starts import Participant


@dataclass(frozen=True, slots=True)
class Candidate:
    """A runtime that was asked for, under the name that it has in this comparison, and what it is made from."""

    name: str
    title: str
    peer: Peer
    sources: Sources


@dataclass(frozen=True, slots=True)
class Field:
    """Who takes part, with which versions, and why the others do not."""

    participants: list[Participant]
    versions: dict[str, dict[str, str]]
    skipped: dict[str, str]


def candidates(names: Sequence[str], sources: Sources, bundles: Sequence[Path]) -> list[Candidate]:
    """The runtimes in the order asked for. Of several bundles each takes part under its folder's name.

    Raises:
        BenchmarkError: an unknown runtime, or two of one name.
    """
    found: list[Candidate] = []
    for name in names:
        if name not in PEERS:
            raise BenchmarkError(f"unknown runtime {name!r}; known: {', '.join(PEERS)}")
        peer = PEERS[name]
        if name == "zonda" and len(bundles) > 1:
            found += [Candidate(b.name, f"{peer.title} {b.name}", peer, replace(sources, bundle=b)) for b in bundles]
        elif name == "zonda" and bundles:
            found.append(Candidate(name, peer.title, peer, replace(sources, bundle=bundles[0])))
        else:
            found.append(Candidate(name, peer.title, peer, sources))
    called = [one.name for one in found]
    if twice := sorted({name for name in called if called.count(name) > 1}):
        raise BenchmarkError(
            f"two runtimes are called {twice[0]!r}: ask once for each, and name bundles' folders apart"
        )
    return found


def prepare(wanted: Sequence[Candidate], progress: Callable[[str], None] = lambda _: None) -> Field:
    """Make what the runtimes load.

    Raises:
        BenchmarkError: nobody can take part, or a conversion failed.
    """
    field = Field([], {}, {})
    for one in wanted:
        progress(f"prepare {one.name}")
        try:
            versions = one.peer.versions(one.sources)
            model = one.peer.prepare(one.sources)
        except UnavailableError as reason:
            field.skipped[one.name] = str(reason)
            continue
        field.versions[one.name] = versions
        command = (one.peer.python(one.sources), "-m", "benchmarks.worker", one.peer.name)
        field.participants.append(Participant(one.name, one.title, command, model))
    if not field.participants:
        reasons = "\n".join(f"{name}: {why}" for name, why in field.skipped.items())
        raise BenchmarkError(f"no runtime can take part:\n{reasons}")
    return field
