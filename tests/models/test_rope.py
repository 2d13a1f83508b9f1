"""RoPE tables against transformers', every scaling, through the config forms of transformers 4 and 5."""

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from zonda import ConfigError
from zonda.models.config import ConfigReader
from zonda.models.llama import LlamaConfig
from zonda.models.rope import read_rope, settle_regime

HEAD_DIM, LIMIT = 32, 64
FACTORS = [1.0 + i / 8 for i in range(HEAD_DIM // 2)]
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": FACTORS,
        "long_factor": [2 * f for f in FACTORS],
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def config(scaling: dict) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=2 * HEAD_DIM,
        num_attention_heads=2,
        max_position_embeddings=LIMIT,
        rope_parameters=dict(scaling, rope_theta=5e4),
    )


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("positions", [12, 64, 200])
def test_tables_equal_transformers(name, positions):
    """Within one regime: the one that `positions` selects, here and there."""
    theirs = config(SCALINGS[name])
    if SCALINGS[name]["rope_type"] == "default":
        inverse, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(theirs)
    else:
        inverse, factor = ROPE_INIT_FUNCTIONS[SCALINGS[name]["rope_type"]](theirs, "cpu", seq_len=positions)
    angles = torch.arange(positions).float()[:, None] * inverse[None]
    ours = read_rope(ConfigReader(theirs.to_dict()), HEAD_DIM).tables(positions)
    torch.testing.assert_close(ours.cos, angles.cos() * factor, rtol=0, atol=2e-7 * max(1, positions / 10))
    torch.testing.assert_close(ours.sin, angles.sin() * factor, rtol=0, atol=2e-7 * max(1, positions / 10))


def test_the_older_config_form_reads_the_same():
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e4}, "max_position_embeddings": 64}
    old = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 3e4, "max_position_embeddings": 64}
    a, b = (read_rope(ConfigReader(c), HEAD_DIM).tables(16) for c in (new, old))
    assert torch.equal(a.cos, b.cos)
    assert torch.equal(a.sin, b.sin)


def test_the_capacity_chooses_the_regime_not_the_padding_beyond_it():
    sizes = {"vocab_size": 9, "hidden_size": 64, "intermediate_size": 9, "num_hidden_layers": 1}
    long_rope = {"rope_scaling": SCALINGS["longrope"], "num_attention_heads": 2, "max_position_embeddings": LIMIT}
    config = LlamaConfig.read(sizes | long_rope)
    rows = settle_regime(config, 16).rope.tables(24).cos
    assert rows.shape[0] == 24
    assert torch.equal(rows[:16], config.rope.tables(16).cos)
    assert torch.equal(settle_regime(config, 17).rope.tables(24).cos, config.rope.tables(24).cos)


def test_the_original_length_may_stand_outside_the_scaling():
    scaling = {k: v for k, v in SCALINGS["longrope"].items() if k != "original_max_position_embeddings"}
    values = {"max_position_embeddings": LIMIT, "original_max_position_embeddings": 16, "rope_scaling": scaling}
    inside = values | {"original_max_position_embeddings": None, "rope_scaling": SCALINGS["longrope"]}
    a, b = (read_rope(ConfigReader(v), HEAD_DIM).tables(32) for v in (values, inside))
    assert torch.equal(a.cos, b.cos)


def test_partial_rotary_turns_fewer_dimensions():
    tables = read_rope(ConfigReader({"rope_theta": 1e4, "partial_rotary_factor": 0.25}), HEAD_DIM).tables(4)
    assert tables.cos.shape == (4, HEAD_DIM // 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_scaling": {"rope_type": "spiral"}}, "rope_type must be one of"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'factor' is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor must be a positive number"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "list of 16 numbers",
        ),
        ({"rope_theta": -1.0}, "rope_theta must be a positive number"),
        ({"partial_rotary_factor": 0.1}, "turns pairs"),
        ({"rope_scaling": "linear"}, "expected an object"),
    ],
)
def test_what_cannot_be_computed_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        read_rope(ConfigReader(values), HEAD_DIM)
