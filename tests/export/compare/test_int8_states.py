"""Comparing graphs that hold their KV cache in int8: healthy ones agree, and a planted fault is found and named."""

import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file
from support import export_graphs, randomise, states_of_random_rows

from zonda import BundleError
from zonda.export.compare import locate_in_build
from zonda.export.compare.graph import GraphSubject
from zonda.export.compare.steps import pseudo_random_prompts
from zonda.export.describe import make_contract
from zonda.export.onnx_files import CACHE_FORMS, LOWERED
from zonda.models.llama import Llama, LlamaConfig

from .planting import CONFIG, LIMITS, VOCABULARY, attribute, node, replace_weight

ROWS = LIMITS.capacity + LIMITS.max_chunk


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder, module, load) of a model whose attention is no sharper than a trained one's."""
    folder, config = tmp_path_factory.mktemp("int8") / "unfinished", LlamaConfig.read(CONFIG)
    folder.mkdir()
    model = Llama(config, ROWS)
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("q_proj.weight"):
                parameter /= 4
    states = states_of_random_rows(model, VOCABULARY, 60)
    weights = dict(model.named_parameters()) | dict(model.named_buffers())

    def load(name):
        return weights[name].detach()

    return folder, export_graphs(folder, lambda rows: Llama(config, rows), load, ROWS, states), load


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported[0], tmp_path / "copy")


def find(exported, folder):
    _, module, load = exported
    spec = make_contract(module.kv_shapes, VOCABULARY)
    return locate_in_build(folder, module, load, spec, LIMITS, pseudo_random_prompts(VOCABULARY))


def edit(folder, change) -> None:
    model = onnx.load(folder / LOWERED, load_external_data=False)
    change(model)
    (folder / LOWERED).write_bytes(model.SerializeToString())


def scaled(model: onnx.ModelProto, name: str, factor: float) -> None:
    tensor = next(i for i in model.graph.initializer if i.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name))


def branches(model: onnx.ModelProto, output: str) -> list[onnx.NodeProto]:
    """The attention operators, one a branch, that compute `output`."""
    choice = next(n for n in model.graph.node if n.op_type == "If" and output in n.output)
    return [n for a in choice.attribute for n in a.g.node if n.op_type == "GroupQueryAttention"]


def test_a_healthy_build_gives_no_finding(exported):
    assert find(exported, exported[0]) is None


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_scales_in_the_graph_that_are_half_as_large(exported, copy, layer, kind):
    edit(copy, lambda model: scaled(model, f"layer_{layer}.cache.{kind}_scales", 0.5))
    found = find(exported, copy)
    assert (found.stage, found.layer) == ("lowering", layer)
    assert found.module == f"model.layers.{layer}.self_attn"
    assert "GroupQueryAttention" in found.operator


def test_a_file_of_forms_that_is_of_other_scales(exported, copy):
    forms = load_file(copy / CACHE_FORMS)
    forms["past_key_values.1.key.scales"] *= np.float32(2)
    save_file(forms, copy / CACHE_FORMS)
    found = find(exported, copy)
    assert (found.stage, found.layer, found.tensor) == ("lowering", 1, "present.1.key")


def test_a_setting_of_both_branches(exported, copy):
    def change(model):
        for attention in branches(model, "present.1.key"):
            attribute(attention, "rotary_interleaved").i = 1

    edit(copy, change)
    found = find(exported, copy)
    assert (found.stage, found.layer, found.marker) == ("lowering", 1, "RoPE")
    assert found.explanation == "interleaved is 1 instead of 0"


def test_a_norm_before_the_cache(exported, copy):
    edit(copy, lambda model: setattr(attribute(node(model, "rms_norm_2"), "epsilon"), "f", 50.0))
    found = find(exported, copy)
    assert (found.stage, found.layer, found.marker) == ("lowering", 1, "RmsNorm")
    assert found.explanation == "eps is 50 instead of 1e-05"


def test_swapped_rows_of_the_packed_projection(exported, copy):
    """Its values go on to lose their offsets, and it is still the projection that is looked at."""
    q, k, v = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv")
    rows = torch.cat([exported[2](name) for name in (q, v, k)])
    edit(copy, lambda model: replace_weight(model, f"{q}.packed", rows))
    found = find(exported, copy)
    assert (found.stage, found.layer, found.marker, found.module) == (
        "lowering",
        1,
        "Linear",
        "model.layers.1.self_attn",
    )
    assert "(model.layers.1.self_attn.k_proj) belongs is" in found.explanation


def test_a_graph_without_its_file_is_refused(copy):
    (copy / CACHE_FORMS).unlink()
    with pytest.raises(BundleError, match=r"cache\.safetensors is not readable"):
        GraphSubject(copy / LOWERED, "lowered")
