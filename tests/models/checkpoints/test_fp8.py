"""8-bit floats with scales: the same float32 numbers as the format's definition gives."""

import pytest
import torch
from quantised_files import e4m3, fp8_blocks, write

from zonda import CheckpointError, ConfigError
from zonda.models.checkpoints import open_checkpoint

NAME = "model.layers.0.mlp.up_proj.weight"
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
BLOCKS = FP8 | {"weight_block_size": [128, 128]}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}


def compressed(strategy: str, **weights) -> dict:
    """As llm-compressor writes it."""
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **weights},
                "input_activations": {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"},
            }
        },
        "ignore": ["lm_head"],
    }


def every_code(columns: int = 40) -> torch.Tensor:
    """All 254 finite codes and a few again, (., columns)."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]
    return codes.repeat(2)[: 12 * columns].reshape(12, columns).view(torch.float8_e4m3fn)


def check(folder, stored: torch.Tensor, scale: torch.Tensor) -> None:
    """scale: float64, of each weight. The product of 4 bits and 24 is rounded once."""
    checkpoint = open_checkpoint(folder)
    info = checkpoint.tensors[NAME]
    assert (info.shape, info.dtype, info.form) == (stored.shape, torch.float32, None)
    assert checkpoint.tensors.keys() == {NAME}
    assert torch.equal(checkpoint.load(NAME), (e4m3(stored) * scale).float())
    assert checkpoint.blocks(NAME) is None
    assert "FP8 E4M3 scaled" in checkpoint.source.format


def tensors(stored: torch.Tensor, scale: torch.Tensor, key: str = "weight_scale") -> dict[str, torch.Tensor]:
    return {NAME: stored, NAME.replace("weight", key): scale}


SCALE = torch.tensor(0.0123)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("config", [FP8, compressed("tensor"), FBGEMM], ids=["fp8", "compressed-tensors", "fbgemm"])
def test_a_scale_for_the_tensor(tmp_path, config, shape):
    stored = every_code()
    check(write(tmp_path / "m", tensors(stored, SCALE.reshape(shape)), config), stored, SCALE.double())


@pytest.mark.parametrize("shape", [(12,), (12, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [FBGEMM, compressed("channel")], ids=["fbgemm", "compressed-tensors"])
def test_a_scale_for_each_output(tmp_path, config, dtype, shape):
    stored, scale = every_code(), torch.rand(12).to(dtype)
    check(write(tmp_path / "m", tensors(stored, scale.reshape(shape)), config), stored, scale.double()[:, None])


@pytest.mark.parametrize("size", [(256, 384), (200, 300), (100, 130), (7, 128)], ids=str)
@pytest.mark.parametrize(
    ("config", "key"),
    [(BLOCKS, "weight_scale_inv"), (compressed("block", block_structure=[128, 128]), "weight_scale")],
    ids=["deepseek", "compressed-tensors"],
)
def test_a_scale_for_each_block(tmp_path, config, key, size):
    weight = torch.randn(size, generator=torch.Generator().manual_seed(0))
    stored, scale, plain = fp8_blocks(weight, (128, 128))
    spread = scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)[: size[0], : size[1]]
    check(write(tmp_path / "m", tensors(stored, scale, key), config), stored, spread)
    assert torch.equal(open_checkpoint(tmp_path / "m").load(NAME), plain)
    torch.testing.assert_close(plain, weight, rtol=2**-4, atol=0.02)


def test_more_weights_than_are_dequantised_at_once(tmp_path):
    weight = torch.randn(1100, 1000, generator=torch.Generator().manual_seed(0))
    stored, scale, plain = fp8_blocks(weight, (128, 128))
    folder = write(tmp_path / "m", tensors(stored, scale, "weight_scale_inv"), BLOCKS)
    assert torch.equal(open_checkpoint(folder).load(NAME), plain)


def test_blocks_larger_than_the_weight_cost_nothing(tmp_path):
    stored = every_code()
    config = FP8 | {"weight_block_size": [10**12, 10**12]}
    check(
        write(tmp_path / "m", tensors(stored, torch.full((1, 1), 0.5), "weight_scale_inv"), config),
        stored,
        SCALE * 0 + 0.5,
    )


def test_scales_of_activations_are_left_and_that_is_said(tmp_path):
    extra = {NAME.replace("weight", "input_scale"): torch.ones(1), "model.layers.0.self_attn.k_scale": torch.ones(1)}
    folder = write(tmp_path / "m", tensors(every_code(), SCALE) | extra | {"norm": torch.ones(2)}, FP8)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors.keys() == {NAME, "norm"}
    assert checkpoint.source.format == "safetensors F32; FP8 E4M3 scaled; scales of activations unused"


def test_8_bit_floats_without_scales_are_just_floats(tmp_path):
    stored = every_code()
    checkpoint = open_checkpoint(write(tmp_path / "m", {NAME: stored}, None))
    assert checkpoint.tensors[NAME].dtype == torch.float8_e4m3fn
    assert torch.equal(checkpoint.load(NAME).double(), e4m3(stored))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (FP8 | {"fmt": "e5m2"}, "fmt must be one of e4m3"),
        (FP8 | {"weight_block_size": [128, 0]}, "weight_block_size must be two integers of at least 1"),
        (FP8 | {"weight_block_size": [128]}, "weight_block_size must be a list of 2 integers"),
        (compressed("tensor") | {"format": "pack-quantized"}, "format must be one of float-quantized"),
        (compressed("tensor") | {"sparsity_config": {"format": "sparse-24"}}, "format must be one of dense"),
        (compressed("tensor", type="int"), "type must be one of float"),
        (compressed("tensor", num_bits=4), "num_bits must be an integer of at least 8"),
        (compressed("tensor", symmetric=False), "symmetric false is not supported"),
        (compressed("group"), "strategy must be one of block, channel, tensor"),
        (compressed("block"), "block_structure must be a list of 2 integers"),
    ],
)
def test_an_option_that_is_not_read_is_refused_by_name(tmp_path, config, words):
    with pytest.raises(ConfigError, match=f"quantization_config.*{words}"):
        open_checkpoint(write(tmp_path / "m", tensors(every_code(), SCALE), config))


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({NAME: every_code()}, "must be a matrix called weight with one scale beside it"),
        (tensors(every_code(), SCALE) | tensors(every_code(), SCALE, "weight_scale_inv"), "with one scale"),
        ({"experts.gate": every_code(), "experts.gate_scale": SCALE}, "must be a matrix called weight"),
        (tensors(every_code().reshape(2, 6, 40), SCALE), "must be a matrix"),
        (tensors(every_code(), torch.ones(40)), r"weight_scale of shape \[40\], which is no scale for a tensor, a row"),
        (tensors(every_code(), torch.ones(2, 2)), r"shape \[2, 2\], .* a row, a block of 128 × 128"),
        (tensors(every_code(), torch.ones(12, dtype=torch.int32)), "weight_scale stored as I32"),
        ({NAME: torch.ones(2, 2)}, "config.json says 8-bit floats, but no tensor has them"),
    ],
)
def test_tensors_that_do_not_fit_each_other(tmp_path, held, words):
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(write(tmp_path / "m", held, BLOCKS))


def test_a_scale_that_is_no_number(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "m", tensors(every_code(), SCALE * float("nan")), FP8))
    with pytest.raises(CheckpointError, match="weight_scale that is not a finite number"):
        checkpoint.load(NAME)
