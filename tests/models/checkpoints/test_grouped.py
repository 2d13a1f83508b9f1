"""AWQ and GPTQ: the same floats as the formats' definition, in blocks without loss where groups are blocks."""

import json

import numpy as np
import pytest
import torch
from quantised_files import awq_tensors, gptq_tensors, linear, quantised, requantise_folder, write

from zonda import CheckpointError, ConfigError
from zonda.models import registry
from zonda.models.checkpoints import open_checkpoint
from zonda.models.loading import load_weights, match_parameters
from zonda.models.quantization import Form
from zonda.models.quantize import quantize_modules, quantized_forms

NAME = "model.layers.0.mlp.up_proj.weight"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "GEMM", "zero_point": True}


def gptq_folder(path, q, bits=4, group_size=32, *, version="gptq", g_idx=True, **options):
    config = GPTQ | {"bits": bits, "group_size": group_size, "checkpoint_format": version} | options
    return write(path, linear(gptq_tensors(q, bits, version=version, g_idx=g_idx)), config)


def awq_folder(path, q, bits=4, group_size=32, **options):
    return write(path, linear(awq_tensors(q, bits)), AWQ | {"bits": bits, "group_size": group_size} | options)


def check_exact(folder, q, form: Form | None) -> None:
    """Float16 scales and small codes: every product and sum has less than 24 bits, so nothing may be rounded."""
    checkpoint = open_checkpoint(folder)
    info = checkpoint.tensors[NAME]
    assert (info.shape, info.dtype, info.form) == (q.codes.T.shape, torch.float32, form)
    assert checkpoint.tensors.keys() == {NAME}
    assert "quantization_config" not in checkpoint.config
    wanted = torch.from_numpy(q.weight())
    assert torch.equal(checkpoint.load(NAME).double(), wanted)
    if form is None:
        assert checkpoint.blocks(NAME) is None
    else:
        blocks = checkpoint.blocks(NAME)
        assert blocks.form == form
        assert torch.equal(blocks.dequantize().double(), wanted)


# group size -> block
SIZES = {32: 32, 64: 64, 128: 128, -1: 128, 256: 128}


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", SIZES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq(tmp_path, version, bits, group_size, symmetric):
    q = quantised(256, 40, bits=bits, group_size=group_size, symmetric=symmetric)
    folder = gptq_folder(tmp_path / "m", q, bits, group_size, version=version)
    check_exact(folder, q, Form(bits, SIZES[group_size], offsets=not symmetric))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", SIZES)
@pytest.mark.parametrize("bits", [4, 8])
def test_awq(tmp_path, bits, group_size, symmetric):
    q = quantised(256, 40, bits=bits, group_size=group_size, symmetric=symmetric)
    folder = awq_folder(tmp_path / "m", q, bits, group_size)
    check_exact(folder, q, Form(bits, SIZES[group_size], offsets=not symmetric))


def test_more_weights_than_are_unpacked_at_once(tmp_path):
    q = quantised(608, 3000)
    check_exact(awq_folder(tmp_path / "awq", q), q, Form(4, 32, offsets=True))
    check_exact(gptq_folder(tmp_path / "gptq", q), q, Form(4, 32, offsets=True))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_codes_are_the_checkpoints_own(tmp_path, bits):
    """Not only their floats: nothing is requantised."""
    q = quantised(64, 16, bits=bits)
    for folder in (gptq_folder(tmp_path / "gptq", q, bits), awq_folder(tmp_path / "awq", q, bits)):
        codes = open_checkpoint(folder).blocks(NAME).codes.numpy()
        if bits == 4:
            codes = np.stack((codes & 15, codes >> 4), -1).reshape(16, 64)
        np.testing.assert_array_equal(codes, q.codes.T)


def test_zero_points_of_the_first_gptq_format_wrap(tmp_path):
    """0 is stored as -1, which is 15: AutoGPTQ's own kernels take it modulo 16."""
    q = quantised(64, 16, seed=3)
    assert (q.zeros == 0).any()
    check_exact(gptq_folder(tmp_path / "m", q), q, Form(4, 32, offsets=True))


def test_the_two_gptq_formats_are_told_apart(tmp_path):
    q = quantised(64, 16)
    place = write(tmp_path / "m", linear(gptq_tensors(q, 4, version="gptq")), GPTQ | {"checkpoint_format": "gptq_v2"})
    assert not np.array_equal(open_checkpoint(place).load(NAME).double().numpy(), q.weight())


def test_act_order_is_dequantised_and_says_so(tmp_path):
    q = quantised(256, 40, act_order=True)
    folder = gptq_folder(tmp_path / "m", q, desc_act=True)
    check_exact(folder, q, None)
    checkpoint = open_checkpoint(folder)
    assert "act-order): dequantised" in checkpoint.tensors[NAME].stored
    assert "act-order): dequantised" in checkpoint.source.format


def test_act_order_that_keeps_whole_blocks_together_stays_in_blocks(tmp_path):
    q = quantised(256, 40, group_size=64)
    swapped = type(q)(q.codes, q.zeros, q.scales, np.roll(q.groups, 32))
    check_exact(gptq_folder(tmp_path / "m", swapped, group_size=64, desc_act=True), swapped, Form(4, 32, offsets=True))


def test_without_g_idx_groups_follow_each_other(tmp_path):
    q = quantised(128, 16)
    check_exact(gptq_folder(tmp_path / "m", q, g_idx=False), q, Form(4, 32, offsets=True))


def test_inputs_that_are_no_multiple_of_a_block_are_dequantised(tmp_path):
    q = quantised(72, 16, group_size=24)
    check_exact(gptq_folder(tmp_path / "m", q, group_size=24), q, None)


def test_a_last_group_may_be_shorter(tmp_path):
    q = quantised(160, 16, group_size=64)
    check_exact(awq_folder(tmp_path / "m", q, group_size=64), q, Form(4, 32, offsets=True))


@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float32])
def test_other_types_of_scales(tmp_path, scales):
    q = quantised(64, 16, scales=np.float32)
    stored = torch.from_numpy(q.scales).to(scales)
    rounded = type(q)(q.codes, q.zeros, stored.double().numpy(), q.groups)
    place = write(tmp_path / "m", linear(gptq_tensors(q, 4) | {"scales": stored}), GPTQ)
    checkpoint = open_checkpoint(place)
    for found in (checkpoint.load(NAME), checkpoint.blocks(NAME).dequantize()):
        torch.testing.assert_close(found.double(), torch.from_numpy(rounded.weight()), rtol=3e-7, atol=1e-7)


def test_biases_and_what_is_not_quantised_stay(tmp_path):
    q = quantised(64, 16)
    extra = {"model.layers.0.mlp.up_proj.bias": torch.ones(16), "model.norm.weight": torch.ones(4)}
    checkpoint = open_checkpoint(write(tmp_path / "m", linear(awq_tensors(q, 4)) | extra, AWQ))
    assert checkpoint.tensors.keys() == {NAME, *extra}
    assert torch.equal(checkpoint.load("model.norm.weight"), torch.ones(4))
    assert checkpoint.source.format == "safetensors AWQ 4 bits; F32"


CONFIGS = [
    (GPTQ, {"bits": 3}, "bits 3 is not supported; supported: 4, 8"),
    (GPTQ, {"group_size": 0}, "group_size must be -1 or at least 1"),
    (GPTQ, {"group_size": -2}, "group_size must be an integer of at least -1"),
    (GPTQ, {"group_size": 10**30}, "group_size must be an integer of at most"),
    (GPTQ, {"checkpoint_format": "marlin"}, "checkpoint_format must be one of gptq, gptq_v2"),
    (GPTQ, {"pack_dtype": "int64"}, "pack_dtype must be one of int32"),
    (GPTQ, {"desc_act": "yes"}, "desc_act must be true or false"),
    (GPTQ, {"dynamic": {"-:lm_head": {}, r"+:.*\.0\..*": {"bits": 8}}}, r"dynamic gives '\+:.*' a quantisation"),
    (
        GPTQ,
        {"quant_method": "bitsandbytes"},
        "'bitsandbytes' is not supported; supported: awq, gptq, fp8, fbgemm_fp8, ",
    ),
    (GPTQ, {"quant_method": ["gptq"]}, "quant_method must be a string"),
    (GPTQ, {"quant_method": None}, "the key 'quant_method' is missing"),
    (AWQ, {"bits": 3}, "bits 3 is not supported"),
    (AWQ, {"version": "gemv"}, "version 'gemv' packs its codes in another way; supported: gemm"),
    (AWQ, {"zero_point": False}, "zero_point false is not supported"),
]


@pytest.mark.parametrize(("config", "change", "words"), CONFIGS)
def test_an_option_that_is_not_read_is_refused_by_name(tmp_path, config, change, words):
    folder = write(tmp_path / "m", linear(gptq_tensors(quantised(64, 16), 4)), config | change)
    with pytest.raises(ConfigError, match=f"quantization_config: .*{words}"):
        open_checkpoint(folder)


def test_a_quantisation_config_that_is_no_object(tmp_path):
    folder = write(tmp_path / "m", {"a": torch.ones(1)}, None, quantization_config=[1])
    with pytest.raises(ConfigError, match="expected an object"):
        open_checkpoint(folder)


def test_awq_reads_the_names_of_its_first_release(tmp_path):
    q = quantised(64, 16)
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "GEMM", "zero_point": True}
    check_exact(write(tmp_path / "m", linear(awq_tensors(q, 4)), old), q, Form(4, 32, offsets=True))


TENSORS = [
    ({"qzeros": None}, r"up_proj\.qzeros is missing, and GPTQ needs it"),
    ({"scales": None}, r"up_proj\.scales is missing"),
    ({"scales": torch.ones(3, 16)}, r"up_proj\.scales has shape \[3, 16\], expected \[2, 16\] with group_size 32"),
    ({"qzeros": torch.zeros(2, 3, dtype=torch.int32)}, r"qzeros has shape \[2, 3\], expected \[2, 2\]"),
    ({"g_idx": torch.zeros(63, dtype=torch.int32)}, r"g_idx has shape \[63\], expected \[64\]"),
    ({"g_idx": torch.full((64,), 2, dtype=torch.int32)}, "g_idx names groups outside of 0 to 1"),
    ({"g_idx": torch.full((64,), -1, dtype=torch.int32)}, "g_idx names groups outside of 0 to 1"),
    ({"g_idx": torch.zeros(64, dtype=torch.int32)}, "g_idx mixes the groups, but the configuration denies desc_act"),
    ({"qweight": torch.zeros(8, 16, dtype=torch.int64)}, "qweight is stored as I64, which is not read for GPTQ"),
    ({"qweight": torch.zeros(8, dtype=torch.int32)}, r"qweight has shape \[8\]; it must be a matrix"),
    ({"qweight": torch.zeros(0, 16, dtype=torch.int32)}, r"qweight has shape \[0, 16\]; it must be a matrix"),
    ({"scales": torch.ones(2, 16, dtype=torch.int32)}, "scales is stored as I32"),
]


@pytest.mark.parametrize(("changes", "words"), TENSORS)
def test_tensors_that_do_not_fit_each_other(tmp_path, changes, words):
    tensors = gptq_tensors(quantised(64, 16), 4) | changes
    folder = write(tmp_path / "m", linear({part: t for part, t in tensors.items() if t is not None}), GPTQ)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder)


def test_a_config_that_promises_quantised_weights(tmp_path):
    folder = write(tmp_path / "m", {"a": torch.ones(1)}, GPTQ)
    with pytest.raises(CheckpointError, match=r"config\.json says GPTQ, but there is no qweight"):
        open_checkpoint(folder)


def test_a_scale_that_is_no_number(tmp_path):
    tensors = gptq_tensors(quantised(64, 16), 4)
    tensors["scales"][1, 3] = float("inf")
    checkpoint = open_checkpoint(write(tmp_path / "m", linear(tensors), GPTQ))
    for read in (checkpoint.load, checkpoint.blocks):
        with pytest.raises(CheckpointError, match="scales has a value that is not a finite number"):
            read(NAME)


@pytest.mark.parametrize("method", ["gptq", "act-order", "awq", "fp8"])
def test_a_whole_model_in_floats_and_with_its_linears_quantised(tiny_folder, tmp_path, method):
    """Its linears hold the checkpoint's codes where it has blocks, and the model computes what the floats compute."""
    plain = requantise_folder(tiny_folder, tmp_path / "m", method)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.config == json.loads((tiny_folder / "config.json").read_text())
    architecture = registry.of_config(checkpoint.config)
    config = architecture.read_config(checkpoint.config)
    with torch.device("meta"):
        module = architecture.build(config, 16)
    assert match_parameters(module, checkpoint).keys() == plain.keys()
    load_weights(module, checkpoint)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, plain[name]), name
    with torch.device("meta"):
        module = architecture.build(config, 16)
    forms = quantized_forms(module, checkpoint)
    assert len(forms) == (14 if method in ("gptq", "awq") else 0)
    quantize_modules(module, forms)
    load_weights(module, checkpoint)
    for name in forms:
        linear = module.get_submodule(name.removesuffix(".weight"))
        x = torch.eye(linear.shape[1])
        assert torch.equal(linear(x).T, plain[name]), name
