"""The universal ONNX: every marker one node with a body, valid, dynamic, and the same bytes at every export."""

import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support import Eager, Lowered, PlainOnnx, export_graphs, open_engine, randomise, run_scenario

from zonda.export.functions import DOMAIN
from zonda.export.onnx_files import LOWERED, UNIVERSAL, check
from zonda.models import layers
from zonda.models.llama import Llama, LlamaConfig
from zonda.models.quantization import Form

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
ROWS = 32


def make(directory, build=lambda rows: Llama(CONFIG, rows)):
    model = build(ROWS).eval()
    randomise(model)
    state = dict(model.state_dict())
    return model, export_graphs(directory, build, state.__getitem__, ROWS)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("universal")
    model, module = make(directory)
    return directory, model, module


def test_markers_are_single_nodes_with_bodies_and_plugin_attributes(exported):
    directory, _, _ = exported
    graph = onnx.load(directory / UNIVERSAL, load_external_data=False)
    markers = [node for node in graph.graph.node if node.domain == DOMAIN]
    counts = {name: sum(node.op_type == name for node in markers) for name in {n.op_type for n in markers}}
    assert counts == {"RmsNorm": 5, "RoPE": 2, "KvCacheUpdate": 4, "CachedAttention": 2}
    bodies = {(function.name, function.overload) for function in graph.functions}
    for node in markers:
        assert (node.op_type, node.overload) in bodies
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["plugin_namespace"] == b"zonda"
        assert attributes["plugin_version"] == b"1"
    versions = {opset.domain: opset.version for opset in graph.opset_import}
    assert versions == {"": 24, "zonda": 1}


def test_checker_and_strict_shape_inference_are_clean(exported):
    check(exported[0])


def test_batch_sequence_capacity_and_logits_are_dynamic(exported):
    graph = ir.load(exported[0] / UNIVERSAL).graph
    shapes = {value.name: [str(d) for d in value.shape] for value in (*graph.inputs, *graph.outputs)}
    assert shapes["input_ids"] == ["batch", "sequence"]
    assert shapes["logit_positions"] == ["batch", "num_logits"]
    assert shapes["past_key_values.1.value"] == shapes["present.1.value"] == ["batch", "2", "capacity", "16"]
    assert shapes["logits"] == ["batch", "num_logits", "61"]


def test_no_path_or_trace_of_the_exporting_machine_is_left(exported):
    data = (exported[0] / UNIVERSAL).read_bytes()
    assert b"/models/" not in data
    assert b"pkg.torch" not in data


def test_a_tied_head_is_stored_once(exported):
    size = (exported[0] / "onnx/weights.bin").stat().st_size
    model = exported[1]
    parameters = sum({id(p): p.numel() for p in model.parameters()}.values())
    tables = 2 * ROWS * 8
    assert 4 * (parameters + tables) <= size < 4 * (parameters + tables) + 64 * 64


def test_packed_weights_are_ranges_over_the_same_bytes(exported):
    universal, lowered = (ir.load(exported[0] / f).graph for f in (UNIVERSAL, LOWERED))
    parts = [universal.initializers[f"model.layers.0.self_attn.{p}_proj.weight"].const_value.numpy() for p in "qkv"]
    packed = lowered.initializers["model.layers.0.self_attn.q_proj.weight.packed"].const_value.numpy()
    np.testing.assert_array_equal(packed, np.concatenate(parts))


def test_lowering_leaves_no_marker_where_the_fused_operators_fit(exported):
    lowered = ir.load(exported[0] / LOWERED)
    operators = [node.op_type for node in lowered.graph]
    assert not any(node.domain == DOMAIN for node in lowered.graph)
    assert operators.count("GroupQueryAttention") == 2
    assert operators.count("SkipSimplifiedLayerNormalization") == 4
    assert operators.count("FusedMatMul") == 2 * 5 + 1
    assert not lowered.functions


SECOND_EXPORT = """
import runpy, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
runpy.run_path({file!r})["make"](Path({out!r}))
"""


def test_exported_again_by_another_process_the_bytes_are_the_same(exported, tmp_path, request):
    """Hash randomisation differs between processes; nothing may depend on the order of a set."""
    script = SECOND_EXPORT.format(tests=str(request.config.rootpath / "tests"), file=__file__, out=str(tmp_path))
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONHASHSEED": "7", "PATH": ""})
    for file in (UNIVERSAL, LOWERED, "onnx/weights.bin"):
        assert (tmp_path / file).read_bytes() == (exported[0] / file).read_bytes(), file


def quantised(rows: int) -> Llama:
    """A Llama with quantised layers of every form in it."""
    model = Llama(CONFIG, rows)
    model.lm_head = layers.QLinear(64, 61, Form(8, 32, offsets=False))
    for block, bits in zip(model.model.layers, (4, 8), strict=True):
        block.mlp.up_proj = layers.QLinear(64, 96, Form(bits, 32, offsets=True))
        block.mlp.down_proj = layers.QLinear(96, 64, Form(bits, 16, offsets=False))
        block.input_layernorm = layers.QRmsNorm(64, 1e-6)
    return model


def test_quantised_layers_go_through_the_same_line(tmp_path):
    """Eager, universal and lowered agree on QLinear (4 and 8 bits, with and without offsets) and QRmsNorm."""
    model, module = make(tmp_path, quantised)
    check(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 61, (2, 12))
    steps = [[7, 4], [1, 1], [3, 5]]
    wanted = run_scenario(Eager(model, 2, ROWS), tokens, steps)
    scale = max(np.abs(row).max() for row in wanted)
    plain = run_scenario(PlainOnnx(tmp_path / UNIVERSAL, module.kv_shapes, 2, ROWS), tokens, steps)
    engine = open_engine(tmp_path, module, 61, capacity=20, max_chunk=12)
    lowered = run_scenario(Lowered(engine, 2), tokens, steps)
    for want, universal_row, lowered_row in zip(wanted, plain, lowered, strict=True):
        np.testing.assert_allclose(universal_row, want, rtol=0, atol=1e-5 * scale)
        np.testing.assert_allclose(lowered_row, want, rtol=0, atol=1e-5 * scale)
