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
                [n if axis == 0 else tokens if d < 0 else d for axis, d in enumerate(tensor.shape)]
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


def single(op_type="RmsNorm", weight=64, **attributes) -> ir.Model:
    """A graph of one marker without a body."""
    x = ir.val("x", ir.DataType.FLOAT16, ["b", 64])
    gain = ir.Value(name="gain", const_value=ir.tensor(np.ones(weight, np.float16)))
    node = ir.node(op_type, [x, gain], attributes, domain="zonda", name="the_norm")
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", x.type, x.shape
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[gain], opset_imports={"": 24, "zonda": 1}, name="g")
    return ir.Model(graph, ir_version=11)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (single(), "the_norm: RmsNorm lacks the attribute eps"),
        (single(eps=1), "the_norm: RmsNorm: attribute eps is INT32, not FLOAT32"),
        (single(eps=[1.0, 2.0]), "the_norm: RmsNorm: attribute eps holds 2 values, not one"),
        (single(eps=-1.0), "the_norm: RmsNorm: eps is -1.0; it must be finite"),
        (single(eps=1.0, weight=63), r"the_norm: RmsNorm: weight has shape \[63\], not \[64\]"),
        (single(eps=1.0), "the_norm: rms_norm .* is not in the kernel library"),
        (single("QRmsNorm", eps=1.0), "the_norm: QRmsNorm takes x, codes, scales; the node has 2 inputs"),
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
