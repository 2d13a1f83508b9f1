"""Random two-layer Llamas in all six scenarios: eager, universal ONNX and the lowered engine against transformers."""

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
    run_scenario,
)

from zonda.models.llama import Llama, LlamaConfig

CAPACITY, CHUNK, VOCAB = 64, 32, 199
ROWS = CAPACITY + CHUNK

BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 144,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": ROWS,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "rope_theta": 5e4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 5e5,
}
CONFIGS = {
    "multi-head": BASE | {"num_key_value_heads": 6},
    "3 heads a group, tied": BASE | {"tie_word_embeddings": True},
    "4 heads a group": BASE | {"num_attention_heads": 8, "hidden_size": 128},
    "biases": BASE | {"attention_bias": True, "mlp_bias": True},
    "head_dim 24, not hidden/heads": BASE | {"head_dim": 24},
    "head_dim 10, no fused attention": BASE | {"head_dim": 10},
    "llama3 rope": BASE | {"rope_parameters": LLAMA3},
    "yarn rope": BASE | {"rope_parameters": YARN},
}


def hf_model(config: dict) -> transformers.LlamaForCausalLM:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    randomise(model)
    return model


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def case(request, tmp_path_factory):
    """(reference logits of 4 rows, tokens, executors by name) of one configuration."""
    hf = hf_model(CONFIGS[request.param])
    tokens = np.random.default_rng(1).integers(0, VOCAB, (4, 32))
    with torch.no_grad():
        reference = hf(torch.from_numpy(tokens)).logits.numpy()
    config = LlamaConfig.read(hf.config.to_dict())
    eager = Llama(config, ROWS).eval()
    eager.load_state_dict(hf.state_dict())
    directory = tmp_path_factory.mktemp("graphs")
    module = export_graphs(directory, lambda rows: Llama(config, rows), hf.state_dict().__getitem__, ROWS)
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


@pytest.mark.parametrize(
    "change", [{"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}, {"rms_norm_eps": 1e-4}]
)
def test_the_tolerance_sees_a_wrong_constant(change):
    """rope_theta × 2 (the default is 1e4) and eps × 10 each move the logits beyond the tolerance."""
    hf = hf_model(BASE)
    tokens = np.random.default_rng(1).integers(0, VOCAB, (1, 32))
    with torch.no_grad():
        reference = hf(torch.from_numpy(tokens)).logits.numpy()
    wrong = Llama(LlamaConfig.read(transformers.LlamaConfig(**BASE | change).to_dict()), ROWS).eval()
    wrong.load_state_dict(hf.state_dict())
    (logits,) = run_scenario(Eager(wrong, 1, ROWS), tokens, [[32]])
    assert np.abs(logits - reference[0]).max() > 10 * RELATIVE_TOLERANCE * np.abs(reference).max()
