"""Builds from quantised folders and with adapters: the bundle proves itself, and its manifest says what went in."""

import copy
import hashlib
import subprocess
import sys

import pytest
import torch
import transformers
from adapters import apply_unmerged, factors, write_adapter
from conftest import build_quietly, write_folder
from quantised_files import requantise_folder
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from zonda import BuildError, CheckpointError
from zonda.runtime import Pipeline, SamplingParams
from zonda.runtime.bundle import open_bundle

GREEDY = SamplingParams(temperature=0.0, max_tokens=16)
PROMPT = "the wind comes down"
Q = {f"model.layers.{layer}.self_attn.q_proj": (64, 64) for layer in (0, 1)}


def greedy(model, ids: list[int]) -> list[int]:
    out = list(ids)
    with torch.no_grad():
        for _ in range(GREEDY.max_tokens):
            out.append(int(model(torch.tensor([out])).logits[0, -1].argmax()))
    return out[len(ids) :]


def same_tokens(bundle, model) -> None:
    ids = Tokenizer.from_file(str(bundle / "tokenizer.json")).encode(PROMPT).ids
    with Pipeline.load(bundle) as pipeline:
        found = pipeline.generate(PROMPT, GREEDY).token_ids
    wanted = greedy(model, ids)
    assert list(found) == wanted[: len(found)]
    assert len(found) == len(wanted) or wanted[len(found)] == 0  # 0 ends a sequence


@pytest.mark.parametrize(
    "method",
    ["gptq", *(pytest.param(method, marks=pytest.mark.slow) for method in ("act-order", "awq", "fp8"))],
)
def test_a_quantised_folder(tiny_folder, tmp_path, method):
    plain = requantise_folder(tiny_folder, tmp_path / "m", method)
    bundle = build_quietly(tmp_path / "m", tmp_path / "out")
    manifest = open_bundle(bundle).manifest
    assert manifest.targets[0].parity.status == "passed"
    name = {"fp8": "FP8 E4M3", "awq": "AWQ 4 bits"}.get(method, "GPTQ 4 bits")
    assert name in manifest.source.format
    assert ("act-order" in manifest.source.format) == (method == "act-order")
    model = transformers.LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    model.load_state_dict(plain)
    if manifest.quantization["linear"] == "float32":
        same_tokens(bundle, model)


def test_adapters_are_merged_and_recorded(tiny_folder, tiny_reference, tmp_path):
    first, second = factors(Q), factors(Q, seed=1)
    one = write_adapter(tmp_path / "one", first, target_modules=["q_proj"])
    two = write_adapter(tmp_path / "two", second, target_modules=["q_proj"], lora_alpha=8)
    bundle = build_quietly(tiny_folder, tmp_path / "out", lora=(str(one), f"{two}:0.5"))
    manifest = open_bundle(bundle).manifest
    assert manifest.targets[0].parity.status == "passed"
    assert [(a.name, a.scale) for a in manifest.source.adapters] == [("one", 1.0), ("two", 0.5)]
    for adapter, path in zip(manifest.source.adapters, (one, two), strict=True):
        files = ("adapter_config.json", "adapter_model.safetensors")
        assert adapter.sha256 == {f: hashlib.sha256((path / f).read_bytes()).hexdigest() for f in files}
    model = copy.deepcopy(tiny_reference[0])
    apply_unmerged(model, first, 4.0)
    apply_unmerged(model, second, 1.0)
    same_tokens(bundle, model)


def test_a_bundle_without_adapters_says_nothing_of_them(tiny_bundle):
    assert open_bundle(tiny_bundle).manifest.source.adapters == ()


def test_an_adapter_that_does_not_fit_leaves_no_bundle(tiny_folder, tmp_path):
    path = write_adapter(tmp_path / "a", factors({"model.layers.7.self_attn.q_proj": (64, 64)}))
    with pytest.raises(
        CheckpointError, match=r"adapts model\.layers\.7\.self_attn\.q_proj, which the checkpoint has no"
    ):
        build_quietly(tiny_folder, tmp_path / "out", lora=(str(path),))
    assert not (tmp_path / "out").exists()


def test_transformers_cannot_be_the_reference_of_a_merged_model(tiny_folder, tmp_path):
    path = write_adapter(tmp_path / "a", factors(Q), target_modules=["q_proj"])
    with pytest.raises(BuildError, match="--reference transformers reads the checkpoint without adapters"):
        build_quietly(tiny_folder, tmp_path / "out", lora=(str(path),), reference="transformers")


def test_the_command_line_takes_adapters(tiny_folder, tmp_path):
    path = write_adapter(tmp_path / "a", factors(Q), target_modules=["q_proj"])
    command = [sys.executable, "-c", "from zonda.runtime.cli import main; main()", "build", str(tiny_folder)]
    options = ["-o", str(tmp_path / "out"), "--lora", str(path), "--lora", f"{path}:-0.5", "--dry-run"]
    said = subprocess.run([*command, *options], capture_output=True, text=True, check=True).stdout
    assert [line.split() for line in said.splitlines() if line.startswith("adapter")] == [
        ["adapter", "a,", "scale", "1"],
        ["adapter", "a,", "scale", "-0.5"],
    ]


def test_a_bias_of_zeros_that_no_linear_has_is_passed_over(tiny_folder, tmp_path):
    """Old quantisers write them."""
    folder = write_folder(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.bias"
    save_file(tensors | {name: torch.zeros(64)}, folder / "model.safetensors")
    build_quietly(folder, tmp_path / "out", verify="off")
    save_file(tensors | {name: torch.eye(64)[0]}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"1 unexpected: {name}"):
        build_quietly(folder, tmp_path / "again", verify="off")
