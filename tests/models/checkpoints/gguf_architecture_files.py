"""GGUF files of every architecture as llama.cpp's converter writes them, from random models of transformers."""

import re
from dataclasses import dataclass, field

import gguf
import numpy as np
import torch
import transformers
from checkpoint_files import add_value, finish, metadata, permute
from gguf import MODEL_ARCH as ARCH
from gguf import GGMLQuantizationType as Type
from gguf.quants import quantize
from support import SMALL, randomise

VOCAB = 270
SIZES = SMALL | {"vocab_size": VOCAB, "max_position_embeddings": 128, "pad_token_id": 0}
HEADS_OF_32 = {"attention.key_length": 32, "attention.value_length": 32}
RMS = {"attention.layer_norm_rms_epsilon": np.float32(1e-6)}
LAYER_NORM = {"attention.layer_norm_epsilon": np.float32(1e-5)}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.1 * i for i in range(4)],
    "long_factor": [1.5 + i for i in range(4)],
    "original_max_position_embeddings": 32,
    "partial_rotary_factor": 0.5,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1.5e5,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 64,
    "truncate": False,
}
GGUF_YARN = {
    "rope.freq_base": np.float32(1.5e5),
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": np.float32(32.0),
    "rope.scaling.original_context_length": 64,
    "rope.scaling.yarn_beta_fast": np.float32(32.0),
    "rope.scaling.yarn_beta_slow": np.float32(1.0),
}


@dataclass
class Case:
    """A model: transformers' configuration, and what the converter writes besides the sizes."""

    family: str
    arch: gguf.MODEL_ARCH
    config: dict = field(default_factory=dict)
    metadata: dict = field(default_factory=dict)
    epsilon: dict = field(default_factory=lambda: RMS)


CASES = {
    "qwen2": Case("qwen2", ARCH.QWEN2, {"tie_word_embeddings": True}, {"rope.freq_base": np.float32(1e4)}),
    "qwen3": Case("qwen3", ARCH.QWEN3, {"head_dim": 32}, HEADS_OF_32),
    "gemma": Case("gemma", ARCH.GEMMA, {"head_dim": 32}, HEADS_OF_32),
    "gemma 2": Case(
        "gemma2",
        ARCH.GEMMA2,
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
    "gemma 3": Case(
        "gemma3_text",
        ARCH.GEMMA3,
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
    "phi 2": Case(
        "phi",
        ARCH.PHI2,
        {"num_key_value_heads": 4, "intermediate_size": 256, "hidden_act": "gelu_new"},
        {"rope.dimension_count": 8},
        LAYER_NORM,
    ),
    "phi 3": Case(
        "phi3",
        ARCH.PHI3,
        {"sliding_window": 6, "rms_norm_eps": 1e-6, "partial_rotary_factor": 0.5},
        {
            "attention.sliding_window": 6,
            "rope.dimension_count": 8,
            "rope.scaling.original_context_length": 128,
        },
    ),
    "phi 3, long": Case(
        "phi3",
        ARCH.PHI3,
        {"rms_norm_eps": 1e-6, "rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
        {
            "attention.sliding_window": 0,
            "rope.dimension_count": 8,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.attn_factor": np.float32((1 + np.log(4) / np.log(32)) ** 0.5),
        },
    ),
    "starcoder 2": Case("starcoder2", ARCH.STARCODER2, {"sliding_window": None}, {}, LAYER_NORM),
    "starcoder 2, no biases": Case(
        "starcoder2",
        ARCH.STARCODER2,
        {"sliding_window": 5, "use_bias": False, "tie_word_embeddings": False},
        {"attention.sliding_window": 5},
        LAYER_NORM,
    ),
    "stablelm": Case(
        "stablelm",
        ARCH.STABLELM,
        {"use_qkv_bias": True},
        {"rope.dimension_count": 4, "use_parallel_residual": True},  # which the converter writes whatever the model is
        LAYER_NORM,
    ),
    "stablelm, parallel": Case(
        "stablelm",
        ARCH.STABLELM,
        {"use_parallel_residual": True, "qk_layernorm": True, "partial_rotary_factor": 0.5},
        {"rope.dimension_count": 8, "use_parallel_residual": True},
        LAYER_NORM,
    ),
    "olmo 2": Case("olmo2", ARCH.OLMO2, {"rms_norm_eps": 1e-6}),
    "granite": Case(
        "granite",
        ARCH.GRANITE,
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
    "mixtral": Case(
        "mixtral",
        ARCH.LLAMA,
        {"num_local_experts": 5, "num_experts_per_tok": 2, "rms_norm_eps": 1e-6},
        {
            "expert_count": 5,
            "expert_used_count": 2,
            "rope.freq_base": np.float32(1e6),
            "rope.dimension_count": 16,
            "vocab_size": VOCAB,
        },
    ),
    "qwen 3 moe": Case(
        "qwen3_moe",
        ARCH.QWEN3MOE,
        {
            "head_dim": 32,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
        },
        HEADS_OF_32 | {"expert_count": 5, "expert_used_count": 2, "expert_feed_forward_length": 40},
    ),
    "gpt-oss": Case(
        "gpt_oss",
        ARCH.GPT_OSS,
        {
            "head_dim": 32,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
            "rms_norm_eps": 1e-6,
            "rope_parameters": YARN,
        },
        HEADS_OF_32
        | GGUF_YARN
        | {
            "attention.sliding_window": 6,
            "expert_count": 5,
            "expert_used_count": 2,
            "expert_feed_forward_length": 96,
        },
    ),
    "smollm 3": Case(
        "smollm3",
        ARCH.SMOLLM3,
        {"num_hidden_layers": 4, "rope_parameters": {"rope_theta": 5e6}},
        {"rope.freq_base": np.float32(5e6), "rope.dimension_count": 16},
    ),
}
PERMUTED = {"granite", "smollm3", "mixtral"}  # those whose converter is a subclass of Llama's


def make_reference(case: Case) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.for_model(case.family, **SIZES | case.config)
    hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(hf, norm=0.0 if case.family.startswith("gemma") else 1.0)
    return hf


def write(path, case: Case, hf: transformers.PreTrainedModel, kind: Type = Type.F32, older: str = ""):
    """As llama.cpp's converter does; experts are stored as `kind`.

    older: what an early version did otherwise: "experts" by themselves, or "qkv" in one tensor.
    """
    name, config = gguf.MODEL_ARCH_NAMES[case.arch], hf.config
    writer = gguf.GGUFWriter(path, name)
    sizes = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
    }
    values = {f"{name}.{key}": value for key, value in (sizes | case.epsilon | case.metadata).items()}
    tokenizer = {key: value for key, value in metadata().items() if key.startswith("tokenizer.")}
    for key, value in (values | tokenizer).items():
        add_value(writer, key, value)
    names = gguf.get_tensor_name_map(case.arch, config.num_hidden_layers)
    merged: dict[str, list[np.ndarray]] = {}
    for key, tensor in _tensors(hf).items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.contiguous().numpy()
        if case.family.startswith("gemma") and key.endswith("norm.weight"):
            array = array + 1
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
        if heads and case.family in PERMUTED:
            array = permute(array, heads)
        stored = names.get_name(key, (".weight", ".bias"))
        if older == "experts" and "_exps.weight" in stored:
            for expert, matrix in enumerate(array):
                writer.add_tensor(stored.replace("_exps", f".{expert}"), matrix)
        elif older == "qkv" and (part := re.search(r"attn_[qkv]\.", stored)):
            merged.setdefault(stored.replace(part[0], "attn_qkv."), []).append(array)
        elif "_exps.weight" in stored and kind != Type.F32:
            writer.add_tensor(stored, quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, array)
    for name, arrays in merged.items():
        writer.add_tensor(name, np.concatenate(arrays))
    for length in ("long", "short"):
        if factors := config.rope_parameters.get(f"{length}_factor"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.float32(factors))
    finish(writer)


def _tensors(hf: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """As the converter stores them: gate and up of stacked experts apart, norms of heads stacked, nothing transposed."""
    tensors: dict[str, torch.Tensor] = {}
    norms: dict[str, list[torch.Tensor]] = {}
    for key, tensor in hf.state_dict().items():
        module, _, last = key.rpartition(".")
        if module.endswith("experts"):
            name, kind = last.removesuffix("_bias"), "bias" if last.endswith("_bias") else "weight"
            rows = tensor.mT if hf.config.model_type == "gpt_oss" and kind == "weight" else tensor
            if name == "down_proj":
                parts = {"down_proj": rows}
            elif hf.config.model_type == "gpt_oss":  # whose rows of gate and up take turns
                parts = {"gate_proj": rows[:, 0::2], "up_proj": rows[:, 1::2]}
            else:
                parts = dict(zip(("gate_proj", "up_proj"), rows.chunk(2, 1), strict=True))
            tensors |= {f"{module}.{name}.{kind}": part for name, part in parts.items()}
        elif ".norms." in key:
            norms.setdefault(key.partition(".norms.")[0] + ".weight", []).append(tensor)
        else:
            tensors[f"{key}.weight" if last == "sinks" else key] = tensor
    return tensors | {key: torch.stack(rows) for key, rows in norms.items()}
