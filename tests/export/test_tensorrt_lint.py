"""Each trap, planted in a graph that TensorRT would take, is refused with the name of its node."""

import numpy as np
import onnx_ir as ir
import pytest

from zonda import BuildError
from zonda.export.lower.tensorrt_lint import lint

HALF, FLOAT, INT64, BOOL = ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
PLUGIN = {"plugin_namespace": "zonda", "plugin_version": "1"}


def tensor(name: str, dtype: ir.DataType | None, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype) if dtype else None, shape=ir.Shape(shape))


def constant(name: str, array: np.ndarray | ir.TensorProtocol) -> ir.Value:
    data = ir.tensor(array, name=name) if isinstance(array, np.ndarray) else array
    return ir.Value(name=name, type=ir.TensorType(data.dtype), shape=ir.Shape(data.shape), const_value=data)


def model(*nodes: ir.Node, functions: tuple = ()) -> ir.Model:
    values = dict.fromkeys(v for node in nodes for v in node.inputs if v is not None and v.producer() is None)
    constants = [value for value in values if value.const_value is not None]
    for node in nodes:
        for index, output in enumerate(node.outputs):
            if output.name is None:
                output.name = f"{node.name}.{index}"
    graph = ir.Graph(
        [value for value in values if value.const_value is None],
        [node.outputs[0] for node in nodes],
        nodes=nodes,
        initializers=constants,
        opset_imports={"": 24, "zonda": 1},
        name="g",
    )
    return ir.Model(graph, ir_version=11, functions=functions)


def attention(*, dtype=HALF, tokens=1, extra=(), outputs=1, **attributes) -> ir.Node:
    q, k, v = tensor("q", dtype, "b", 4, tokens, 16), *(tensor(n, dtype, "b", 2, 48, 16) for n in "kv")
    mask = tensor("mask", BOOL, "b", 1, tokens, 48)
    return ir.node("Attention", [q, k, v, mask, *extra], attributes, num_outputs=outputs, name="the_node")


def scatter(*, rows: int | str = 48, index=INT64) -> ir.Node:
    inputs = tensor("past", HALF, "b", 2, rows, 16), tensor("new", HALF, "b", 2, "s", 16), tensor("at", index, "b")
    return ir.node("TensorScatter", inputs, {"axis": 2}, name="the_node")


def dequantised(codes: ir.Value, zero_point: ir.Value | None) -> ir.Node:
    scales = constant("scales", np.ones((4, 1), np.float16))
    return ir.node("DequantizeLinear", [codes, scales, zero_point], {"axis": 1, "block_size": 32}, name="the_node")


def int4(name: str, *shape: int, value: int = 0, dtype=ir.DataType.INT4) -> ir.Value:
    return constant(name, ir.tensor(np.full(shape, value, dtype.numpy()), dtype=dtype, name=name))


def norm(op_type="RmsNorm", weight=64, **attributes) -> ir.Node:
    inputs = tensor("x", HALF, "b", "s", 64), constant("weight", np.ones(weight, np.float32))
    return ir.node(op_type, inputs, {"eps": 1e-5, **PLUGIN, **attributes}, domain="zonda", name="the_node")


def relu(name: str | None, source: str) -> ir.Node:
    return ir.node("Relu", [tensor(source, HALF, 2)], name=name)


def foreign(op_type: str) -> ir.Node:
    return ir.node(op_type, [tensor("x", HALF, "b", 64)], dict(PLUGIN), domain="acme", name="the_node")


def body() -> ir.Function:
    x = ir.Value(name="x")
    node = ir.node("Relu", [x], name="inner")
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 24})
    return ir.Function("zonda", "RmsNorm", "", graph=graph, attributes=[])


def same_tensor() -> ir.Model:
    built = model(relu("first", "x"), relu("second", "y"))
    for node in built.graph:
        node.outputs[0].name = "the_node"
    return built


HARMLESS = {
    "attention": lambda: model(attention()),
    "causal without a cache": lambda: model(attention(tokens=48, is_causal=1)),
    "float32 attention that may be taken apart": lambda: model(attention(dtype=FLOAT, TRT_decomposable=1)),
    "a static cache": lambda: model(scatter()),
    "int4 without zero points": lambda: model(dequantised(int4("codes", 4, 32), None)),
    "int4 with zero points of 0": lambda: model(dequantised(int4("codes", 4, 32), int4("zeros", 4, 1))),
    "a plugin": lambda: model(norm()),
}

TRAPS = {
    "nonpad_kv_seqlen": (
        lambda: model(attention(extra=(None, None, tensor("lengths", INT64, "b")))),
        "nonpad_kv_seqlen is silently ignored",
    ),
    "is_causal with a cache": (lambda: model(attention(tokens="s", is_causal=1)), "is_causal masks from the first key"),
    "attention in float32": (lambda: model(attention(dtype=FLOAT)), "float32 attention is not fused"),
    "attention of unknown type": (lambda: model(attention(dtype=None)), "the type of q is not known"),
    "attention with its own cache": (
        lambda: model(attention(extra=(tensor("past", HALF, "b", 2, "p", 16),))),
        "past and present of its own",
    ),
    "softcap": (lambda: model(attention(softcap=30.0)), "softcap does not build"),
    "a uint8 constant": (
        lambda: model(ir.node("Cast", [constant("the_node", np.ones(4, np.uint8))], {"to": 10}, name="cast")),
        "a UINT8 constant expands to INT32",
    ),
    "a uint8 constant node": (
        lambda: model(ir.node("Constant", [], {"value": ir.tensor(np.ones(4, np.uint8))}, name="the_node")),
        "a UINT8 constant expands to INT32",
    ),
    "a uint4 constant": (
        lambda: model(ir.node("Cast", [int4("the_node", 4, dtype=ir.DataType.UINT4)], {"to": 10}, name="cast")),
        "a UINT4 constant expands to INT32",
    ),
    "int4 zero points": (
        lambda: model(dequantised(int4("codes", 4, 32), int4("zeros", 4, 1, value=3))),
        "INT4 zero points are not 0",
    ),
    "int4 zero points that are computed": (
        lambda: model(dequantised(int4("codes", 4, 32), tensor("zeros", ir.DataType.INT4, 4, 1))),
        "the zero points are not constant",
    ),
    "two nodes of one name": (lambda: model(relu("the_node", "x"), relu("the_node", "y")), "2 nodes have this name"),
    "two tensors of one name": (same_tensor, "2 tensors have this name"),
    "a node without a name": (lambda: model(relu("", "x")), "1 nodes have no name"),
    "an operator named like a standard one": (
        lambda: model(foreign("RMSNormalization")),
        "TensorRT takes acme.RMSNormalization for its own",
    ),
    "a function body beside a plugin": (
        lambda: model(norm(), functions=(body(),)),
        "can silently take a plugin's place",
    ),
    "a dynamic cache": (lambda: model(scatter(rows="capacity")), "the capacity of the cache is dynamic"),
    "int32 indices": (lambda: model(scatter(index=ir.DataType.INT32)), "the write indices are not INT64"),
    "an attribute that the plugin lacks": (lambda: model(norm(epsilon=1.0)), "epsilon: no attribute of the plugin"),
    "another plugin version": (lambda: model(norm(plugin_version="2")), "plugin_version must be '1'"),
    "a marker without a plugin": (lambda: model(norm("CachedAttention")), "CachedAttention has no plugin"),
    "a shape without a kernel": (lambda: model(norm(weight=63)), r"weight has shape \[63\]"),
    "dynamic quantisation": (
        lambda: model(ir.node("DynamicQuantizeLinear", [tensor("x", FLOAT, 4)], num_outputs=3, name="the_node")),
        "TensorRT has no DynamicQuantizeLinear",
    ),
    "a product of two types": (
        lambda: model(ir.node("MatMul", [tensor("x", HALF, 2, 4), tensor("w", FLOAT, 4, 2)], name="the_node")),
        "a product of FLOAT and FLOAT16",
    ),
}


@pytest.mark.parametrize("build", HARMLESS.values(), ids=HARMLESS)
def test_what_is_harmless_passes(build):
    lint(build())


@pytest.mark.parametrize(("build", "message"), TRAPS.values(), ids=TRAPS)
def test_a_trap_is_refused_with_its_name(build, message):
    with pytest.raises(BuildError, match=message) as refused:
        lint(build())
    named = "a node without a name" if "no name" in message else "RmsNorm" if "silently take" in message else "the_node"
    assert named in str(refused.value)
