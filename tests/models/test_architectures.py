"""Every architecture in all six scenarios: eager, universal ONNX and the lowered engine against transformers.

Random two-layer models go through files, so the names and forms are those of real checkpoints. Windows are shorter than
the sequences.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from support import (
    RELATIVE_TOLERANCE,
    SCENARIOS,
    Eager,
    Lowered,
    PlainOnnx,
    export_graphs,
    open_engine,
    randomise,
    run_for_last_tokens,
    run_scenario,
)

from zonda import ConfigError
from zonda.export.onnx_files import tensor_source
from zonda.models import registry
from zonda.models.checkpoints import open_checkpoint
from zonda.models.loading import load_weights, match_parameters
from zonda.models.stacking import stacked

CAPACITY, CHUNK, VOCAB = 64, 32, 131
ROWS = CAPACITY + CHUNK

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": ROWS,
    "pad_token_id": 0,
}
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
CASES = [(family, name) for family, configs in CONFIGS.items() for name in configs]


def make_reference(family: str, change: dict) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.for_model(family, **SIZES | change)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model, norm=0.0 if family.startswith("gemma") else 1.0)
    return model


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def case(request, tmp_path_factory):
    """(reference logits of 4 rows, tokens, executors by name) of one configuration."""
    family, name = request.param
    folder = tmp_path_factory.mktemp("checkpoint")
    hf = make_reference(family, CONFIGS[family][name])
    hf.save_pretrained(folder)
    tokens = np.random.default_rng(1).integers(0, VOCAB, (4, 32))
    with torch.no_grad():
        reference = hf(torch.from_numpy(tokens)).logits.numpy()
    checkpoint = open_checkpoint(folder)
    architecture = registry.of_config(checkpoint.config)
    checkpoint = stacked(checkpoint, architecture.stacks)
    config = architecture.read_config(checkpoint.config)
    with torch.device("meta"):
        eager = architecture.build(config, ROWS).eval()
    names = match_parameters(eager, checkpoint, architecture.ignored)
    load_weights(eager, checkpoint, architecture.ignored)
    directory = tmp_path_factory.mktemp("graphs")
    load = tensor_source(eager, checkpoint, names)
    module = export_graphs(directory, lambda rows: architecture.build(config, rows), load, ROWS)
    engine = open_engine(directory, module, VOCAB, capacity=CAPACITY, max_chunk=CHUNK)
    executors = {
        "eager": lambda rows: Eager(eager, rows, ROWS),
        "universal": lambda rows: PlainOnnx(directory / "onnx/universal.onnx", module.kv_shapes, rows, ROWS),
        "lowered": lambda rows: Lowered(engine, rows),
    }
    return reference, tokens, executors


@pytest.mark.parametrize("execution", ["eager", "universal", "lowered"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_scenario(case, execution, scenario):
    reference, tokens, executors = case
    steps = SCENARIOS[scenario]
    rows = len(steps[0])
    found = run_scenario(executors[execution](rows), tokens[:rows], steps)
    tolerance = RELATIVE_TOLERANCE * np.abs(reference).max()
    for row, logits in enumerate(found):
        np.testing.assert_allclose(logits, reference[row, : len(logits)], rtol=0, atol=tolerance)


@pytest.mark.parametrize("scenario", ["ragged batch of 4", "chunked prefill", "batch with idle rows"])
def test_asking_for_the_last_token_alone_changes_no_logit(case, scenario):
    reference, tokens, executors = case
    steps = SCENARIOS[scenario]
    rows = len(steps[0])
    tolerance = RELATIVE_TOLERANCE * np.abs(reference).max()
    for row, position, logits in run_for_last_tokens(executors["lowered"](rows), tokens[:rows], steps):
        np.testing.assert_allclose(logits, reference[row, position], rtol=0, atol=tolerance)


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


def class_name(family: str) -> str:
    return transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]


@pytest.mark.parametrize(("family", "change", "message"), REFUSED)
def test_what_is_not_computed_is_refused(family, change, message):
    architecture = registry.find(class_name(family))
    good = SIZES | {"architectures": [class_name(family)], "rope_scaling": {"type": "default"}}
    architecture.read_config(good)
    with pytest.raises(ConfigError, match=message):
        architecture.read_config(good | change)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_file_is_short(family):
    path = Path(registry.__file__).with_name(f"{family.removesuffix('_text')}.py")
    assert len(path.read_text().splitlines()) <= 200


def test_every_architecture_is_tested():
    names = {name for architecture in registry.ARCHITECTURES for name in architecture.names}
    assert names == {class_name(family) for family in CONFIGS}
