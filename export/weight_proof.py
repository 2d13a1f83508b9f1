"""Proof of the weights: the bytes that a bundle's graphs point at are the checkpoint's, dequantised.

A wrong weight moves logits by little, and the gate on logits has a tolerance; bytes have none.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from torch import Tensor

from .. import ParityError
from ..runtime.manifest import WeightReport
from .onnx_files import DIRECTORY, LOWERED, PREFILL, UNIVERSAL, as_stored

Places = dict[str, tuple[int, int]]

_TOGETHER = 1 << 24  # values compared at once: the checks of a large tensor need no second and third copy of it


class WrittenWeights:
    """The weight file of an unfinished bundle, and where its graphs say that each initialiser lies."""

    def __init__(self, staging: Path, packs: Mapping[str, Sequence[str]], derived: Collection[str] = ()) -> None:
        """Read the graphs.

        Args:
            staging: the unfinished bundle.
            packs: packed initialiser of a lowered graph -> its members.
            derived: initialisers that only a lowered graph has.

        Raises:
            ParityError: the graphs do not point at the same bytes.
        """
        self._places, self._file = _places(staging / UNIVERSAL)
        self._path = staging / DIRECTORY / self._file
        own: Places = {}
        for graph in (LOWERED, PREFILL):
            if (staging / graph).is_file():
                lowered, file = _places(staging / graph)
                own |= {name: place for name, place in lowered.items() if name in derived and file == self._file}
                self._require_same(graph, {n: p for n, p in lowered.items() if n not in own}, file, packs)
        if missing := set(derived) - set(own):
            raise ParityError(f"no graph in {self._file} has the weight {min(missing)}, which one was lowered with")
        self._places = self._places | own
        self._left = set(self._places)
        self._compared = 0

    def _require_same(self, graph: str, lowered: Places, file: str, packs: Mapping[str, Sequence[str]]) -> None:
        """Raise unless a lowered graph's weights lie where the universal graph's do."""
        for name, place in lowered.items():
            members = [self._places.get(member, (-1, 0)) for member in packs.get(name, (name,))]
            ends = [start + size for start, size in members]
            joined = (members[0][0], sum(size for _, size in members))
            if file != self._file or place != joined or ends[:-1] != [start for start, _ in members[1:]]:
                raise ParityError(f"{graph}: the weight {name} does not point at the bytes that {UNIVERSAL} has")

    def check(self, name: str, tensor: Tensor) -> None:
        """Compare an initialiser with what the checkpoint holds, once; names that no graph has are passed.

        Raises:
            ParityError: they differ; the message says where and how much.
        """
        if name not in self._left:
            return
        start, size = self._places[name]
        flat = tensor.reshape(-1)
        done = 0
        for begin in range(0, flat.numel(), _TOGETHER):
            want = as_stored(flat[begin : begin + _TOGETHER])
            data = np.fromfile(self._path, np.uint8, min(want.nbytes, size - done), offset=start + done)
            if not np.array_equal(data, want.view(np.uint8)):
                place = _difference(data, want, begin, tuple(tensor.shape))
                raise ParityError(f"{DIRECTORY}/{self._file}: {name} is not the checkpoint's: {place}")
            done += want.nbytes
        if done != size:
            raise ParityError(f"{DIRECTORY}/{self._file}: {name} has {size:,} bytes, the checkpoint's {done:,}")
        self._left.remove(name)
        self._compared += size

    def finish(self, load: Callable[[str], Tensor]) -> WeightReport:
        """Compare whatever has not been compared yet; report.

        Raises:
            ParityError: as of `check`.
        """
        for name in sorted(self._left):
            self.check(name, load(name))
        return WeightReport(tensors=len(self._places), bytes=self._compared)


def _places(path: Path) -> tuple[Places, str]:
    """(offset, length) of each external initialiser, and the one file that they are in."""
    places: Places = {}
    files = set()
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            places[tensor.name] = int(entries["offset"]), int(entries["length"])
            files.add(entries["location"])
    (file,) = files
    return places, file


def _difference(data: np.ndarray, want: np.ndarray, start: int, shape: tuple[int, ...]) -> str:
    """What differs in a part of a tensor of `shape` that begins at its element `start`."""
    if data.size != want.nbytes:
        return "it is cut off"
    found = data.view(want.dtype)
    different = np.flatnonzero(found != want)
    if not len(different):  # the same numbers in other bytes
        different = np.flatnonzero((data != want.view(np.uint8)).reshape(len(want), -1).any(1))
    first = int(different[0])
    index = [int(i) for i in np.unravel_index(start + first, shape)]
    return (
        f"{len(different):,} of {len(want):,} values differ, first at {index}: {found[first]:.6g} instead of "
        f"{want[first]:.6g}"
    )
