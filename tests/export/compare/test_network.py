"""The traced program, the universal graph and the lowered graph are read into one form, with the same places."""

import onnx
import pytest

from zonda.export.compare.network import of_onnx


@pytest.fixture(scope="module")
def networks(exported):
    graphs = {
        name: of_onnx(onnx.load(exported.folder / f"onnx/{file}.onnx", load_external_data=False).graph)
        for name, file in (("universal", "universal"), ("lowered", "onnxruntime"))
    }
    return {"program": exported.program.network, **graphs}


@pytest.mark.parametrize(
    ("name", "marker", "module"),
    [
        ("rms_norm", "RmsNorm", "model.layers.0.input_layernorm"),
        ("present.1.key", "KvCacheUpdate", "model.layers.1.self_attn"),
        ("present.1.value", "KvCacheUpdate", "model.layers.1.self_attn"),
        ("cached_attention_1", "CachedAttention", "model.layers.1.self_attn"),
        ("linear_4", "Linear", "model.layers.0.mlp.gate_proj"),
        ("add_46", "Add", "model.layers.0"),
        ("logits", "Linear", "lm_head"),
    ],
)
def test_the_universal_graph_says_what_the_program_says(networks, name, marker, module):
    for network in (networks["program"], networks["universal"]):
        value = network.values[name]
        assert (value.marker, value.module) == (marker, module)


def test_fused_outputs_keep_their_names_and_layers(networks):
    lowered = networks["lowered"].values
    for name in ("rms_norm_1", "add_46", "cached_attention_1", "present.1.key", "linear_4", "logits"):
        assert lowered[name].layer == networks["program"].values[name].layer
    assert lowered["add_46"].marker == "Add"
    assert lowered["present.1.key"].operator == "GroupQueryAttention"


def test_settings_have_one_name_everywhere(networks):
    found = {kind: network.values["rms_norm_1"].settings["eps"] for kind, network in networks.items()}
    assert found == pytest.approx(dict.fromkeys(found, 1e-5))
    assert networks["lowered"].values["cached_attention"].settings["window"] == 0


def test_what_lies_between_two_values(networks):
    values, edge = networks["universal"].between(["add_46"], ["cached_attention", "embedding"])
    assert [value.name for value in values] == ["linear_3", "add_46"]
    assert edge == {"cached_attention", "embedding"}
