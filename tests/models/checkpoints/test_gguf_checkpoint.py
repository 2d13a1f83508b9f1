"""A GGUF as a checkpoint: names, row order, values of every quantised type, and the configuration."""

import tracemalloc

import numpy as np
import pytest
import torch
from checkpoint_files import HEADS, HIDDEN, KV_HEADS, TOKENS, permute, weights, write_model
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from gguf_rows import KINDS, weight_rows

from zonda import CheckpointError, UnsupportedArchitectureError
from zonda.models import registry
from zonda.models.checkpoints import gguf as gguf_module
from zonda.models.checkpoints import open_checkpoint
from zonda.models.loading import match_parameters

QUANTISED = [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.TQ1_0, Type.TQ2_0, Type.MXFP4]
"""Every type that the gguf package can write and read; TQ1_0 and TQ2_0 have blocks of 256."""


def test_float32_tensors_come_back_bit_equal_under_their_hf_names(tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf"))
    expected = weights()
    assert set(checkpoint.tensors) == set(expected)
    for name, array in expected.items():
        assert torch.equal(checkpoint.load(name), torch.from_numpy(array)), name


@pytest.mark.parametrize(("kind", "dtype"), [(Type.F16, torch.float16), (Type.BF16, torch.bfloat16)])
def test_half_precision_stays_half_precision(tmp_path, kind, dtype):
    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf", quant=kind))
    for name, array in weights().items():
        wanted = torch.from_numpy(array).to(dtype) if array.ndim == 2 else torch.from_numpy(array)
        assert torch.equal(checkpoint.load(name), wanted), name
        assert checkpoint.tensors[name].dtype == wanted.dtype


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_quantised_tensors_become_what_the_gguf_package_dequantises(tmp_path, kind):
    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf", quant=kind, hidden=256))
    for name, array in weights(256).items():
        # quantisation works along a row, so it does not see in which order the rows lie
        wanted = dequantize(quantize(array, kind), kind) if array.ndim == 2 else array
        assert torch.equal(checkpoint.load(name), torch.from_numpy(wanted)), name
    assert checkpoint.tensors["model.embed_tokens.weight"].stored == kind.name
    assert checkpoint.tensors["model.norm.weight"].stored == "F32"
    assert checkpoint.source.format == f"GGUF {kind.name}"


@pytest.mark.parametrize(
    "kind",
    [t for t in Type if t.name.startswith(("Q2", "Q3", "Q4_K", "Q5_K", "Q6", "IQ", "NVFP4"))],
    ids=lambda kind: kind.name,
)
def test_types_that_can_only_be_read_are_read(tmp_path, kind):
    block, block_bytes = GGML_QUANT_SIZES[kind]
    rows = np.random.default_rng(0).integers(0, 60, (3, 256 // block * block_bytes), np.uint8)
    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf", extra={"output.weight": (rows, kind)}))
    with np.errstate(all="ignore"):  # random bits make infinite scales
        np.testing.assert_array_equal(checkpoint.load("lm_head.weight").numpy(), dequantize(rows, kind))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_blocks_are_the_loaded_tensor_row_by_row(tmp_path, kind, monkeypatch):
    rows = weight_rows(kind, 256, 256, deviation=1, seed=0)
    extra = {f"blk.0.attn_{name}.weight": (permute(rows, heads), kind) for name, heads in (("q", HEADS), ("v", 1))}
    path = write_model(tmp_path / "m.gguf", extra=extra, drop=list(extra), hidden=256)
    checkpoint = open_checkpoint(path)
    for chunk in (1 << 20, 5 * 256):
        monkeypatch.setattr(gguf_module, "_CHUNK", chunk)
        for name in ("q", "v"):
            tensor = f"model.layers.0.self_attn.{name}_proj.weight"
            blocks = checkpoint.blocks(tensor)
            assert blocks.form == checkpoint.tensors[tensor].form
            assert torch.equal(blocks.dequantize(), checkpoint.load(tensor))
            if name == "q":  # whose rows were permuted
                assert torch.equal(blocks.dequantize(), torch.from_numpy(dequantize(rows, kind)))


def test_a_type_that_cannot_be_read_is_refused_at_once(tmp_path):
    path = write_model(tmp_path / "m.gguf", extra={"blk.0.attn_q.bias": np.zeros(HIDDEN, np.int32)})
    with pytest.raises(CheckpointError, match=r"attn_q\.bias is stored as I32"):
        open_checkpoint(path)


def test_dequantises_chunk_by_chunk_with_the_same_result(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf", quant=Type.Q4_0))
    whole = {name: checkpoint.load(name) for name in checkpoint.tensors}
    monkeypatch.setattr(gguf_module, "_CHUNK", 5 * HIDDEN)
    assert all(torch.equal(checkpoint.load(name), tensor) for name, tensor in whole.items())


def test_loading_takes_little_more_memory_than_the_tensor(tmp_path):
    rows = quantize(np.full((65536, 256), 127, np.float32), Type.Q8_0)
    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf", extra={"output.weight": (rows, Type.Q8_0)}))
    tracemalloc.start()
    values = checkpoint.load("lm_head.weight")  # 64 MiB in torch's own memory, which tracemalloc does not see
    assert tracemalloc.get_traced_memory()[1] < 24 << 20
    tracemalloc.stop()
    assert torch.all(values == 127)


def test_biases_of_q_and_k_follow_their_rows(tmp_path):
    q, k = np.arange(HIDDEN, dtype=np.float32), np.arange(HIDDEN // HEADS * KV_HEADS, dtype=np.float32)
    extra = {"blk.0.attn_q.bias": permute(q, HEADS), "blk.0.attn_k.bias": permute(k, KV_HEADS)}
    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf", extra=extra))
    assert torch.equal(checkpoint.load("model.layers.0.self_attn.q_proj.bias"), torch.from_numpy(q))
    assert torch.equal(checkpoint.load("model.layers.0.self_attn.k_proj.bias"), torch.from_numpy(k))
    assert checkpoint.config["attention_bias"] is True


def test_the_configuration_is_a_config_json_that_the_architecture_reads(tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf"))
    assert checkpoint.config == {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(TOKENS),
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 10_000.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    architecture = registry.of_config(checkpoint.config)
    with torch.device("meta"):
        model = architecture.build(architecture.read_config(checkpoint.config), 8)
    assert match_parameters(model, checkpoint)["lm_head.weight"] == "model.embed_tokens.weight"


def test_a_head_of_its_own_is_not_tied(tmp_path):
    path = write_model(tmp_path / "m.gguf", extra={"output.weight": np.zeros((len(TOKENS), HIDDEN), np.float32)})
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["tie_word_embeddings"] is False
    assert "lm_head.weight" in checkpoint.tensors


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({"llama.rope.scaling.type": "none"}, None),
        ({"llama.rope.scale_linear": np.float32(4)}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": np.float32(2)},
            {"rope_type": "linear", "factor": 2.0},
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": np.float32(2),
                "llama.rope.scaling.original_context_length": 64,
                "llama.rope.scaling.yarn_beta_slow": np.float32(2),
            },
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "beta_slow": 2.0},
        ),
    ],
)
def test_rope_scaling(tmp_path, changes, scaling):
    assert open_checkpoint(write_model(tmp_path / "m.gguf", changes)).config.get("rope_scaling") == scaling


def test_rope_frequency_factors_of_llama_3_become_the_same_tables(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    # the formula of llama.cpp's converter, LlamaModel.generate_extra_tensors
    frequencies = 1 / 10_000 ** (np.arange(0, 8, 2) / 8)
    smooth = np.clip((8192 * frequencies / (2 * np.pi) - 1) / 3, 0, 1)
    factors = (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)
    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf", extra={"rope_freqs.weight": factors}))
    assert "rope_freqs.weight" not in checkpoint.tensors
    read = registry.of_config(checkpoint.config).read_config
    ours = read(checkpoint.config).rope.tables(128)
    reference = read(checkpoint.config | {"rope_scaling": scaling}).rope.tables(128)
    torch.testing.assert_close(ours.cos, reference.cos, rtol=0, atol=2e-5)


REFUSED = {
    "no embedding": ({}, {}, ["token_embd.weight"], "token_embd.weight"),
    "unknown tensor": ({}, {"blk.0.ffn_gate_inp.weight": np.zeros((4, HIDDEN), np.float32)}, (), "ffn_gate_inp"),
    "missing key": ({"llama.block_count": None}, {}, (), "'llama.block_count' is missing"),
    "text for a number": ({"llama.block_count": "one"}, {}, (), "block_count' must be an integer"),
    "too many layers": ({"llama.block_count": 2**32 - 1}, {}, (), "block_count' must be an integer in"),
    "a million layers": ({"llama.block_count": 10**6}, {}, (), "1,000,000, but there are tensors of 1 layers"),
    "no heads": ({"llama.attention.head_count": 0}, {}, (), "head_count' must be"),
    "heads that do not divide": ({"llama.attention.head_count": 5}, {}, (), "not a multiple"),
    "heads per layer": ({"llama.attention.head_count": [4, 4]}, {}, (), "head_count' must be"),
    "eps that is no number": ({"llama.attention.layer_norm_rms_epsilon": np.float32("nan")}, {}, (), "positive number"),
    "theta infinite": ({"llama.rope.freq_base": np.float32("inf")}, {}, (), "positive number"),
    "another vocabulary size": ({"llama.vocab_size": 7}, {}, (), "vocab_size is 7"),
    "partial rotation": ({"llama.rope.dimension_count": 4}, {}, (), "dimension_count 4 differs"),
    "values of another width": ({"llama.attention.value_length": 16}, {}, (), "value_length differs"),
    "unknown scaling": ({"llama.rope.scaling.type": "ntk"}, {}, (), "one of none, linear, yarn, longrope"),
    "longrope without factors": ({"llama.rope.scaling.type": "longrope"}, {}, (), "longrope needs rope_factors_long"),
    "short factors alone": ({}, {"rope_factors_short.weight": np.ones(4, np.float32)}, (), "longrope needs"),
    "scaled twice": (
        {"llama.rope.scale_linear": np.float32(2)},
        {"rope_freqs.weight": np.ones(4, np.float32)},
        (),
        "at once",
    ),
    "attention factor": ({"llama.rope.scaling.attn_factor": np.float32(1.2)}, {}, (), "llama.rope.scaling.attn_factor"),
    "unknown key": (
        {"llama.attention.scale": np.float32(2)},
        {},
        (),
        "may change the mathematics: llama.attention.scale",
    ),
    "too few factors": ({}, {"rope_freqs.weight": np.ones(3, np.float32)}, (), "must hold 4 positive"),
    "a million factors": ({}, {"rope_freqs.weight": np.ones(10**6, np.float32)}, (), "1,000,000 numbers"),
    "factor 0": ({}, {"rope_freqs.weight": np.zeros(4, np.float32)}, (), "must hold 4 positive"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_it_would_compute_wrongly(tmp_path, name):
    changes, extra, drop, words = REFUSED[name]
    path = write_model(tmp_path / "m.gguf", changes, extra, drop)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_keys_that_are_zero_or_known_to_be_harmless_are_accepted(tmp_path):
    changes = {"llama.expert_count": 0, "llama.tensor_data_layout": "Meta AI original pth"}
    open_checkpoint(write_model(tmp_path / "m.gguf", changes))


def test_an_architecture_that_zonda_does_not_have(tmp_path):
    path = write_model(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes().replace(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0lhama", 1))
    with pytest.raises(UnsupportedArchitectureError, match="'lhama'"):
        open_checkpoint(path)


def test_sha256_is_of_the_file(tmp_path):
    import hashlib

    path = write_model(tmp_path / "m.gguf")
    assert open_checkpoint(path).sha256() == {"m.gguf": hashlib.sha256(path.read_bytes()).hexdigest()}
