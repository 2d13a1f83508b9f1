"""TensorRT-RTX on a host without a GPU: our plugins are taken, the engine is built, and failures name the node."""

import collections
import contextlib
import traceback

import numpy as np
import onnx_ir as ir
import pytest

from zonda import BuildError
from zonda.plugins_trt import PLUGINS, CubinLibrary, compile_kernels, register, variants_of
from zonda.plugins_trt.rope import RoPE

CAPABILITIES = (80, 89)


@pytest.fixture(scope="module")
def library(graph, triton) -> CubinLibrary:
    return compile_kernels(variants_of(graph.graph), CAPABILITIES, triton)


@pytest.fixture(scope="module")
def logger(rtx):
    return rtx.Logger(rtx.Logger.ERROR)  # one a process


def layers_of(rtx, logger, registration, model: ir.Model):
    """Parse and build: layer name -> type of all layers, the parser's success, and the plan or None."""
    builder = rtx.Builder(logger)
    network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = rtx.OnnxParser(network, logger)
    with registration.reporting():
        parsed = parser.parse(ir.to_proto(model).SerializeToString())
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    layers = {network.get_layer(i).name: network.get_layer(i).type for i in range(network.num_layers)}
    config = builder.create_builder_config()
    for sizes in ((1, 1, 2), (1, 8, 2)):  # decode and prefill: rows, tokens, most rows
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            rows, tokens, most = sizes
            shapes = [
                [d if d >= 0 else n if axis == 0 else tokens for axis, d in enumerate(tensor.shape)]
                for n in (rows, rows, most)
            ]
            profile.set_shape(tensor.name, *shapes)
        config.add_optimization_profile(profile)
    config.num_compute_capabilities = len(CAPABILITIES)
    for index, capability in enumerate(CAPABILITIES):
        config.set_compute_capability(getattr(rtx.ComputeCapability, f"SM{capability}"), index)
    with registration.reporting():
        plan = builder.build_serialized_network(network, config)
    return layers, None if plan is None else bytes(plan)


@contextlib.contextmanager
def registered(rtx, library, **options):
    registration = register(rtx, library, **options)
    yield registration
    registration.close()


def test_every_marker_node_becomes_our_plugin_and_an_engine_is_built(rtx, logger, graph, library):
    markers = [node.name for node in graph.graph if node.op_type in PLUGINS]
    assert collections.Counter(name.rsplit("_", 1)[0] for name in markers) == {
        "RmsNorm": 2,
        "AddRmsNorm": 1,
        "QRmsNorm": 2,
        "RoPE": 2,
    }
    with registered(rtx, library) as registration:
        assert registration.names == tuple(PLUGINS)
        layers, plan = layers_of(rtx, logger, registration, graph)
    plugins = [name for name, kind in layers.items() if kind == rtx.LayerType.PLUGIN_V3]
    assert sorted(plugins) == sorted(markers)
    assert sum(kind == rtx.LayerType.KV_CACHE_UPDATE for kind in layers.values()) == 4
    assert plan is not None
    # The attributes travel in the plan: without them the engine would load and compute something else.
    assert np.float32(1e-6).tobytes() in plan
    for name in (b"num_key_value_heads", b"rotary_dim", b"interleaved", b"eps"):
        assert name in plan


def test_a_marker_that_is_not_asked_for_keeps_its_body(rtx, logger, graph, library):
    bodied = graph.clone()
    for node in [n for n in bodied.graph if n.op_type == "AddRmsNorm"]:
        node.attributes.pop("plugin_namespace")  # it has no body: its domain still finds the plugin
    with registered(rtx, library, names=("AddRmsNorm", "QRmsNorm", "RoPE")) as registration:
        assert registration.names == ("AddRmsNorm", "QRmsNorm", "RoPE")
        layers, plan = layers_of(rtx, logger, registration, bodied)
    kinds = collections.Counter(n.rsplit("_", 1)[0] for n, kind in layers.items() if kind == rtx.LayerType.PLUGIN_V3)
    assert kinds == {"AddRmsNorm": 1, "QRmsNorm": 2, "RoPE": 2}
    assert plan is not None


HALF, BF16, FLOAT = ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT


def alone(op_type, inputs, attributes, sources=(0,)) -> ir.Model:
    """A graph of one marker, without a body. inputs: arrays are constants. sources: the input each output is like."""
    values = [
        ir.Value(name=f"in{n}", const_value=ir.tensor(i)) if isinstance(i, np.ndarray) else ir.val(f"in{n}", *i)
        for n, i in enumerate(inputs)
    ]
    node = ir.node(op_type, values, attributes, domain="zonda", name="the_node", num_outputs=len(sources))
    for n, (output, source) in enumerate(zip(node.outputs, sources, strict=True)):
        output.name, output.type, output.shape = f"out{n}", values[source].type, values[source].shape
    constants = [value for value in values if value.const_value is not None]
    for value in constants:
        value.type, value.shape = ir.TensorType(value.const_value.dtype), value.const_value.shape
    graph = ir.Graph(
        [value for value in values if value.const_value is None],
        node.outputs,
        nodes=[node],
        initializers=constants,
        opset_imports={"": 24, "zonda": 1},
        name="g",
    )
    return ir.Model(graph, ir_version=11)


def every_marker(dtype: ir.DataType):
    x, row, tokens = (dtype, ["b", "s", 96]), (dtype, [96]), (ir.DataType.INT64, ["b", "s"])
    tables = [np.zeros((9, 8), np.float32)] * 2
    heads = {"num_heads": 3, "num_key_value_heads": 1, "interleaved": 1, "rotary_dim": 16}
    eps = {"eps": 1e-5}
    yield alone("RmsNorm", [x, row], eps)
    yield alone("RmsNorm", [x, np.ones(96, np.float32)], eps)
    yield alone("AddRmsNorm", [x, x, row], eps, (0, 0))
    yield alone("QRmsNorm", [x, np.ones((3, 32), np.int8), np.ones(3, np.float32)], eps)
    yield alone("QRmsNorm", [x, np.ones(96, np.int8), np.ones(3, np.float16)], eps)
    yield alone("RoPE", [x, (dtype, ["b", "s", 32]), *tables, tokens], heads, (0, 1))
    yield alone("RoPE", [x, *tables, tokens], heads | {"num_key_value_heads": 0})


@pytest.mark.parametrize("dtype", [HALF, BF16, FLOAT], ids=lambda dtype: dtype.name)
def test_every_marker_is_built_in_every_type(rtx, logger, triton, dtype):
    models = list(every_marker(dtype))
    variants = [variants_of(model.graph)[0] for model in models]
    with registered(rtx, compile_kernels(variants, CAPABILITIES, triton)) as registration:
        for model in models:
            layers, plan = layers_of(rtx, logger, registration, model)
            assert layers["the_node"] == rtx.LayerType.PLUGIN_V3
            assert plan is not None


def norm(op_type="RmsNorm", weight=64, **attributes) -> ir.Model:
    return alone(op_type, [(HALF, ["b", 64]), np.ones(weight, np.float16)], attributes)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (norm(), "the_node: RmsNorm lacks the attribute eps"),
        (norm(eps=1), "the_node: RmsNorm: attribute eps is INT32, not FLOAT32"),
        (norm(eps=[1.0, 2.0]), "the_node: RmsNorm: attribute eps holds 2 values, not one"),
        (norm(eps=-1.0), "the_node: RmsNorm: eps is -1.0; it must be finite"),
        (norm(eps=1.0, weight=63), r"the_node: RmsNorm: weight has shape \[63\], not \[64\]"),
        (norm(eps=1.0), "the_node: rms_norm .* is not in the kernel library"),
        (norm("QRmsNorm", eps=1.0), "the_node: QRmsNorm takes x, codes, scales; the node has 2 inputs"),
    ],
    ids=["missing", "int", "list", "range", "shape", "uncompiled", "inputs"],
)
def test_what_a_plugin_refuses_is_a_build_error_with_the_node(rtx, logger, library, model, message):
    with registered(rtx, library) as registration, pytest.raises(BuildError, match=message):
        layers_of(rtx, logger, registration, model)


@pytest.mark.parametrize(
    ("callback", "defect"),
    [
        ("get_output_data_types", "output_sources"),
        ("get_output_shapes", "variant"),
        ("supports_format_combination", "accepts"),
        ("configure_plugin", "variant"),
    ],
)
def test_an_unexpected_exception_in_a_callback_is_a_build_error_too(
    rtx, logger, graph, library, monkeypatch, callback, defect
):
    """Every callback is called, fails in the marker it turns to, and the process lives to report the node."""
    genuine = getattr(RoPE, defect)

    def fail(*arguments):
        frames = [frame.name for frame in traceback.extract_stack()]
        if callback in frames:
            raise ZeroDivisionError("planted")
        return genuine(*arguments)

    monkeypatch.setattr(RoPE, defect, fail)
    with registered(rtx, library) as registration, pytest.raises(BuildError, match=r"RoPE_\d+: planted") as raised:
        layers_of(rtx, logger, registration, graph)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_a_second_registration_takes_the_place_of_the_first(rtx, logger, graph, library):
    first = register(rtx, CubinLibrary((), ()))
    with registered(rtx, library) as second:
        _, plan = layers_of(rtx, logger, second, graph)
    assert plan is not None
    first.close()
    registry = rtx.get_plugin_registry()
    assert all(registry.get_creator(name, "1", "zonda") is None for name in PLUGINS)
