"""How the KV cache of a bundle is rounded to int8: `state = code * scale + offset`.

The graph has its own copy, and steps need no other; this is for whoever reads such a cache as numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ... import BundleError
from ..manifest import StateSpec


@dataclass(frozen=True, slots=True)
class StateForm:
    """Of one state tensor. scales, offsets: (Hkv, D) float32; offsets are zeros for keys."""

    scales: NDArray[np.float32]
    offsets: NDArray[np.float32]

    def widen(self, codes: NDArray[np.int8]) -> NDArray[np.float32]:
        """Codes (…, Hkv, length, D) as numbers."""
        return codes * self.scales[:, None] + self.offsets[:, None]

    def narrow(self, states: NDArray[np.floating]) -> NDArray[np.int8]:
        """The codes nearest to numbers (…, Hkv, length, D)."""
        codes: NDArray[np.floating] = np.rint((states - self.offsets[:, None]) / self.scales[:, None])
        return codes.clip(-128, 127).astype(np.int8)


def read_forms(path: Path, states: Sequence[StateSpec]) -> list[StateForm]:
    """The form of each state, in their order.

    Raises:
        BundleError: the file is not readable, or is of other states or shapes.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} is not readable: {error}") from error
    forms = []
    for state in states:
        _, heads, _, dim = state.shape
        scales = tensors.get(f"{state.input}.scales")
        offsets = tensors.get(f"{state.input}.offsets", np.zeros_like(scales) if scales is not None else None)
        for part in (scales, offsets):
            if part is None or part.dtype != np.float32 or part.shape != (heads, dim):
                raise BundleError(f"{path} does not say how {state.input} ({heads}, {dim}) is rounded")
        forms.append(StateForm(scales, offsets))  # type: ignore[arg-type]
    return forms
