"""How configurations are read: an older file's as a new one's, and what is not computed refused."""

import numpy as np
import pytest
import torch
from architecture_configs import (
    GEMMA_LAYERS,
    GRANITE,
    LLAMA,
    OLD_LONGROPE,
    QWEN_WINDOW,
    ROWS,
    SIZES,
    VOCAB,
    class_name,
    make_reference,
)
from support import RELATIVE_TOLERANCE, Eager, run_scenario

from zonda import ConfigError
from zonda.models import registry

# family, its configuration as older files have it (keys absent, so the family's defaults count), one constant off
TELLING = [
    ("llama", LLAMA, {"rope_theta": 2e4}),
    ("llama", LLAMA, {"rms_norm_eps": 1e-4}),
    ("mistral", {"sliding_window": 5}, {"sliding_window": 6}),
    ("mistral", {"sliding_window": 5}, {"sliding_window": None}),
    ("qwen2", QWEN_WINDOW, {"max_window_layers": 0}),
    ("qwen2", {}, {"rope_theta": 2e4}),
    ("qwen3", {"head_dim": 16}, {"rms_norm_eps": 1e-4}),
    ("gemma", {"head_dim": 16}, {"norm_offset": 0.9}),
    ("gemma2", {"head_dim": 16, "sliding_window": 5}, {"sliding_window": 4}),
    ("gemma2", {"head_dim": 16, "sliding_window": 5}, {"query_pre_attn_scalar": 224}),
    ("gemma2", {"head_dim": 16, "sliding_window": 5}, {"attn_logit_softcapping": 30.0}),
    ("gemma2", {"head_dim": 16, "sliding_window": 5}, {"final_logit_softcapping": None}),
    ("gemma3_text", GEMMA_LAYERS | {"head_dim": 16, "sliding_window": 5}, {"rope_theta": 2e6}),
    ("gemma3_text", GEMMA_LAYERS | {"head_dim": 16, "sliding_window": 5}, {"rope_local_base_freq": 2e4}),
    ("gemma3_text", {"head_dim": 16, "sliding_window": 5}, {"sliding_window_pattern": 2}),
    ("phi", {}, {"layer_norm_eps": 1e-3}),
    ("phi", {}, {"partial_rotary_factor": 0.25}),
    ("phi", {}, {"hidden_act": "gelu"}),
    ("phi3", {"sliding_window": 6}, {"sliding_window": None}),
    ("phi3", {"rope_scaling": OLD_LONGROPE, "original_max_position_embeddings": 24}, {"rope_scaling": None}),
    (
        "phi3",
        {"rope_scaling": OLD_LONGROPE, "original_max_position_embeddings": 24},
        {"original_max_position_embeddings": 16},
    ),
    ("starcoder2", {"sliding_window": 5}, {"sliding_window": 6}),
    ("starcoder2", {}, {"norm_epsilon": 1e-3}),
    ("stablelm", {}, {"partial_rotary_factor": 0.5}),
    ("olmo2", {}, {"rms_norm_eps": 1e-3}),
    ("olmo2", {}, {"rope_theta": 2e4}),
    *(("granite", GRANITE, {name: 1.01 * value}) for name, value in GRANITE.items()),
    ("granite", {}, {"attention_multiplier": 0.99}),
    ("smollm3", {"num_hidden_layers": 4}, {"no_rope_layer_interval": 3}),
    ("smollm3", {"num_hidden_layers": 4}, {"no_rope_layers": [1, 1, 1, 1]}),
    ("smollm3", {}, {"rope_theta": 4e6}),
]


@pytest.mark.parametrize(("family", "config", "change"), TELLING)
def test_an_older_config_reads_the_same_and_the_tolerance_sees_a_wrong_constant(family, config, change):
    hf = make_reference(family, config)
    tokens = np.random.default_rng(1).integers(0, VOCAB, (1, 32))
    with torch.no_grad():
        reference = hf(torch.from_numpy(tokens)).logits.numpy()[0]
    architecture = registry.find(type(hf).__name__)
    errors = []
    for values in (SIZES | config, SIZES | config | change):
        model = architecture.build(architecture.read_config(values), ROWS).eval()
        model.load_state_dict(hf.state_dict())
        (logits,) = run_scenario(Eager(model, 1, ROWS), tokens, [[32]])
        errors.append(np.abs(logits - reference).max() / np.abs(reference).max())
    assert errors[0] <= RELATIVE_TOLERANCE
    assert errors[1] > 10 * RELATIVE_TOLERANCE


REFUSED = [
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok must be an integer of at most 8"),
    ("mixtral", {"hidden_act": "gelu"}, "hidden_act must be one of silu"),
    ("qwen2_moe", {"num_experts_per_tok": 7, "num_experts": 6}, "num_experts_per_tok must be an integer of at most 6"),
    ("qwen3_moe", {"mlp_only_layers": [-1]}, r"mlp_only_layers\[0\] must be an integer of at least 0"),
    ("gpt_oss", {"rope_scaling": None}, "'rope_scaling' is missing"),
    ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config"),
    ("mistral", {"hidden_act": "gelu"}, "hidden_act must be one of silu"),
    ("mistral", {"sliding_window": -1}, "sliding_window must be an integer of at least 1"),
    ("mistral", {"attention_bias": True}, "attention_bias = True is not supported"),
    ("qwen2", {"hidden_act": "relu6"}, "hidden_act must be one of"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types must be a list of 2"),
    ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types must be a list of 2"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window is not set"),
    ("gemma", {"use_bidirectional_attention": True}, "attention is causal here"),
    ("gemma", {"hidden_act": "silu"}, "hidden_act must be one of"),
    ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation must be one of"),
    ("gemma2", {"sliding_window": None}, "sliding_window is not set"),
    ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping must be a positive number"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "QK-norm instead"),
    ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "linear"}}}, "'factor' is missing"),
    ("phi3", {"attention_bias": True}, "Phi 3 has no biases"),
    ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}}, "list of 8 numbers"),
    ("phi", {"qk_layernorm": True}, "no published Phi has it"),
    ("phi", {"partial_rotary_factor": 0.3, "hidden_size": 40}, "turns pairs"),
    ("starcoder2", {"mlp_type": "gated"}, "mlp_type must be one of default"),
    ("stablelm", {"qk_layernorm": "per head"}, "qk_layernorm must be true or false"),
    ("olmo2", {"sliding_window": 4096}, "no windowed attention"),
    ("granite", {"residual_multiplier": 0}, "residual_multiplier must be a positive number"),
    ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers must be a list of 2 integers"),
    ("smollm3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window is not set"),
    ("qwen3", {"rope_parameters": {"rope_type": "spiral"}}, "rope_type must be one of"),
    ("qwen3", {"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
]


@pytest.mark.parametrize(("family", "change", "message"), REFUSED)
def test_what_is_not_computed_is_refused(family, change, message):
    architecture = registry.find(class_name(family))
    good = SIZES | {"architectures": [class_name(family)], "rope_scaling": {"type": "default"}}
    architecture.read_config(good)
    with pytest.raises(ConfigError, match=message):
        architecture.read_config(good | change)
