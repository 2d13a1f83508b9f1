"""The process in which TensorRT builds: `python -m zonda.export.tensorrt_worker REQUEST REPORT`.

It knows neither torch nor models: it parses one ONNX file, builds one plan, and holds both to what was asked for.
"""

import mmap
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

import msgspec
import numpy as np

from .. import BuildError, ZondaError
from ..plugins_trt import CubinLibrary, load, register
from ..plugins_trt.cuda import CudaDriver
from ..plugins_trt.registry import Registration
from .tensorrt_request import Profile, Report, Request


class Log:
    """TensorRT's messages: all in a file as they come, warnings and errors also kept, each once.

    folder: of the graph; the bundle keeps the file, and should not tell where on the build host it was built.
    """

    def __init__(self, trt: ModuleType, file: TextIO, folder: Path) -> None:
        self.warnings: list[str] = []
        self.errors: list[str] = []
        self.messages: list[str] = []
        kept = {trt.ILogger.WARNING: self.warnings}
        kept |= {trt.ILogger.ERROR: self.errors, trt.ILogger.INTERNAL_ERROR: self.errors}

        outer = self

        class Logger(trt.ILogger):  # type: ignore[misc,name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity == trt.ILogger.VERBOSE:
                    return
                message = message.replace(f"{folder}/", "")
                file.write(f"{severity.name}: {message}\n")
                file.flush()  # the process may die at the next message
                outer.messages.append(message)
                words = in_words(message)
                if severity in kept and words and words not in kept[severity]:
                    kept[severity].append(words)

        self.logger = Logger()

    def sizes(self, title: str) -> list[int]:
        """The bytes of every message `TITLE: N bytes`, in order."""
        found = (re.fullmatch(rf"{title}: (\d+) bytes", message) for message in self.messages)
        return [int(match[1]) for match in found if match]


def in_words(message: str) -> str:
    """A message without the place in TensorRT's source; empty if it says what is meant to be so.

    Token ids and positions are int64, and a model need not read every input of the contract.
    """
    words = re.sub(r"^\w+\.cpp:\d+: ", "", message)
    expected = re.search(
        r"^Make sure input \w+ has Int64 binding|^Unused Input: |is unused or used only at compile", words
    )
    return "" if expected else words


def build(trt: ModuleType, request: Request, log: Log) -> Report:
    """Parse, build, check.

    Raises:
        BuildError: with TensorRT's own words, or what is missing in the plan.
    """
    started = time.perf_counter()
    library = CubinLibrary.from_bytes(Path(request.kernels).read_bytes())
    registration = register(trt, library, request.operators)
    try:
        builder = trt.Builder(log.logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parse(trt, network, request, log, registration)
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        kinds = Counter(layer.type.name for layer in layers)
        plugins = sorted(layer.name for layer in layers if layer.type == trt.LayerType.PLUGIN_V3)
        check_layers(plugins, kinds, request)
        config = builder.create_builder_config()
        for profile in request.profiles:
            config.add_optimization_profile(make_profile(builder, network, profile))
        set_capabilities(trt, config, request.capabilities)
        with registration.reporting():
            plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise BuildError(f"TensorRT built no plan: {'; '.join(log.errors) or 'it gave no reason'}")
        check_device(trt, request.capabilities)
        size = Path(request.plan).write_bytes(memoryview(plan))
        check_plan(request)
        return Report(
            version=trt.__version__,
            layers=dict(sorted(kinds.items())),
            plugin_layers=tuple(plugins),
            profiles=config.num_optimization_profiles,
            plan_bytes=size,
            seconds=time.perf_counter() - started,
            peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            activations=tuple(log.sizes("Total Activation Memory")),
            weights=max(log.sizes("Total Weights Memory"), default=0),
            warnings=tuple(log.warnings),
        )
    finally:
        registration.close()


def parse(trt: ModuleType, network: Any, request: Request, log: Log, registration: Registration) -> None:
    """Read the ONNX file into the network.

    Raises:
        BuildError: with the node at which the parser stopped.
    """
    parser = trt.OnnxParser(network, log.logger)
    with registration.reporting():
        parsed = parser.parse_from_file(request.onnx)
    if not parsed:
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        words = "; ".join(f"{e.node_name() or 'the graph'}: {e.desc()}" for e in errors)
        raise BuildError(f"TensorRT does not take the graph: {words}")


def make_profile(builder: Any, network: Any, profile: Profile) -> Any:
    """TensorRT's profile: the shape of every input that has a dynamic dimension."""
    made = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        names = [tensor.get_dimension_name(axis) for axis in range(len(tensor.shape))]
        if -1 in tensor.shape:
            made.set_shape(
                tensor.name,
                *(
                    [d if d >= 0 else profile.dimensions[n][which] for d, n in zip(tensor.shape, names, strict=True)]
                    for which in range(3)
                ),
            )
    return made


def set_capabilities(trt: ModuleType, config: Any, capabilities: tuple[int, ...]) -> None:
    """TensorRT-RTX compiles for a list of compute capabilities; TensorRT for the GPU at hand."""
    if not hasattr(trt, "ComputeCapability"):
        return
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), index)


def check_device(trt: ModuleType, capabilities: tuple[int, ...], driver: Callable[[], CudaDriver] = CudaDriver) -> None:
    """A plan of TensorRT is for the GPU on which it was built, whatever was asked for.

    Raises:
        BuildError: that is another one.
        EngineError: the GPU cannot be asked.
    """
    if hasattr(trt, "ComputeCapability"):
        return
    found = driver().capability()
    if capabilities != (found,):
        raise BuildError(f"TensorRT builds for this host's GPU only: pass --compute-capability {found}")


def check_layers(plugins: list[str], kinds: Counter[str], request: Request) -> None:
    """Every marker node became a plugin, and every write to a cache happens in place.

    Raises:
        BuildError: naming the nodes that did not.
    """
    lost = sorted(request.plugins.keys() - set(plugins))
    if lost or len(plugins) != len(request.plugins):
        raise BuildError(
            f"{len(request.plugins)} nodes should be plugins, {len(plugins)} are; not: {', '.join(lost) or 'none'}"
        )
    if kinds["KV_CACHE_UPDATE"] != request.cache_updates:
        raise BuildError(
            f"{request.cache_updates} cache updates should be in place, {kinds['KV_CACHE_UPDATE']} are KV_CACHE_UPDATE"
        )


def check_plan(request: Request) -> None:
    """The attributes of the plugins lie in the plan; TensorRT drops them silently if it cannot serialise a plugin.

    Raises:
        BuildError: naming the first node whose attribute is not there.
    """
    if not request.plugins:
        return
    with Path(request.plan).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        found: dict[bytes, bool] = {}
        for node, attributes in request.plugins.items():
            for name, value in attributes.items():
                for data in (name.encode(), np.float32(value).tobytes()):
                    if not found.setdefault(data, plan.find(data) >= 0):
                        raise BuildError(f"{node}: its attribute {name} = {value} is not in the plan")


def main(request_file: str, report_file: str) -> int:
    """0: built. 1: a message on stderr."""
    request = msgspec.json.decode(Path(request_file).read_bytes(), type=Request)
    try:
        trt = load(request.module)
        with Path(request.log).open("w", encoding="utf-8") as file:
            report = build(trt, request, Log(trt, file, Path(request.onnx).parent))
    except ZondaError as error:
        print(error, file=sys.stderr)
        return 1
    Path(report_file).write_bytes(msgspec.json.encode(report))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
