"""Reading config.json: hard errors that name the key."""

import pytest

from zonda import ConfigError, UnsupportedArchitectureError
from zonda.models import registry
from zonda.models.config import ConfigReader
from zonda.models.llama import LlamaConfig

GOOD = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_defaults_are_those_of_the_family():
    config = LlamaConfig.read(GOOD)
    assert (config.num_key_value_heads, config.head_dim, config.rms_norm_eps) == (4, 16, 1e-6)
    assert not config.tie_word_embeddings
    assert not config.attention_bias


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
def test_a_missing_key_is_named(key):
    with pytest.raises(ConfigError, match=f"the key '{key}' is missing"):
        LlamaConfig.read({k: v for k, v in GOOD.items() if k != key})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "64"}, "hidden_size must be an integer"),
        ({"hidden_size": True}, "hidden_size must be an integer"),
        ({"num_hidden_layers": 0}, "at least 1"),
        ({"hidden_act": "gelu"}, "hidden_act must be one of silu"),
        ({"sliding_window": 4096}, "sliding_window = 4096 is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"num_attention_heads": 5}, "not a multiple of num_attention_heads"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a positive number"),
        ({"hidden_act": ["silu"]}, "hidden_act must be one of silu"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"rope_scaling": {"rope_type": "unheard-of"}}, "rope_type must be one of"),
    ],
)
def test_what_would_change_the_mathematics_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        LlamaConfig.read(GOOD | change)


def test_an_unknown_architecture_lists_the_known_ones_and_the_guide():
    with pytest.raises(UnsupportedArchitectureError, match=r"'Nonesuch'.*LlamaForCausalLM.*docs/adding-a-model.md"):
        registry.of_config(GOOD | {"architectures": ["Nonesuch"]})


@pytest.mark.parametrize("value", [None, [], "LlamaForCausalLM", [3]])
def test_a_config_must_name_its_architecture(value):
    with pytest.raises(ConfigError, match="architectures"):
        registry.of_config(GOOD | {"architectures": value})


def test_texts_and_lists_of_texts():
    read = ConfigReader({"name": "a", "names": ["a", "b"], "none": None})
    assert read.text("name") == "a"
    assert read.text("none", "c") == "c"
    assert read.texts("names") == ("a", "b")
    assert read.texts("none", ("c",)) == ("c",)
    assert read.names() == ["name", "names", "none"]
    with pytest.raises(ConfigError, match="names must be a string"):
        read.text("names")
    with pytest.raises(ConfigError, match="name must be a list of strings"):
        read.texts("name")
    with pytest.raises(ConfigError, match="the key 'none' is missing"):
        read.texts("none")
