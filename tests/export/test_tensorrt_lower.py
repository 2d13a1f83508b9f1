"""The graph that TensorRT is given: static cache, 16 bits outside, float32 inside, plugins as asked for."""

from collections import Counter

import onnx_ir as ir
import pytest
import torch

from zonda import BuildError
from zonda.export.functions import DOMAIN
from zonda.export.lower import tensorrt
from zonda.export.lower.tensorrt import parse_plugins
from zonda.export.lower.tensorrt_lint import lint
from zonda.export.universal import export_universal
from zonda.models import layers
from zonda.models.llama import Llama, LlamaConfig
from zonda.plugins_trt import PLUGINS

ROWS = 48
CONFIG = LlamaConfig.read(
    {
        "vocab_size": 61,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
)
HALF, FLOAT, INT64 = ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.INT64


def lower(*arguments) -> ir.Model:
    return tensorrt.lower(*arguments).model


def mixed(rows: int) -> Llama:
    """A Llama with a quantised norm in it."""
    model = Llama(CONFIG, rows)
    model.model.layers[0].input_layernorm = layers.QRmsNorm(64, 1e-6)
    return model


@pytest.fixture(scope="module")
def universal() -> ir.Model:
    with torch.device("meta"):
        model = mixed(ROWS)
    return export_universal(model)


@pytest.fixture(scope="module")
def lowered(universal) -> ir.Model:
    return lower(universal, "float16", ROWS)


def operators(model: ir.Model) -> Counter:
    return Counter(node.op_type for node in model.graph)


def test_each_marker_with_a_plugin_is_one_node_and_each_other_is_its_body(lowered):
    count = operators(lowered)
    assert {name: count[name] for name in PLUGINS} == {"RmsNorm": 0, "AddRmsNorm": 4, "QRmsNorm": 1, "RoPE": 2}
    assert (count["TensorScatter"], count["Attention"], count["Add"]) == (4, 2, 0)
    assert {node.op_type for node in lowered.graph if node.domain == DOMAIN} <= PLUGINS.keys()
    assert not lowered.functions


@pytest.mark.parametrize(
    ("plugins", "kept", "norms"),
    [
        ("none", {}, 5),
        ("RmsNorm", {"RmsNorm": 4}, 1),
        ("AddRmsNorm", {"AddRmsNorm": 4}, 1),
        ("RoPE, QRmsNorm", {"RoPE": 2, "QRmsNorm": 1}, 4),
    ],
)
def test_plugins_are_chosen_by_name(universal, plugins, kept, norms):
    model = lower(universal, "float16", ROWS, parse_plugins(plugins))
    assert Counter(node.op_type for node in model.graph if node.domain == DOMAIN) == kept
    assert operators(model)["RMSNormalization"] == norms
    lint(model)


def test_an_unknown_plugin_is_refused():
    with pytest.raises(BuildError, match=r"found 'Softmax'"):
        parse_plugins("RmsNorm,Softmax")


def test_the_universal_graph_is_left_as_it_was(universal):
    before = ir.to_proto(universal).SerializeToString(deterministic=True)
    lower(universal, "bfloat16", ROWS)
    assert ir.to_proto(universal).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("plugins", ["all", "none"])
def test_weights_states_and_activations_are_narrow_and_logits_wide(universal, dtype, plugins):
    narrow = {"float16": HALF, "bfloat16": ir.DataType.BFLOAT16}[dtype]
    model = lower(universal, dtype, ROWS, parse_plugins(plugins))
    graph = model.graph
    types = {value.name: value.dtype for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    assert types["past_key_values.1.key"] == types["present.1.value"] == types["lm_head.weight"] == narrow
    assert types["logits"] == FLOAT
    assert types["start_offsets_kernel"] == types["logit_positions"] == INT64
    for name, kind in types.items():
        if name.endswith((".cos", ".sin", "norm.weight", "layernorm.scales")):
            assert kind == FLOAT, name
    for node in graph:
        if node.op_type in ("MatMul", "Attention", "TensorScatter", "Mul"):
            assert node.inputs[0].dtype == narrow, node.name
        if node.op_type in ("RMSNormalization", "RotaryEmbedding"):
            assert all(value.dtype == FLOAT for value in node.inputs if value.dtype != INT64), node.name


def test_the_cache_is_static_written_in_place_and_masked_explicitly(lowered):
    masks = set()
    for node in lowered.graph:
        if node.op_type == "TensorScatter":
            assert list(node.inputs[0].shape)[1:] == [2, ROWS, 16]
            assert node.inputs[0].name.startswith("past_key_values.")
            assert node.outputs[0].name == node.inputs[0].name.replace("past_key_values", "present")
            assert node.inputs[2].dtype == INT64
        if node.op_type == "Attention":
            assert len(node.inputs) == 4
            assert "is_causal" not in node.attributes
            assert node.inputs[3].dtype == ir.DataType.BOOL
            assert [str(d) for d in node.inputs[3].shape] == ["batch", "1", "sequence", str(ROWS)]
            masks.add(node.inputs[3])
    assert len(masks) == 1, "the layers share one mask"


def test_names_are_unique_and_types_known(lowered):
    names = [node.name for node in lowered.graph]
    assert len(set(names)) == len(names)
    assert all(output.dtype is not None for node in lowered.graph for output in node.outputs)


class RotatesQueriesOnly(Llama):
    """RoPE with an absent k."""

    def __init__(self, config: LlamaConfig, rows: int) -> None:
        super().__init__(config, rows)
        from zonda.models import ops

        for block in self.model.layers:
            rotary = block.self_attn.rotary_emb

            def turn(q, k, positions, rotary=rotary):
                return ops.rope_single(q, rotary.cos, rotary.sin, positions, rotary.num_heads, False), k

            rotary.forward = turn


def test_an_absent_input_is_dropped(universal):
    with torch.device("meta"):
        model = RotatesQueriesOnly(CONFIG, ROWS)
    lowered = lower(export_universal(model), "float16", ROWS)
    ropes = [node for node in lowered.graph if node.op_type == "RoPE"]
    assert [(len(node.inputs), len(node.outputs)) for node in ropes] == [(4, 1)] * 2
    lint(lowered)


def test_what_a_plugin_cannot_do_is_refused_with_the_node_and_a_way_out():
    config = LlamaConfig.read(
        {
            "vocab_size": 61,
            "hidden_size": 16392,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 16,
        }
    )
    with torch.device("meta"):
        universal = export_universal(Llama(config, 8))
    with pytest.raises(BuildError, match=r"RmsNorm_\d+: .* 16392; it must be static, 1 to 16384; leave it out"):
        lower(universal, "float16", 8)
    lint(lower(universal, "float16", 8, ()))
