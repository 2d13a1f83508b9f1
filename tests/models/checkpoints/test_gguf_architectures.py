"""Every architecture that llama.cpp writes: a random model as its converter stores it gives transformers' logits."""

import gguf
import numpy as np
import pytest
import torch
import transformers
from checkpoint_files import add_value, metadata, permute
from support import RELATIVE_TOLERANCE, Eager, randomise, run_scenario

from zonda.models import registry
from zonda.models.checkpoints import open_checkpoint
from zonda.models.loading import load_weights
from zonda.models.stacking import stacked

VOCAB, ROWS = 270, 64
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
HEADS_OF_32 = {"attention.key_length": 32, "attention.value_length": 32}
EPS = {"attention.layer_norm_rms_epsilon": np.float32(1e-6)}

# family -> (llama.cpp's architecture, the HF configuration, what the converter writes besides the sizes)
CASES: dict[str, tuple[gguf.MODEL_ARCH, dict, dict]] = {
    "qwen2": (gguf.MODEL_ARCH.QWEN2, {"tie_word_embeddings": True}, {"rope.freq_base": np.float32(1e4)}),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, {"head_dim": 32}, HEADS_OF_32),
    "gemma": (gguf.MODEL_ARCH.GEMMA, {"head_dim": 32}, HEADS_OF_32),
    "gemma2": (
        gguf.MODEL_ARCH.GEMMA2,
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 9.0,
            "final_logit_softcapping": 25.0,
            "sliding_window": 5,
        },
        HEADS_OF_32
        | {
            "attn_logit_softcapping": np.float32(9.0),
            "final_logit_softcapping": np.float32(25.0),
            "attention.sliding_window": 5,
        },
    ),
    "gemma3_text": (
        gguf.MODEL_ARCH.GEMMA3,
        {
            "head_dim": 32,
            "num_hidden_layers": 6,
            "query_pre_attn_scalar": 32,
            "sliding_window": 5,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        HEADS_OF_32
        | {
            "attention.sliding_window": 5,
            "rope.freq_base": np.float32(1e6),
            "rope.scaling.type": "linear",
            "rope.scaling.factor": np.float32(8.0),
        },
    ),
    "phi3": (
        gguf.MODEL_ARCH.PHI3,
        {"sliding_window": 6, "rms_norm_eps": 1e-6, "partial_rotary_factor": 0.5},
        {
            "attention.sliding_window": 6,
            "rope.dimension_count": 8,
            "rope.scaling.original_context_length": 128,
        },
    ),
    "olmo2": (gguf.MODEL_ARCH.OLMO2, {"rms_norm_eps": 1e-6}, {}),
    "granite": (
        gguf.MODEL_ARCH.GRANITE,
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.125,
            "residual_multiplier": 0.5,
            "logits_scaling": 8.0,
        },
        {
            "embedding_scale": np.float32(3.0),
            "attention.scale": np.float32(0.125),
            "residual_scale": np.float32(0.5),
            "logit_scale": np.float32(8.0),
            "rope.dimension_count": 16,
        },
    ),
    "qwen3_moe": (
        gguf.MODEL_ARCH.QWEN3MOE,
        {
            "head_dim": 32,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
        },
        HEADS_OF_32 | {"expert_count": 5, "expert_used_count": 2, "expert_feed_forward_length": 40},
    ),
    "smollm3": (
        gguf.MODEL_ARCH.SMOLLM3,
        {"num_hidden_layers": 4, "rope_parameters": {"rope_theta": 5e6}},
        {"rope.freq_base": np.float32(5e6), "rope.dimension_count": 16},
    ),
}
PERMUTED = {"granite", "smollm3"}  # those whose converter is a subclass of Llama's


def write(path, family: str, hf: transformers.PreTrainedModel):
    arch, _, added = CASES[family]
    name, config = gguf.MODEL_ARCH_NAMES[arch], hf.config
    writer = gguf.GGUFWriter(path, name)
    sizes = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
    }
    values = {f"{name}.{key}": value for key, value in (sizes | EPS | added).items()}
    tokenizer = {key: value for key, value in metadata().items() if key.startswith("tokenizer.")}
    for key, value in (values | tokenizer).items():
        add_value(writer, key, value)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for key, tensor in _tensors(hf).items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.contiguous().numpy()
        if family.startswith("gemma") and key.endswith("norm.weight"):
            array = array + 1
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
        writer.add_tensor(
            names.get_name(key, (".weight", ".bias")), permute(array, heads) if heads and family in PERMUTED else array
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(hf: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """By the names that the converter knows: it stacks experts, and gate and up stay apart."""
    tensors = {}
    for key, tensor in hf.state_dict().items():
        if key.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, 1)
            tensors |= {key.replace("gate_up", name) + ".weight": t for name, t in (("gate", gate), ("up", up))}
        else:
            tensors[f"{key}.weight" if key.endswith("experts.down_proj") else key] = tensor
    return tensors


@pytest.mark.parametrize("family", CASES)
def test_a_gguf_gives_the_logits_of_the_model_it_was_made_of(family, tmp_path):
    config = transformers.AutoConfig.for_model(family, **SIZES | CASES[family][1])
    hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(hf, norm=0.0 if family.startswith("gemma") else 1.0)
    write(tmp_path / "model.gguf", family, hf)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    architecture = registry.of_config(checkpoint.config)
    assert architecture.names == (type(hf).__name__,)
    checkpoint = stacked(checkpoint, architecture.stacks)
    with torch.device("meta"):
        model = architecture.build(architecture.read_config(checkpoint.config), ROWS).eval()
    load_weights(model, checkpoint, architecture.ignored)
    tokens = np.random.default_rng(1).integers(0, VOCAB, (1, 32))
    with torch.no_grad():
        reference = hf(torch.from_numpy(tokens)).logits.numpy()[0]
    (logits,) = run_scenario(Eager(model, 1, ROWS), tokens, [[20], [12]])
    np.testing.assert_allclose(logits, reference, rtol=0, atol=RELATIVE_TOLERANCE * np.abs(reference).max())


def test_every_layout_is_tested():
    layouts = {a.gguf.name for a in registry.ARCHITECTURES if a.gguf is not None}
    assert layouts == {gguf.MODEL_ARCH_NAMES[arch] for arch, _, _ in CASES.values()} | {"llama"}
