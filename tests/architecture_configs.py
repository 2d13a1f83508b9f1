"""The configurations that tests of architectures run: what each family can be told to compute, on two small layers.

Windows are shorter than the sequences.
"""

import transformers
from support import SMALL, randomise

CAPACITY, CHUNK, VOCAB = 64, 32, 131
ROWS = CAPACITY + CHUNK

SIZES = SMALL | {"vocab_size": VOCAB, "max_position_embeddings": ROWS, "pad_token_id": 0}
LLAMA = {
    "hidden_size": 96,
    "intermediate_size": 144,
    "num_attention_heads": 6,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 5e5,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "rope_theta": 5e4}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 9 for i in range(8)],
    "long_factor": [2.0 + i / 3 for i in range(8)],
    "rope_theta": 1e4,
}
OLD_LONGROPE = {key: value for key, value in LONGROPE.items() if key != "rope_theta" and key != "rope_type"} | {
    "type": "longrope"
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.4,
    "logits_scaling": 7.0,
}
GEMMA_CAPS = {"attn_logit_softcapping": 8.0, "final_logit_softcapping": 25.0}
GEMMA_LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
QWEN_EXPERTS = {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}

CONFIGS: dict[str, dict[str, dict]] = {
    "llama": {
        "multi-head": LLAMA | {"num_key_value_heads": 6},
        "3 heads a group, tied": LLAMA | {"tie_word_embeddings": True},
        "4 heads a group": LLAMA | {"num_attention_heads": 8, "hidden_size": 128},
        "biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
        "head_dim 24, not hidden/heads": LLAMA | {"head_dim": 24},
        "head_dim 10, no fused attention": LLAMA | {"head_dim": 10},
        "llama3 rope": LLAMA | {"rope_parameters": LLAMA3},
        "yarn rope": LLAMA | {"rope_parameters": YARN},
    },
    "mistral": {
        "window 5 in every layer": {"sliding_window": 5},
        "no window, head_dim not hidden/heads": {"sliding_window": None, "head_dim": 32},
        "window 1, multi-query": {"sliding_window": 1, "num_key_value_heads": 1},
        "head_dim 12, no fused attention": {"sliding_window": 7, "head_dim": 12},
    },
    "qwen2": {
        "no windows, tied": {"tie_word_embeddings": True},
        "window in the upper layer": QWEN_WINDOW,
        "layer types": QWEN_WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},
        "yarn": {"rope_parameters": YARN, "num_key_value_heads": 4},
    },
    "qwen3": {
        "plain, tied": {"head_dim": 16, "tie_word_embeddings": True},
        "window in the upper layer, head_dim 32": QWEN_WINDOW | {"head_dim": 32, "rms_norm_eps": 1e-5},
        "biases, yarn": {"head_dim": 16, "attention_bias": True, "rope_parameters": YARN},
        "head_dim 12, no fused attention": {"head_dim": 12},
    },
    "gemma": {
        "multi-head, head_dim 32": {"num_key_value_heads": 4, "head_dim": 32},
        "multi-query, not tied": {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": False},
        "biases, linear rope": {"head_dim": 16, "attention_bias": True, "rope_parameters": LINEAR},
    },
    "gemma2": {
        "window 5 in the lower layer": {"head_dim": 16, "sliding_window": 5},
        "tight caps, a scale of its own": GEMMA_CAPS
        | {"head_dim": 32, "query_pre_attn_scalar": 20, "sliding_window": 9},
        "no caps, layer types": {
            "head_dim": 16,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 3,
        },
        "head_dim 12, no fused attention": GEMMA_CAPS | {"head_dim": 12, "sliding_window": 6},
    },
    "gemma3_text": {
        "local and global": GEMMA_LAYERS | {"head_dim": 16, "sliding_window": 5},
        "linear scaling of the global RoPE": GEMMA_LAYERS
        | {
            "head_dim": 32,
            "sliding_window": 7,
            "query_pre_attn_scalar": 40,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
        "final cap, only windows": {"head_dim": 16, "sliding_window": 4, "final_logit_softcapping": 20.0},
    },
    "phi3": {
        "multi-head, window 6": {"num_key_value_heads": 4, "sliding_window": 6},
        "long factors, partial rotary": {"rope_parameters": LONGROPE | {"partial_rotary_factor": 0.5}}
        | {"original_max_position_embeddings": 24, "hidden_size": 128},
        "short factors": {"original_max_position_embeddings": ROWS, "rope_parameters": LONGROPE}
        | {"max_position_embeddings": 4 * ROWS, "tie_word_embeddings": True},
        "head_dim 12, no fused attention": {"hidden_size": 48},
    },
    "phi": {
        "half of each head turns": {"hidden_act": "gelu_new", "hidden_size": 128},
        "a quarter turns, tied": {"partial_rotary_factor": 0.25, "tie_word_embeddings": True},
        "all of head_dim 20 turns": {"partial_rotary_factor": 1.0, "hidden_size": 80, "layer_norm_eps": 1e-4},
    },
    "starcoder2": {
        "window 5": {"sliding_window": 5},
        "no window, no biases": {"sliding_window": None, "use_bias": False, "tie_word_embeddings": False},
        "multi-query, linear rope": {"num_key_value_heads": 1, "rope_parameters": LINEAR, "norm_epsilon": 1e-4},
    },
    "stablelm": {
        "sequential": {"num_key_value_heads": 4},
        "parallel, a norm a head": {"use_parallel_residual": True, "qk_layernorm": True, "hidden_size": 128},
        "biases, half of each head turns": {"use_qkv_bias": True, "partial_rotary_factor": 0.5},
        "sequential, a norm a head": {"qk_layernorm": True, "layer_norm_eps": 1e-4},
    },
    "olmo2": {
        "multi-head": {"num_key_value_heads": 4},
        "grouped, tied": {"tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 5e5}},
        "biases, yarn": {"attention_bias": True, "rope_parameters": YARN, "hidden_size": 128},
    },
    "granite": {
        "all multipliers": GRANITE,
        "no multipliers but the attention's, tied": {"attention_multiplier": 0.25, "tie_word_embeddings": True},
        "biases": GRANITE | {"attention_bias": True, "mlp_bias": True, "head_dim": 24},
    },
    "smollm3": {
        "the second layer does not turn": {"no_rope_layer_interval": 2},
        "windows where it does not turn": {
            "no_rope_layers": [0, 1],
            "use_sliding_window": True,
            "sliding_window": 5,
            "tie_word_embeddings": False,
        },
        "biases, no layer turns": {"no_rope_layers": [0, 0], "attention_bias": True, "mlp_bias": True},
        "head_dim 12, no fused attention": {"no_rope_layer_interval": 2, "head_dim": 12},
    },
    "mixtral": {
        "2 of 5 experts": {"num_local_experts": 5, "num_experts_per_tok": 2},
        "1 of 4, window 5, tied": {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "sliding_window": 5,
            "tie_word_embeddings": True,
        },
        "all of 3, head_dim 12, no fused attention": {
            "num_local_experts": 3,
            "num_experts_per_tok": 3,
            "head_dim": 12,
        },
    },
    "qwen2_moe": {
        "a shared expert": QWEN_EXPERTS | {"shared_expert_intermediate_size": 48},
        "weights normalised, a dense layer, no biases": QWEN_EXPERTS
        | {"norm_topk_prob": True, "decoder_sparse_step": 2, "qkv_bias": False, "shared_expert_intermediate_size": 24},
        "dense by name, every other layer slides": QWEN_EXPERTS
        | {"mlp_only_layers": [0], "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
        | {"shared_expert_intermediate_size": 48},
    },
    "qwen3_moe": {
        "weights as they are": QWEN_EXPERTS,
        "weights normalised, a dense layer": QWEN_EXPERTS | {"norm_topk_prob": True, "decoder_sparse_step": 2},
        "dense by name, biases, window": QWEN_EXPERTS
        | {"mlp_only_layers": [1], "attention_bias": True, "use_sliding_window": True, "sliding_window": 6},
    },
    "gpt_oss": {
        "sinks, window 5": {"head_dim": 16, "num_local_experts": 6, "sliding_window": 5},
        "limits reached, plain rope": {
            "head_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "swiglu_limit": 0.7,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        "no biases in attention, head_dim 12, no fused attention": {
            "head_dim": 12,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "attention_bias": False,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 7,
        },
    },
}


def make_reference(family: str, change: dict) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.for_model(family, **SIZES | change)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model, norm=0.0 if family.startswith("gemma") else 1.0)
    return model


def class_name(family: str) -> str:
    return transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
