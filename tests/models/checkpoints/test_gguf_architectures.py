"""Every architecture that llama.cpp writes: a random model as its converter stores it gives transformers' logits."""

import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from conftest import build_quietly
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from gguf_architecture_files import CASES, VOCAB, make_reference, write
from support import RELATIVE_TOLERANCE, Eager, run_scenario

from zonda import CheckpointError
from zonda.models import registry
from zonda.models.checkpoints import open_checkpoint
from zonda.models.checkpoints.gguf_names import rename
from zonda.models.checkpoints.gguf_reader import GgufFile, GgufTensor
from zonda.models.loading import load_weights
from zonda.models.stacking import stacked
from zonda.runtime.bundle import open_bundle

ROWS = 64


def check(path, hf: transformers.PreTrainedModel) -> None:
    """The file is read as the class that it was made of, and gives its logits, eager and in two chunks.

    There are more tokens than longrope's original length, because a capacity beyond it chose the long regime.
    """
    checkpoint = open_checkpoint(path)
    architecture = registry.of_config(checkpoint.config)
    assert architecture.names == (type(hf).__name__,)
    checkpoint = stacked(checkpoint, architecture.stacks)
    with torch.device("meta"):
        model = architecture.for_rows(architecture.read_config(checkpoint.config), ROWS, 0).eval()
    load_weights(model, checkpoint, architecture.ignored)
    tokens = np.random.default_rng(1).integers(0, VOCAB, (1, 40))
    with torch.no_grad():
        reference = hf(torch.from_numpy(tokens)).logits.numpy()[0]
    (logits,) = run_scenario(Eager(model, 1, ROWS), tokens, [[20], [20]])
    np.testing.assert_allclose(logits, reference, rtol=0, atol=RELATIVE_TOLERANCE * np.abs(reference).max())


@pytest.mark.parametrize("name", CASES)
def test_a_gguf_gives_the_logits_of_the_model_it_was_made_of(name, tmp_path):
    case = CASES[name]
    hf = make_reference(case)
    write(tmp_path / "model.gguf", case, hf)
    check(tmp_path / "model.gguf", hf)


@pytest.mark.parametrize(("name", "older"), [("phi 2", "qkv"), ("mixtral", "experts")])
def test_older_files_are_read(name, older, tmp_path):
    hf = make_reference(CASES[name])
    write(tmp_path / "model.gguf", CASES[name], hf, older=older)
    check(tmp_path / "model.gguf", hf)


@pytest.mark.parametrize("name", ["gpt-oss", "mixtral"])
def test_experts_in_mxfp4(name, tmp_path):
    hf = make_reference(CASES[name])
    for key, weight in hf.named_parameters():
        if "experts" in key and weight.ndim == 3:
            rows = (weight.mT if name == "gpt-oss" else weight).detach().contiguous().numpy()
            floats = torch.from_numpy(dequantize(quantize(rows, Type.MXFP4), Type.MXFP4))
            weight.data.copy_(floats.mT if name == "gpt-oss" else floats)
    write(tmp_path / "model.gguf", CASES[name], hf, Type.MXFP4)
    check(tmp_path / "model.gguf", hf)
    stored = {info.stored for info in open_checkpoint(tmp_path / "model.gguf").tensors.values()}
    assert stored == {"F32", "MXFP4"}


def test_a_bundle_of_experts_in_mxfp4_proves_itself(tmp_path):
    write(tmp_path / "model.gguf", CASES["gpt-oss"], make_reference(CASES["gpt-oss"]), Type.MXFP4)
    manifest = open_bundle(build_quietly(tmp_path / "model.gguf", tmp_path / "bundle", capacity=ROWS)).manifest
    assert manifest.architecture == "GptOssForCausalLM"
    assert manifest.quantization["dequantized"] == "MXFP4"
    assert manifest.targets[0].parity.status == "passed"


def file_of(**shapes: tuple[int, ...]) -> GgufFile:
    """Tensors of layer 0, by their last names, without data."""
    names = {f"blk.0.{key.replace('__', '.')}": shape for key, shape in shapes.items()}
    tensors = {name: GgufTensor(name, Type.F32, shape, 0, 4 * math.prod(shape)) for name, shape in names.items()}
    return GgufFile({}, tensors, ())


@pytest.mark.parametrize(
    ("name", "file", "words"),
    [
        ("phi2", file_of(attn_qkv__weight=(12, 8), attn_k__weight=(4, 8)), "are both .*k_proj.weight"),
        ("phi2", file_of(attn_qkv__weight=(7, 8)), r"attn_qkv.weight of shape \[7, 8\] cannot be cut into 3"),
        ("phi2", file_of(attn_qkv__bias=(7,)), "cannot be cut into 3"),
        ("stablelm", file_of(attn_q_norm__weight=(10**9, 1)), "cannot be cut into 4097 tensors"),
        ("phi2", file_of(attn_sinks__weight=(4,), ffn_gate_exps__weight=(2, 4, 8)), "2 tensors are unknown to phi2"),
    ],
)
def test_tensors_that_do_not_fit_a_layout_are_refused(name, file, words):
    layout = registry.find_gguf(name).gguf
    with pytest.raises(CheckpointError, match=words):
        rename(Path("m.gguf"), file, layout)


def test_every_layout_is_tested():
    tested = {(gguf.MODEL_ARCH_NAMES[case.arch], case.family == "mixtral") for case in CASES.values()}
    layouts = {
        (a.gguf.name, a.gguf.name == "llama" and a.gguf.experts) for a in registry.ARCHITECTURES if a.gguf is not None
    }
    assert layouts == tested | {("llama", False)}
