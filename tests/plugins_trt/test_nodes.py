"""Which kernels a graph needs, and what a marker refuses, node by node."""

import numpy as np
import onnx_ir as ir
import pytest

from zonda import BuildError
from zonda.plugins_trt import Variant, variants_of
from zonda.plugins_trt.nodes import read_node, variant_of

HALF, FLOAT, INT8, INT64 = ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT64
ROPE = {"num_heads": 4, "num_key_value_heads": 2, "interleaved": 0, "rotary_dim": 16}
TOKENS = ["b", "s"]
TABLES = [(FLOAT, [32, 8]), (FLOAT, [32, 8]), (INT64, TOKENS)]


def node(op_type, inputs, attributes, domain="zonda"):
    values = [i and ir.val(f"v{n}", *i) for n, i in enumerate(inputs)]
    return ir.node(op_type, values, attributes, domain=domain, name=f"{op_type}_1")


def test_variants_of_a_graph_are_distinct_and_in_order(graph):
    variants = variants_of(graph.graph)
    assert [v.kernel for v in variants] == ["q_rms_norm", "rope", "add_rms_norm", "rms_norm"]
    assert variants[0] == Variant("q_rms_norm", ("fp16", "int8", "fp16", "fp16"), (("hidden", 128), ("group", 32)))
    sizes = {"heads": 4, "key_heads": 2, "dim": 32, "half": 16, "interleaved": 0}
    assert dict(variants[1].sizes) == sizes
    assert variants[1].dtypes == ("fp16", "fp16", "fp32", "fp32", "int64", "fp16", "fp16")


def test_nodes_without_a_plugin_are_passed_over():
    other = node("KvCacheUpdate", [(HALF, [1])], {})
    foreign = node("RmsNorm", [(HALF, [1])], {}, domain="elsewhere")
    assert variants_of([other, foreign]) == ()


def test_rope_without_k():
    single = node("RoPE", [(HALF, [*TOKENS, 64]), *TABLES], ROPE | {"num_key_value_heads": 0})
    assert variant_of(single).dtypes == ("fp16", "fp32", "fp32", "int64", "fp16")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (node("RmsNorm", [(HALF, ["n", 8]), (HALF, [8])], {}), "RmsNorm_1: RmsNorm wants one float eps, not nothing"),
        (node("RmsNorm", [(HALF, ["n", 8]), (HALF, [8])], {"eps": 1}), "wants one float eps, not 1"),
        (node("RmsNorm", [(HALF, ["n", 8]), (HALF, [8])], {"eps": float("nan")}), "eps is nan"),
        (node("RmsNorm", [(HALF, ["n", "h"]), (HALF, [8])], {"eps": 0.0}), "last dimension of x is -1"),
        (
            node("RmsNorm", [(HALF, ["n", 16385]), (HALF, [16385])], {"eps": 0.0}),
            "is 16385; it must be static, 1 to 16384",
        ),
        (node("RmsNorm", [(HALF, ["n", 8]), (INT8, [8])], {"eps": 0.0}), "weight cannot be int8 beside fp16"),
        (node("RmsNorm", [(ir.DataType.DOUBLE, ["n", 8]), (HALF, [8])], {"eps": 0.0}), "x cannot be double"),
        (node("RmsNorm", [(HALF, ["n", 8]), None], {"eps": 0.0}), "RmsNorm_1: .*absent input"),
        (node("RmsNorm", [(None, None), (HALF, [8])], {"eps": 0.0}), "no known type and shape"),
        (
            node("AddRmsNorm", [(HALF, [2, 8]), (HALF, [1, 8]), (HALF, [8])], {"eps": 0.0}),
            r"residual has shape \[1, 8\]",
        ),
        (node("AddRmsNorm", [(HALF, [2, 8]), (FLOAT, [2, 8]), (HALF, [8])], {"eps": 0.0}), "residual cannot be fp32"),
        (node("QRmsNorm", [(HALF, [2, 64]), (INT8, [2, 32]), (HALF, [3])], {"eps": 0.0}), "do not divide a gain of 64"),
        (node("QRmsNorm", [(HALF, [2, 64]), (INT8, [4, 16]), (HALF, [2])], {"eps": 0.0}), r"not \[2, 32\]"),
        (node("RoPE", [(HALF, [*TOKENS, 64]), (HALF, [*TOKENS, 48]), *TABLES], ROPE), r"k has shape \[-1, -1, 48\]"),
        (node("RoPE", [(HALF, [*TOKENS, 66]), (HALF, [*TOKENS, 32]), *TABLES], ROPE), "not a multiple of 4 heads"),
        (
            node("RoPE", [(HALF, [*TOKENS, 64]), *TABLES], ROPE),
            "takes q, k, cos, sin, start_offsets_kernel; the node has 4",
        ),
        (
            node("RoPE", [(HALF, [*TOKENS, 64]), (HALF, [*TOKENS, 32]), *TABLES], ROPE | {"rotary_dim": 18}),
            "rotary_dim 18",
        ),
        (
            node("RoPE", [(HALF, [*TOKENS, 64]), (HALF, [*TOKENS, 32]), *TABLES], ROPE | {"rotary_dim": 8}),
            r"cos has shape",
        ),
        (
            node("RoPE", [(HALF, [*TOKENS, 64]), (HALF, [*TOKENS, 32]), *TABLES], ROPE | {"rotary_dim": 7}),
            "must be even",
        ),
        (
            node("RoPE", [(HALF, [*TOKENS, 64]), (HALF, [*TOKENS, 32]), *TABLES], ROPE | {"interleaved": 2}),
            "must be 0 or 1",
        ),
    ],
)
def test_what_no_kernel_can_do_is_refused_with_the_nodes_name(found, message):
    with pytest.raises(BuildError, match=message) as raised:
        variant_of(found)
    assert str(raised.value).startswith(found.name)


def test_attribute_values_make_the_marker_that_the_plugin_will_be():
    marker = read_node(node("RmsNorm", [(HALF, ["n", 8]), (HALF, [8])], {"eps": 1e-5}))
    assert marker.values() == {"eps": pytest.approx(1e-5, rel=1e-7)}
    assert type(marker).create(marker.values()) == marker
    assert isinstance(np.float32(marker.eps), np.float32)
