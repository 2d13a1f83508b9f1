"""A KV cache in 8 bits on ONNX Runtime, against the eager model with a cache that numpy rounds.

The emulation knows the file of forms and how a step goes (a short one attends over codes, a long one over what is new
before it is rounded), and nothing of the graph.
"""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support import (
    RELATIVE_TOLERANCE,
    SMALL,
    Eager,
    Lowered,
    export_graphs,
    open_engine,
    randomise,
    run_scenario,
    states_of_random_rows,
)

from zonda.export.lower.int8_cache import SHORTEST_LONG
from zonda.export.onnx_files import CACHE_FORMS
from zonda.models import layers, registry
from zonda.models.cache import LayerCache

CAPACITY, CHUNK, VOCAB = 40, 24, 131
ROWS = CAPACITY + CHUNK
SIZES = SMALL | {"vocab_size": VOCAB, "max_position_embeddings": 96}
STEPS = {
    "short steps": [[5], [1], [4], [1], [7], [1], [1], [2]],
    "long steps, then short ones": [[16], [16], [1], [4]],
    "ragged rows, some idle": [[16, 3, 0, 9], [1, 5, 2, 0], [0, 4, 4, 1], [1, 12, 16, 10], [1, 0, 1, 1]],
    "a chunk beside rows that are full": [[20, 0, 4], [19, 0, 4], [1, 24, 0], [0, 4, 1], [0, 12, 1]],
}
MODELS = {
    "grouped": ("LlamaForCausalLM", {}),
    "multi-head": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "multi-query, window": ("MistralForCausalLM", {"sliding_window": 5, "num_key_value_heads": 1}),
    "neighbours rotated": ("LlamaForCausalLM", {"head_dim": 32, "interleaved": True}),
    "rotated outside the operator": ("LlamaForCausalLM", {"head_dim": 24}),
    "biases": ("Qwen2ForCausalLM", {}),
    "a norm a head": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "caps, window": (
        "Gemma2ForCausalLM",
        {"head_dim": 16, "attn_logit_softcapping": 8.0, "query_pre_attn_scalar": 20, "sliding_window": 9},
    ),
    "a part rotated": ("StableLmForCausalLM", {"use_qkv_bias": True, "partial_rotary_factor": 0.5, "hidden_size": 128}),
    "a layer not rotated": ("SmolLM3ForCausalLM", {"no_rope_layer_interval": 2}),
    "sinks, window": (
        "GptOssForCausalLM",
        {
            "head_dim": 16,
            "num_local_experts": 1,
            "num_experts_per_tok": 1,
            "sliding_window": 5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}


class RoundedCache(LayerCache):
    """Codes of int8 and the form of each state: (scales, offsets), (Hkv, D) each."""

    def __init__(self, held: LayerCache, forms: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        self.codes = [np.zeros(state.shape, np.int8) for state in (held.key, held.value)]
        self.forms = [tuple(part.astype(np.float64)[None, :, None] for part in form) for form in forms]

    def update(self, key, value, seqlen_offsets):
        return tuple(self._write(i, new.numpy(), seqlen_offsets.numpy()) for i, new in enumerate((key, value)))

    def _write(self, index: int, new: np.ndarray, offsets: np.ndarray) -> torch.Tensor:
        codes, (scales, shift) = self.codes[index], self.forms[index]
        heads = new.reshape(*new.shape[:2], codes.shape[1], -1).swapaxes(1, 2)  # (B, Hkv, S, D)
        rounded = np.clip(np.rint((heads - shift) / scales), -128, 127)
        exact = heads.shape[2] >= SHORTEST_LONG
        seen = codes * scales + shift
        for row, offset in enumerate(offsets):
            place = row, slice(None), slice(offset, offset + heads.shape[2])
            codes[place] = rounded[row]
            seen[place] = heads[row] if exact else (rounded * scales + shift)[row]
        return torch.from_numpy(seen.astype(np.float32))


class Emulation(Eager):
    """The eager model with `RoundedCache`s."""

    def __init__(self, model, rows: int, forms: dict[str, np.ndarray]) -> None:
        super().__init__(model, rows, ROWS)
        for number, layer in enumerate(self.cache.layers):
            name = f"past_key_values.{number}"
            scales = [forms[f"{name}.{kind}.scales"] for kind in ("key", "value")]
            offsets = np.zeros_like(scales[0]), forms[f"{name}.value.offsets"]
            self.cache.layers[number] = RoundedCache(layer, list(zip(scales, offsets, strict=True)))


def build(name: str, change: dict, rows: int):
    architecture = registry.find(name)
    interleaved = change.get("interleaved", False)
    config = architecture.read_config(SIZES | {key: value for key, value in change.items() if key != "interleaved"})
    model = architecture.build(config, rows)
    for module in model.modules():
        if isinstance(module, layers.RotaryEmbedding):
            module.interleaved = interleaved
    return model.eval()


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    """(eager model, engine with a cache in int8, its forms)."""
    name, change = MODELS[request.param]
    model = build(name, change, ROWS)
    randomise(model, norm=0.0 if name.startswith("Gemma") else 1.0)
    directory = tmp_path_factory.mktemp("graphs")
    load, states = dict(model.state_dict()).__getitem__, states_of_random_rows(model, VOCAB, CAPACITY)
    module = export_graphs(directory, lambda rows: build(name, change, rows), load, ROWS, states)
    engine = open_engine(directory, module, VOCAB, capacity=CAPACITY, max_chunk=CHUNK)
    yield model, engine, load_file(directory / CACHE_FORMS)
    engine.close()


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_a_step_computes_what_rounded_states_give(case, steps):
    """As exactly as with floats, unless a state that lies between two codes falls the other way."""
    model, engine, forms = case
    lens = np.sum(steps, axis=0)
    tokens = np.random.default_rng(1).integers(0, VOCAB, (len(lens), CAPACITY))
    emulation, lowered = Emulation(model, len(lens), forms), Lowered(engine, len(lens))
    wanted, found, exact = (
        np.concatenate(run_scenario(executor, tokens, steps))
        for executor in (emulation, lowered, Eager(model, len(lens), ROWS))
    )
    codes = [codes for layer in emulation.cache.layers for codes in layer.codes]
    apart = np.concatenate(
        [
            np.abs(w[row, :, :length].astype(int) - f[row, :, :length]).ravel()
            for w, f in zip(codes, lowered.cache.buffers, strict=True)
            for row, length in enumerate(lens)
        ]
    )
    scale, rounding = np.abs(exact).max(), np.abs(wanted - exact).max()
    assert RELATIVE_TOLERANCE * 100 * scale < rounding < 0.3 * scale
    assert apart.max() <= 1
    assert apart.mean() < 1e-3
    allowed = rounding / 10 if apart.any() else RELATIVE_TOLERANCE * scale
    np.testing.assert_allclose(found, wanted, rtol=0, atol=allowed)


def test_the_cache_read_as_floats_is_the_state_that_was_attended_to(case):
    _, engine, forms = case
    tokens = np.random.default_rng(2).integers(0, VOCAB, (2, CAPACITY))
    lowered = Lowered(engine, 2)
    run_scenario(lowered, tokens, [[3, 5], [16, 12]])
    for row, length in enumerate((19, 17)):
        held = zip(lowered.cache.read(row, length), lowered.cache.buffers, strict=True)
        for number, (read, codes) in enumerate(held):
            name = f"past_key_values.{number // 2}.{('key', 'value')[number % 2]}"
            scales = forms[f"{name}.scales"]
            offsets = forms.get(f"{name}.offsets", np.zeros_like(scales))
            wanted = codes[row, :, :length] * scales[:, None] + offsets[:, None]
            np.testing.assert_allclose(read, wanted, rtol=1e-6, atol=1e-6)
