"""Where a value of one graph lies in the words of another: layer, module and marker, also of a fused operator's parts.

Knows names and structure, no numbers.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from .finding import Place
from .network import Network, Value


@dataclass(frozen=True, slots=True)
class Names:
    """Two graphs, and which values they share.

    a, b: the reference and the other. common: names of values that both have, packed ones by the name in `b`.
    members: packed value of `b` -> the values of `a` that it joins.
    """

    a: Network
    b: Network
    common: frozenset[str]
    members: Mapping[str, tuple[str, ...]]

    @property
    def known(self) -> set[str]:
        """The common values by the names of `a`."""
        return {*self.common, *(part for parts in self.members.values() for part in parts)}

    def order(self, name: str) -> int:
        """When `a` computes it."""
        parts = self.members.get(name)
        return self.a.order[name] if parts is None else max(self.a.order[part] for part in parts)

    def marker(self, name: str) -> str:
        """What the definition calls it."""
        return self.a.values[name].marker if name not in self.members else "Linear"


def region(names: Names, name: str) -> list[Value]:
    """The values of `a` from which it makes `name`, back to values that both have."""
    return names.a.computed([name], names.known)


def lost(names: Names, name: str) -> set[str]:
    """What `a` makes a value of and `b` does not, neither itself nor what it is made of in turn."""
    if name in names.members:
        return set()
    known = names.known
    ours = names.b.between([name], names.common)[1]
    ours |= {part for pack in ours for part in names.members.get(pack, ())}

    def replaced(source: str) -> bool:
        parts = names.a.between([source], known - {source})[1]
        return bool(parts) and all(part in ours for part in parts)

    sources = names.a.between([name], known)[1]
    return {s for s in sources if s in names.a.values and s not in ours and not replaced(s)}


def bypassed(names: Names, name: str) -> Value | None:
    """The residual add of `a` that `b` leaves out on the way to `name`."""
    gone = lost(names, name)
    adding = [v for v in region(names, name) if v.marker == "Add" and set(v.sources) & gone]
    unread = [names.a.values[n] for n in sorted(gone) if names.a.values[n].marker == "Add" and not names.b.readers(n)]
    return next(iter(adding + unread), None)


def place(names: Names, name: str, flagged: Collection[str], error: float) -> Place:
    """Where a value lies; of a fused node, the part that its outputs point at.

    Args:
        names: of the two graphs.
        name: of the value.
        flagged: the values that differ.
        error: of the value.
    """
    operators = dict.fromkeys(value.operator for value in names.b.computed([name], names.common))
    if name in names.members:
        value, marker = names.a.values[names.members[name][0]], "Linear"
        module = value.module.rpartition(".")[0]
    else:
        add = bypassed(names, name)
        markers = _markers(names, name, flagged) if add is None else [add.marker]
        value = add or [value for value in region(names, name) if value.marker in markers][-1]
        marker, module = " + ".join(markers), value.module
    return Place(
        tensor=value.name if marker == "Add" else name,
        layer=value.layer,
        module=module,
        marker=marker,
        operator=" + ".join(operators),
        error=error,
    )


def _markers(names: Names, name: str, flagged: Collection[str]) -> list[str]:
    """The markers that can be at fault: those that the node's other outputs also need if they differ too, else not."""
    markers = list(dict.fromkeys(value.marker for value in region(names, name)))
    node = names.b.values[name].node
    for other in names.b.values.values():
        if other.node == node and other.name != name and other.name in names.common:
            theirs = {value.marker for value in region(names, other.name)}
            markers = [m for m in markers if (m in theirs) == (other.name in flagged)] or markers
    return markers
