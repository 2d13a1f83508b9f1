"""The one place that imports TensorRT: `tensorrt` or `tensorrt_rtx`, by name, ready for plugins."""

import importlib
from types import ModuleType
from typing import Literal

from .. import BuildError, ZondaError
from . import soname

Flavour = Literal["tensorrt", "tensorrt_rtx"]

_EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}


def load(flavour: Flavour) -> ModuleType:
    """Import the module; for TensorRT-RTX also make its unversioned library name resolvable (see `soname.py`).

    Raises:
        ZondaError: it is not installed, or cannot be loaded on this host; the message says what to install.
    """
    if flavour not in _EXTRAS:
        raise BuildError(f"{flavour!r} is no TensorRT; choose one of {sorted(_EXTRAS)}")
    try:
        module = importlib.import_module(flavour)
        if flavour == "tensorrt_rtx":
            soname.provide()
    except (ImportError, OSError) as error:
        extra = _EXTRAS[flavour]
        raise ZondaError(f"{flavour} cannot be loaded: {error}; pip install 'zonda[{extra}]'") from error
    return module
