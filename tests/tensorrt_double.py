"""A double of a TensorRT module, with the same method names, that records and computes.

A "plan" is a JSON file that names an ONNX graph, executed by ONNX Runtime at the addresses that are bound in the memory
of the CUDA double.
"""

import enum
import json
from types import SimpleNamespace

import numpy as np
from cuda_double import array_at

from zonda.runtime.engines.ort import onnxruntime as ort

DTYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "INT32": np.int32}


class Hashable(SimpleNamespace):
    __hash__ = object.__hash__


class Registry:
    """TensorRT's plugin registry: the first creator of a name and version stays."""

    def __init__(self):
        self.creators = {}

    def get_creator(self, name, version, namespace):
        return self.creators.get((name, version, namespace))

    def register_creator(self, creator, namespace):
        assert namespace == creator.plugin_namespace
        return self.creators.setdefault((creator.name, creator.plugin_version, namespace), creator) is creator

    def deregister_creator(self, creator):
        return self.creators.pop((creator.name, creator.plugin_version, creator.plugin_namespace), None) is not None


def fake_tensorrt(cuda, *, rtx=True):
    """The module. `trt.log` lists what happened; `trt.refuse` holds names of calls that fail."""
    registry = Registry()
    plugin_bases = ("IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuild", "IPluginV3OneRuntime", "IPluginCreatorV3One")
    severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])
    trt = Hashable(
        **{name: type(name, (), {}) for name in plugin_bases},
        ILogger=type("ILogger", (), {"Severity": severity}),
        DataType=enum.Enum("DataType", ["FLOAT", "HALF", "BF16", "INT64", "INT32", "INT8", "FP8"]),
        TensorIOMode=enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"]),
        ExecutionContextAllocationStrategy=enum.Enum("Strategy", ["STATIC", "USER_MANAGED"]),
        PluginFieldType=enum.Enum("PluginFieldType", ["FLOAT32", "INT32"]),
        TensorFormat=enum.Enum("TensorFormat", ["LINEAR", "CHW32"]),
        PluginField=lambda name, data, kind: SimpleNamespace(name=name, data=data, type=kind),
        PluginFieldCollection=list,
        DimsExprs=list,
        get_plugin_registry=lambda: registry,
        cuda=cuda,
        log=[],
        refuse=set(),
        contexts=[],
        during_execution=[],
    )
    if rtx:
        trt.DynamicShapesKernelSpecializationStrategy = enum.Enum("Kernels", ["LAZY", "EAGER", "NONE"])
    trt.Runtime = lambda logger: FakeRuntime(trt, logger, rtx)
    return trt


class FakeRuntime:
    def __init__(self, trt, logger, rtx):
        self.trt, self.logger, self.rtx = trt, logger, rtx

    def error(self, message):
        self.logger.log(self.trt.ILogger.Severity.ERROR, message)

    def deserialize_cuda_engine(self, data):
        try:
            plan = json.loads(bytes(data))
        except ValueError:
            return self.error("Serialization assertion header.magicTag failed")
        if "deserialize_cuda_engine" in self.trt.refuse:
            return self.error("Error Code 2: OutOfMemory (requested size was 1 bytes)")
        for name, values in plan.get("plugins", ()):
            creator = self.trt.get_plugin_registry().get_creator(name, "1", "zonda")
            if creator is None:
                return self.error(f"Cannot find plugin: {name}, version: 1, namespace: zonda")
            kinds = {float: self.trt.PluginFieldType.FLOAT32, int: self.trt.PluginFieldType.INT32}
            types = {float: np.float32, int: np.int32}
            fields = [self.trt.PluginField(k, np.array([v], types[type(v)]), kinds[type(v)]) for k, v in values.items()]
            if creator.create_plugin(f"node of {name}", fields, None) is None:
                return None
        return FakeEngine(self, plan)


class FakeEngine:
    """plan: onnx, capacity (positions), profiles [{batch, sequence, num_logits: [min, max]}], tensors {name: (mode,
    dtype, shape)}, activations, unused: inputs that TensorRT dropped."""

    def __init__(self, runtime, plan):
        self.runtime, self.trt, self.plan = runtime, runtime.trt, plan
        self.tensors = {k: v for k, v in plan["tensors"].items() if k not in plan.get("unused", ())}
        self.names = list(self.tensors)
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), len(plan["profiles"])
        self.session = None
        if plan.get("onnx"):
            options = ort.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 4, 1
            self.session = ort.InferenceSession(plan["onnx"], options)
        if runtime.rtx:
            self.create_runtime_config = lambda: FakeConfig(self.trt)

    def get_tensor_name(self, index):
        return self.names[index]

    def get_tensor_mode(self, name):
        return self.trt.TensorIOMode[self.tensors[name][0]]

    def get_tensor_dtype(self, name):
        return self.trt.DataType[self.tensors[name][1]]

    def get_tensor_shape(self, name):
        return tuple(-1 if isinstance(d, str) else d for d in self.tensors[name][2])

    def get_tensor_profile_shape(self, name, index):
        profile = self.plan["profiles"][index]
        low, high = (
            tuple(profile[d][end] if isinstance(d, str) else d for d in self.tensors[name][2]) for end in (0, 1)
        )
        return [low, high, high]

    def get_device_memory_size_for_profile_v2(self, index):
        return self.plan.get("activations", 4096) * (index + 1)

    def create_execution_context(self, strategy):
        strategy = getattr(strategy, "strategy", strategy)
        assert strategy == self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if "create_execution_context" in self.trt.refuse:
            return self.runtime.error("cannot allocate persistent memory")
        context = FakeContext(self)
        self.trt.contexts.append(context)
        return context


class FakeConfig:
    def __init__(self, trt):
        self.trt = trt
        self.dynamic_shapes_kernel_specialization_strategy = None

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        self.trt.log.append("create_runtime_cache")
        return "runtime cache"

    def set_runtime_cache(self, cache):
        assert cache == "runtime cache"


class FakeContext:
    def __init__(self, engine):
        self.engine, self.trt = engine, engine.trt
        self.profile, self.memory = None, None
        self.shapes, self.addresses, self.executed = {}, {}, []

    def set_optimization_profile_async(self, index, stream):
        assert stream in self.trt.cuda.streams
        self.profile = index
        return "set_optimization_profile_async" not in self.trt.refuse

    def set_device_memory(self, pointer, size):
        self.trt.cuda.check(pointer, size, self.trt.cuda.device_memory)
        self.memory = pointer, size

    def set_input_shape(self, name, shape):
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        assert all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True)), (name, shape, low, high)
        self.shapes[name] = shape
        return "set_input_shape" not in self.trt.refuse

    def set_tensor_address(self, name, address):
        assert name in self.engine.tensors
        assert address % 256 == 0, f"{name} at {address:#x}"
        self.addresses[name] = address
        return "set_tensor_address" not in self.trt.refuse

    def is_stream_capturable(self, stream):
        return "is_stream_capturable" not in self.trt.refuse

    def execute_async_v3(self, stream):
        assert stream in self.trt.cuda.streams
        assert self.memory is not None
        if "execute_async_v3" in self.trt.refuse:
            self.engine.runtime.error("Error Code 1: Cuda Runtime (invalid argument)")
            return False
        for callback in self.trt.during_execution:
            if callback(self) is False:
                return False
        missing = set(self.engine.tensors) - set(self.addresses)
        assert not missing, missing
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        self.executed.append((shapes, addresses))
        self.trt.cuda.enqueue(lambda: self.run(shapes, addresses))
        return True

    def run(self, shapes, addresses):
        self.trt.log.append(("run", shapes["input_ids"]))
        if self.engine.session is None:
            return
        sizes = {
            d: s
            for name in shapes
            for d, s in zip(self.engine.tensors[name][2], shapes[name], strict=True)
            if isinstance(d, str)
        }
        io = self.engine.session.io_binding()
        feed = {}
        for name, (mode, dtype, dims) in self.engine.plan["tensors"].items():
            shape = tuple(sizes[d] if isinstance(d, str) else d for d in dims)
            if name not in addresses:  # an input that TensorRT dropped, and ONNX Runtime did not
                value = np.full(shape, self.engine.plan["unused_value"], DTYPES[dtype])
            else:
                value = array_at(addresses[name], shape, DTYPES[dtype])
                self.trt.cuda.check(addresses[name], value.nbytes, self.trt.cuda.device_memory)
            feed[name] = ort.OrtValue.ortvalue_from_numpy(value, "cpu")
            (io.bind_ortvalue_input if mode == "INPUT" else io.bind_ortvalue_output)(name, feed[name])
        self.engine.session.run_with_iobinding(io)


PROFILES = [
    {"batch": [1, 4], "sequence": [1, 1], "num_logits": [1, 1]},
    {"batch": [1, 4], "sequence": [1, 16], "num_logits": [1, 16]},
]


def write_plan(path, spec, limits, *, onnx=None, dtype="FLOAT", profiles=PROFILES, **extra):
    """A plan file for the doubles, from a contract. Returns the path."""
    kinds = {"int64": "INT64", "int32": "INT32", "float32": "FLOAT"}
    tensors = {t.name: ("INPUT", kinds[t.dtype], t.shape) for t in spec.inputs}
    for state in spec.states:
        shape = [limits.capacity + limits.max_chunk if d == "capacity" else d for d in state.shape]
        tensors[state.input], tensors[state.output] = ("INPUT", dtype, shape), ("OUTPUT", dtype, shape)
    tensors[spec.logits.name] = ("OUTPUT", "FLOAT", spec.logits.shape)
    plan = {"onnx": onnx and str(onnx), "profiles": profiles, "tensors": tensors, **extra}
    path.write_text(json.dumps(plan))
    return path
