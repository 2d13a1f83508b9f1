"""The scales of a KV cache in int8: a file of the bundle, for whoever wants to read such a cache as numbers.

The graph has its own copy and steps need no other.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ... import BundleError
from ..manifest import Contract


def read_scales(path: Path, spec: Contract) -> list[NDArray[np.float32]]:
    """The scales (Hkv, D) of each state of `spec`, in its order.

    Raises:
        BundleError: the file is not readable, or has other states or shapes.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} is not readable: {error}") from error
    scales = [tensors.get(state.input) for state in spec.states]
    for state, found in zip(spec.states, scales, strict=True):
        _, heads, _, dim = state.shape
        if found is None or found.dtype != np.float32 or found.shape != (heads, dim):
            raise BundleError(f"{path} has no float32 scales ({heads}, {dim}) of {state.input}")
    return [found for found in scales if found is not None]
