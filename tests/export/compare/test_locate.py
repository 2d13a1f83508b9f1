"""A planted fault is found in its link, and named: layer, module, marker, and why if that is simple."""

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from zonda.export.compare import locate_in_build
from zonda.export.compare.steps import pseudo_random_prompts
from zonda.export.describe import make_contract
from zonda.models import ops
from zonda.models.llama import Attention, Llama
from zonda.runtime.engines import onnxruntime as target

from .planting import LIMITS, VOCABULARY, attribute, export, node, replace_weight

UNIVERSAL, LOWERED = "universal.onnx", "onnxruntime.onnx"


@pytest.fixture
def unfinished(exported, tmp_path):
    return exported.copy(tmp_path / "copy")


def test_a_clean_build_gives_no_finding(exported):
    spec = make_contract(exported.module.kv_shapes, VOCABULARY)
    prompts = pseudo_random_prompts(VOCABULARY)
    assert locate_in_build(exported.folder, exported.module, exported.load, spec, LIMITS, prompts) is None
    assert exported.caught() is None


@pytest.mark.parametrize(
    ("file", "name", "stage"),
    [(UNIVERSAL, "eps", "export"), (LOWERED, "epsilon", "lowering")],
    ids=["export", "lowering"],
)
def test_an_eps_that_is_ten_times_too_large(unfinished, file, name, stage):
    def change(model):
        attribute(node(model, "rms_norm_1"), name).f *= 10

    unfinished.edit(file, change)
    found = unfinished.locate()
    assert (found.stage, found.layer, found.marker) == (stage, 0, "RmsNorm")
    assert found.module == "model.layers.0.post_attention_layernorm"
    assert found.explanation == "eps is 0.0001 instead of 1e-05"


def test_tables_of_another_theta_in_the_lowering(unfinished):
    def change(model):
        for tensor in [i for i in model.graph.initializer if "rotary" in i.name]:
            rows, half = tensor.dims
            angles = torch.arange(rows)[:, None] * 500_000.0 ** (-torch.arange(half) / half)
            replace_weight(model, tensor.name, angles.cos() if "cos" in tensor.name else angles.sin())

    unfinished.edit(LOWERED, change)
    found = unfinished.locate()
    assert (found.stage, found.layer, found.marker, found.operator) == ("lowering", 0, "RoPE", "GroupQueryAttention")
    assert "rotary_emb.cos differs" in found.explanation
    assert {place.marker for place in found.also} == {"RoPE"}


@pytest.mark.parametrize(
    ("file", "operator", "name", "stage"),
    [
        (UNIVERSAL, "RoPE", "interleaved", "export"),
        (LOWERED, "GroupQueryAttention", "rotary_interleaved", "lowering"),
    ],
    ids=["export", "lowering"],
)
def test_pairs_that_are_interleaved_instead_of_half_split(unfinished, file, operator, name, stage):
    def change(model):
        _, second = (n for n in model.graph.node if n.op_type == operator)
        attribute(second, name).i = 1

    unfinished.edit(file, change)
    found = unfinished.locate()
    assert (found.stage, found.layer, found.marker) == (stage, 1, "RoPE")
    assert found.explanation == "interleaved is 1 instead of 0"


def test_a_scaled_weight_block(unfinished):
    model = onnx.load(unfinished.folder / "onnx" / UNIVERSAL, load_external_data=False)
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = next(i for i in model.graph.initializer if i.name == name)
    offset = int(next(e.value for e in tensor.external_data if e.key == "offset"))
    data = np.memmap(unfinished.folder / "onnx/weights.bin", np.float32, "r+", offset, (32,))
    data *= np.float32(1.05)
    data.flush()
    found = unfinished.locate()
    assert (found.stage, found.layer, found.module, found.marker) == (
        "export",
        1,
        name.removesuffix(".weight"),
        "Linear",
    )
    assert found.explanation == f"its {name} differs in 32 of 3,072 values, first at [0, 0], 1.05 times as large"


def test_swapped_key_and_value_rows_in_the_packed_projection(unfinished):
    q, k, v = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv")
    rows = torch.cat([unfinished.load(name) for name in (q, v, k)])
    unfinished.edit(LOWERED, lambda model: replace_weight(model, f"{q}.packed", rows))
    found = unfinished.locate()
    assert (found.stage, found.layer, found.module) == ("lowering", 1, "model.layers.1.self_attn")
    assert "(model.layers.1.self_attn.k_proj) belongs is" in found.explanation
    assert "v_proj" in found.explanation


def test_swapped_key_value_heads_in_the_lowering(unfinished):
    q, k, v = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv")
    keys = unfinished.load(k).unflatten(0, (2, 16)).flip(0).flatten(0, 1)
    rows = torch.cat([unfinished.load(q), keys, unfinished.load(v)])
    unfinished.edit(LOWERED, lambda model: replace_weight(model, f"{q}.packed", rows))
    found = unfinished.locate()
    assert (found.stage, found.layer) == ("lowering", 1)
    assert "k_proj) are in another order" in found.explanation


def test_a_bypassed_residual_add(unfinished):
    add = next(n for n in _graph(unfinished, UNIVERSAL) if n.op_type == "Add").output[0]

    def change(model):
        made = node(model, add)
        other = made.input[1]
        for reader in model.graph.node:
            for place, name in enumerate(reader.input):
                if name == add:
                    reader.input[place] = other
        model.graph.node.remove(made)

    unfinished.edit(UNIVERSAL, change)
    found = unfinished.locate()
    assert (found.stage, found.layer, found.module, found.marker, found.tensor) == (
        "export",
        0,
        "model.layers.0",
        "Add",
        add,
    )
    assert found.explanation.startswith("the residual add is bypassed")


def test_an_attention_that_sees_one_token_ahead(unfinished):
    def change(model):
        body = next(f for f in model.functions if f.name == "CachedAttention")
        place, compare = next((i, n) for i, n in enumerate(body.node) if n.op_type == "LessOrEqual")
        one = helper.make_node("Constant", [], ["ahead"], value_int=1)
        later = helper.make_node("Add", [compare.input[1], "ahead"], ["later"])
        compare.input[1] = "later"
        body.node.insert(place, later)
        body.node.insert(place, one)

    unfinished.edit(UNIVERSAL, change)
    found = unfinished.locate()
    assert (found.stage, found.layer, found.marker) == ("export", 0, "CachedAttention")
    assert [place.marker for place in found.also] == ["CachedAttention"]


def test_a_head_of_other_rows(unfinished):
    rows = unfinished.load("lm_head.weight").roll(1, 0)
    unfinished.edit(UNIVERSAL, lambda model: replace_weight(model, "lm_head.weight", rows))
    found = unfinished.locate()
    assert (found.stage, found.layer, found.module, found.tensor) == ("export", None, "lm_head", "logits")
    assert "its lm_head.weight differs" in found.explanation


@pytest.mark.parametrize(("file", "stage"), [(UNIVERSAL, "export"), (LOWERED, "lowering")])
def test_keys_bound_to_the_neighbouring_layer(unfinished, file, stage):
    swapped = {"present.0.key": "present.1.key", "present.1.key": "present.0.key"}

    def change(model):
        for n in model.graph.node:
            for names in (n.input, n.output):
                names[:] = [swapped.get(name, name) for name in names]

    unfinished.edit(file, change)
    found = unfinished.locate()
    assert (found.stage, found.layer, found.marker) == (stage, 0, "KvCacheUpdate")
    assert found.explanation == "layer 0's keys are written elsewhere: here are layer 1's keys"


def test_a_graph_that_fails_is_a_finding(unfinished):
    def change(model):
        counted = next(n for n in model.graph.node if n.op_type == "Sub")
        counted.input[1] = "zero_i32"

    unfinished.edit(LOWERED, change)
    found = unfinished.locate()
    assert (found.stage, found.layer, found.marker) == ("lowering", 0, "GroupQueryAttention")
    assert "it fails" in found.sentence()


class _OffsetsTooLarge(target.OnnxRuntimeEngine):
    def step(self, cache, first_row, ids, offsets, lens, positions):
        return super().step(cache, first_row, ids, offsets + 1, lens, positions)


class _LastPaddedToken(target.OnnxRuntimeEngine):
    def step(self, cache, first_row, ids, offsets, lens, positions):
        last = positions == lens[:, None] - 1
        return super().step(cache, first_row, ids, offsets, lens, np.where(last, ids.shape[1] - 1, positions))


class _LastPaddedTokenToGenerate(target.OnnxRuntimeEngine):
    def step(self, cache, first_row, ids, offsets, lens, positions):
        wrong = np.full_like(positions, ids.shape[1] - 1)
        return super().step(cache, first_row, ids, offsets, lens, wrong if positions.shape[1] == 1 else positions)


class _KeysToTheNeighbour(target.OnnxRuntimeEngine):
    def _bind_states(self, cache, first_row, batch, key):
        binding = super()._bind_states(cache, first_row, batch, key)
        for state, buffer in (("present.0.key", 2), ("present.1.key", 0)):
            rows = target._share(cache.buffers[buffer][first_row : first_row + batch])
            binding.io.bind_ortvalue_output(state, rows)
        return binding


@pytest.mark.parametrize(
    ("engine", "layer", "marker", "words"),
    [
        (_OffsetsTooLarge, 0, "KV cache", "seqlen_offsets and with them start_offsets_kernel are one too large"),
        (_LastPaddedToken, None, "logits", "a row's last token are those of the last padded token"),
        (_LastPaddedTokenToGenerate, None, "logits", "logit_positions are those of the last padded token"),
        (_KeysToTheNeighbour, 0, "KV cache", "layer 0's keys are written elsewhere: here are layer 1's keys"),
    ],
)
def test_mistakes_of_the_runtime(exported, monkeypatch, engine, layer, marker, words):
    monkeypatch.setattr(target, "OnnxRuntimeEngine", engine)
    found = exported.locate()
    assert (found.stage, found.layer, found.marker) == ("runtime", layer, marker)
    assert words in found.explanation


class _WindowedAttention(Attention):
    def forward(self, x, seqlen_offsets, start_offsets_kernel, kv_cache):
        q, k = self.rotary_emb(self.q_proj(x), self.k_proj(x), start_offsets_kernel)
        keys, values = kv_cache.update(k, self.v_proj(x), seqlen_offsets)
        attended = ops.cached_attention(
            q, keys, values, start_offsets_kernel, None, self.num_heads, self.scale, window=11, softcap=0.0
        )
        return self.o_proj(attended)


def _windowed(config, rows):
    model = Llama(config, rows)
    for block in model.model.layers:
        block.self_attn.__class__ = _WindowedAttention
    return model


def test_a_window_that_is_off_by_one_in_the_lowering(tmp_path):
    unfinished = export(tmp_path / "windowed", _windowed)

    def change(model):
        attribute(node(model, "cached_attention_1"), "local_window_size").i += 1

    unfinished.edit(LOWERED, change)
    found = unfinished.locate()
    assert (found.stage, found.layer, found.marker) == ("lowering", 1, "CachedAttention")
    assert found.explanation == "window is 12 instead of 11"
    assert (found.row, found.token) == (0, 11)  # the first token with more before it than fits


def test_a_finding_is_a_sentence_and_data(unfinished):
    unfinished.edit(UNIVERSAL, lambda model: setattr(attribute(node(model, "rms_norm"), "eps"), "f", 0.5))
    found = unfinished.locate()
    assert found.sentence().startswith(
        "export: the universal graph parts from the traced program at step 0 (ragged prefill), layer 0, "
        "model.layers.0.input_layernorm: RmsNorm, tensor rms_norm, row 0, token 0, off by "
    )
    assert found.reference.norm > found.found.norm > 0
    assert msgspec.json.decode(msgspec.json.encode(found), type=type(found)) == found


def _graph(unfinished, file):
    return onnx.load(unfinished.folder / "onnx" / file, load_external_data=False).graph.node
