"""Register the plugins with a TensorRT module, and learn afterwards what went wrong inside them."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from .. import BuildError, ZondaError
from .add_rms_norm import AddRmsNorm
from .cubins import CubinLibrary
from .cuda import CudaDriver
from .launcher import Driver, Launcher
from .marker import Marker
from .plugin import NAMESPACE, VERSION, CreatorMethods, Failures, PluginMethods, Surroundings
from .q_rms_norm import QRmsNorm
from .rms_norm import RmsNorm
from .rope import RoPE

PLUGINS: dict[str, type[Marker]] = {marker.name: marker for marker in (RmsNorm, AddRmsNorm, QRmsNorm, RoPE)}
"""Operator name -> marker, of all that have a plugin."""


@dataclass(frozen=True, slots=True)
class Registration:
    """The plugins that TensorRT now finds, by the names in `names`. Keep it as long as an engine uses them."""

    names: tuple[str, ...]
    failures: Failures
    _registry: Any
    _creators: tuple[Any, ...]
    _close: Callable[[], None]

    @contextmanager
    def reporting(self, kind: type[ZondaError] = BuildError) -> Iterator[None]:
        """Around a parse, a build, or an execution: if a plugin failed in it, raise `kind` with the node's name."""
        self.failures.entries.clear()
        yield
        self.failures.check(kind)

    def close(self) -> None:
        """Take the plugins out of TensorRT's registry, and unload the kernels."""
        for creator in self._creators:
            self._registry.deregister_creator(creator)
        self._close()


def register(
    trt: ModuleType,
    library: CubinLibrary,
    names: tuple[str, ...] = tuple(PLUGINS),
    driver: Callable[[], Driver] = CudaDriver,
) -> Registration:
    """Register the plugins, in place of an earlier registration in this process.

    Args:
        trt: `trt.load(…)`.
        library: the kernels of the engines to be built or run.
        names: which markers take their plugin; the others keep their function bodies.
        driver: makes the CUDA driver, when an engine first runs.
    """
    launcher = _Once(lambda: Launcher(library, driver()))
    around = Surroundings(trt, library, launcher.get, Failures())
    plugin, creator_class = _plugin_class(trt), _creator_class(trt)
    registry = trt.get_plugin_registry()
    creators = []
    for name, marker in PLUGINS.items():
        earlier = registry.get_creator(name, VERSION, NAMESPACE)
        if earlier is not None:
            registry.deregister_creator(earlier)
        if name in names:
            creator = creator_class(marker, plugin, around)
            registry.register_creator(creator, NAMESPACE)
            creators.append(creator)
    return Registration(tuple(c.name for c in creators), around.failures, registry, tuple(creators), launcher.close)


class _Once:
    """A launcher that is made when it is first asked for."""

    def __init__(self, make: Callable[[], Launcher]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._made: Launcher | None = None

    def get(self) -> Launcher:
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made

    def close(self) -> None:
        with self._lock:
            if self._made is not None:
                self._made.close()
            self._made = None


@functools.cache
def _plugin_class(trt: Any) -> type[PluginMethods]:
    interfaces = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

    class Plugin(PluginMethods, *interfaces):  # type: ignore[misc]
        bases = interfaces

    return Plugin


@functools.cache
def _creator_class(trt: Any) -> type[CreatorMethods]:
    class Creator(CreatorMethods, trt.IPluginCreatorV3One):  # type: ignore[misc]
        bases = (trt.IPluginCreatorV3One,)

    return Creator
