"""The plugin classes against a double of TensorRT: the same class body serves `tensorrt` and `tensorrt_rtx`."""

import enum
from types import SimpleNamespace

import numpy as np
import pytest
from tensorrt_double import Hashable, Registry

from zonda import BuildError, EngineError
from zonda.plugins_trt import PLUGINS, register
from zonda.plugins_trt.cubins import Cubin, CubinLibrary, Usage
from zonda.plugins_trt.marker import Tensor

CASES = {
    "RmsNorm": ({"eps": 0.5}, [((2, 3, 64), "fp16"), ((64,), "fp16")], 1),
    "AddRmsNorm": ({"eps": 0.5}, [((2, 3, 64), "bf16"), ((2, 3, 64), "bf16"), ((64,), "bf16")], 2),
    "QRmsNorm": ({"eps": 0.5}, [((2, 3, 64), "fp32"), ((2, 32), "int8"), ((2,), "fp32")], 1),
    "RoPE": (
        {"num_heads": 4, "num_key_value_heads": 2, "interleaved": 0, "rotary_dim": 8},
        [((2, 3, 64), "fp16"), ((2, 3, 32), "fp16"), ((9, 4), "fp32"), ((9, 4), "fp32"), ((2, 3), "int64")],
        2,
    ),
}
WANTED = {  # grid and scalars for 6 rows, and 8 rows a program of RmsNorm
    "RmsNorm": (1, (0.5, 6)),
    "AddRmsNorm": (6, (0.5,)),
    "QRmsNorm": (6, (0.5,)),
    "RoPE": (6, (9,)),
}


class DataType(enum.Enum):
    HALF, BF16, FLOAT, INT8, INT64 = range(5)


NAMES = dict(zip(("fp16", "bf16", "fp32", "int8", "int64"), DataType, strict=True))


@pytest.fixture
def trt():
    """What the plugins use of TensorRT."""
    registry = Registry()
    bases = ("IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuild", "IPluginV3OneRuntime", "IPluginCreatorV3One")
    return Hashable(
        **{name: type(name, (), {}) for name in bases},
        DataType=DataType,
        PluginFieldType=enum.Enum("PluginFieldType", ["FLOAT32", "INT32"]),
        TensorFormat=enum.Enum("TensorFormat", ["LINEAR", "CHW32"]),
        PluginField=lambda name, data, kind: SimpleNamespace(name=name, data=data, type=kind),
        PluginFieldCollection=list,
        DimsExprs=list,
        get_plugin_registry=lambda: registry,
    )


def kernels(driver, capabilities=(80,)):
    """A library with every case's kernel, and the driver's knowledge of their parameters."""
    cubins = []
    for name, (values, inputs, _) in CASES.items():
        marker = PLUGINS[name].create(values)
        variant = marker.variant([Tensor(*t) for t in inputs])
        scalars = tuple(("s", "i32" if isinstance(v, int) else "fp32") for v in WANTED[name][1])
        parameters = (*((str(i), f"*{d}") for i, d in enumerate(variant.dtypes)), *scalars)
        driver.kinds[marker.kernel] = tuple(kind for _, kind in parameters)
        for c in capabilities:
            image = f"{marker.kernel} {c}".encode()
            cubins.append(Cubin(variant, c, marker.kernel, image, parameters, (("ROWS", 8),), 4, 0, Usage(9, 0, 0)))
    return CubinLibrary(capabilities, tuple(cubins))


@pytest.fixture
def registration(trt, driver):
    return register(trt, kernels(driver), driver=lambda: driver)


def create(trt, name, values, node="node_7"):
    kinds = {float: (trt.PluginFieldType.FLOAT32, np.float32), int: (trt.PluginFieldType.INT32, np.int32)}
    fields = [trt.PluginField(n, np.array([v], kinds[type(v)][1]), kinds[type(v)][0]) for n, v in values.items()]
    return trt.get_plugin_registry().get_creator(name, "1", "zonda").create_plugin(node, fields, None)


def describe(trt, tensors, form="LINEAR"):
    return [
        SimpleNamespace(dims=shape, type=NAMES[dtype], format=trt.TensorFormat[form], desc=None)
        for shape, dtype in tensors
    ]


@pytest.mark.parametrize("name", CASES)
def test_fields_survive_serialisation(trt, registration, name):
    values, _, outputs = CASES[name]
    plugin = create(trt, name, values)
    restored = {f.name: f.data.item() for f in plugin.get_fields_to_serialize()}
    assert restored == values
    assert create(trt, name, restored).marker == plugin.marker == plugin.clone().marker
    assert plugin.num_outputs == outputs
    assert (plugin.plugin_name, plugin.plugin_namespace, plugin.plugin_version) == (name, "zonda", "1")


@pytest.mark.parametrize("name", CASES)
def test_an_execution_launches_the_kernel_over_all_tensors(trt, registration, driver, name):
    values, inputs, outputs = CASES[name]
    plugin = create(trt, name, values)
    described = describe(trt, inputs)
    attached = plugin.attach_to_context(None)
    assert attached is not plugin
    attached.on_shape_change(described, [])
    prepared = len(driver.calls)
    pointers = [0x1000 * (i + 1) for i in range(len(inputs) + outputs)]
    attached.enqueue(described, [], pointers[: len(inputs)], pointers[len(inputs) :], 0, 77)
    grid, scalars = WANTED[name]
    kernel = PLUGINS[name].kernel
    assert driver.calls[prepared:] == [("launch", kernel, grid, 128, 0, 77, (*pointers, *scalars, 0, 0))]


def test_a_new_shape_is_a_new_grid(trt, registration, driver):
    plugin = create(trt, "AddRmsNorm", {"eps": 0.5}).attach_to_context(None)
    for batch in (1, 5):
        described = describe(trt, [((batch, 3, 64), "bf16")] * 2 + [((64,), "bf16")])
        plugin.on_shape_change(described, [])
        plugin.enqueue(described, [], [16, 32, 48], [64, 80], 0, 0)
    assert [call[2] for call in driver.calls if call[0] == "launch"] == [3, 15]


@pytest.mark.parametrize("name", CASES)
def test_only_row_major_tensors_of_the_markers_types_are_taken(trt, registration, name):
    values, inputs, _ = CASES[name]
    plugin = create(trt, name, values)
    marker = plugin.marker
    tensors = [*inputs, *(inputs[source] for source in marker.output_sources())]
    for form, taken in (("LINEAR", True), ("CHW32", False)):
        in_out = [SimpleNamespace(desc=d) for d in describe(trt, tensors, form)]
        for position in range(len(tensors)):
            assert plugin.supports_format_combination(position, in_out, len(inputs)) is taken
    in_out = [SimpleNamespace(desc=d) for d in describe(trt, [*tensors[:-1], ((1,), "int64")])]
    assert not plugin.supports_format_combination(len(tensors) - 1, in_out, len(inputs))


def test_a_gpu_without_kernels_fails_at_the_launch_and_the_report_names_the_node(trt, registration, driver):
    driver.device = 121
    values, inputs, _ = CASES["RmsNorm"]
    attached = create(trt, "RmsNorm", values).attach_to_context(None)
    with pytest.raises(EngineError):
        attached.enqueue(describe(trt, inputs), [], [16, 32], [48], 0, 0)
    with pytest.raises(EngineError, match=r"plugin node node_7: this GPU has compute capability 121.*\[prepare\]"):
        registration.failures.check(EngineError)


def test_a_report_is_given_once(trt, registration):
    with pytest.raises(BuildError, match=r"node_7: RmsNorm lacks the attribute eps"), registration.reporting():
        assert create(trt, "RmsNorm", {}) is None
    with registration.reporting():
        pass


def test_a_registration_replaces_the_one_before_and_takes_itself_away(trt, registration, driver):
    registry = trt.get_plugin_registry()
    before = dict(registry.creators)
    second = register(trt, kernels(driver), names=("RoPE",), driver=lambda: driver)
    assert second.names == ("RoPE",)
    assert [name for name, _, _ in registry.creators] == ["RoPE"]
    assert registry.creators["RoPE", "1", "zonda"] is not before["RoPE", "1", "zonda"]
    second.close()
    assert not registry.creators


def test_nothing_of_cuda_is_touched_before_an_engine_runs(trt, driver):
    def refuse():
        raise AssertionError("a build host has no CUDA")

    register(trt, kernels(driver), driver=refuse)
    create(trt, "RmsNorm", {"eps": 0.5}).clone()
