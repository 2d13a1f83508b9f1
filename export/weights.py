"""Weights of a bundle: one file, written once, read by every ONNX graph of the bundle.

A layout gives each initialiser a byte range. A lowered graph may use several neighbours as one tensor (q, k and v
packed): packs are laid out without gaps, and the pack and its members are ranges over the same bytes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

_ALIGNMENT = 64  # cache line; runtimes map the file, so a tensor's address is as aligned as its offset

Packs = Mapping[str, Sequence[str]]
"""Name of a packed initialiser -> its members, in the order of their rows."""


@dataclass(frozen=True, slots=True)
class Layout:
    """offsets: initialiser (member or pack) -> (offset, length) in bytes. size: of the whole file."""

    offsets: Mapping[str, tuple[int, int]]
    size: int


def plan_layout(model: ir.Model, packs: Packs, derived: Iterable[ir.Value] = ()) -> Layout:
    """Lay out every initialiser of `model` that has no data, in graph order, members of a pack side by side.

    Args:
        model: the universal graph.
        packs: of the lowered graphs.
        derived: initialisers that only a lowered graph has; they lie behind all others.
    """
    pack_of = {members[0]: (name, members) for name, members in packs.items()}
    followers = {member for members in packs.values() for member in members[1:]}
    offsets: dict[str, tuple[int, int]] = {}
    end = 0
    for name in missing_data(model):
        if name in followers:
            continue
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        pack, members = pack_of.get(name, (None, (name,)))
        end = start
        for member in members:
            length = nbytes(model.graph.initializers[member])
            offsets[member] = (end, length)
            end += length
        if pack is not None:
            offsets[pack] = (start, end - start)
    for value in derived:
        start, length = -(-end // _ALIGNMENT) * _ALIGNMENT, nbytes(value)
        offsets[str(value.name)] = (start, length)
        end = start + length
    return Layout(offsets, end)


def missing_data(model: ir.Model) -> list[str]:
    """Names of the initialisers that wait for data, in graph order."""
    return [name for name, value in model.graph.initializers.items() if value.const_value is None]


def nbytes(value: ir.Value) -> int:
    """Bytes of an initialiser with a static shape."""
    if value.shape is None or value.dtype is None:
        raise AssertionError(f"initialiser {value.name} has no type")
    return int(-(-int(np.prod(value.shape.numpy(), dtype=np.int64)) * value.dtype.bitwidth // 8))


def write_weights(
    path: Path,
    layout: Layout,
    names: Iterable[str],
    load: Callable[[str], np.ndarray],
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Stream tensors into the file one by one; peak memory is the largest tensor.

    Args:
        path: the file to create.
        layout: from `plan_layout`.
        names: the initialisers to write; packs need not be among them.
        load: name -> C-contiguous array whose bytes are the initialiser's.
        progress: called with the bytes written since the last call.

    Raises:
        OSError: the disk is full, or the path cannot be written.
    """
    with path.open("xb") as file:
        file.truncate(layout.size)
        for name in names:
            offset, length = layout.offsets[name]
            data = load(name).reshape(-1).view(np.uint8).data
            if len(data) != length:
                raise AssertionError(f"{name}: {len(data)} bytes for a place of {length}")
            file.seek(offset)
            file.write(data)
            progress(length)


def attach(model: ir.Model, layout: Layout, location: str) -> None:
    """Point every initialiser that waits for data at its range of the file `location`, relative to the model file."""
    for name in missing_data(model):
        value = model.graph.initializers[name]
        if value.dtype is None or value.shape is None:
            raise AssertionError(f"initialiser {name} has no type")
        offset, length = layout.offsets[name]
        value.const_value = ir.ExternalTensor(
            location, offset, length, value.dtype, shape=ir.Shape(value.shape.numpy()), name=name
        )
