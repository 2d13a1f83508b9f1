"""`--kv int8`: the KV cache of ONNX Runtime in a quarter of the bytes."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import build_quietly, write_folder
from safetensors.torch import load_file, save_file

from zonda import BuildError, ParityError
from zonda.export.compare.command import run_comparison
from zonda.export.testing import assert_engine_matches
from zonda.runtime import Pipeline, SamplingParams
from zonda.runtime.bundle import open_bundle
from zonda.runtime.loader import CUDA_PROVIDER, targets_of
from zonda.runtime.verification import numerics_of

FORMS = "onnx/cache.safetensors"
LIMITS = {"max_batch": 4, "max_chunk": 16}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def zonda(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from zonda.runtime.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def calm_folder(folder: Path, **changes) -> Path:
    """A tiny model whose attention is no sharper than that of trained ones: a sharp one makes much of a rounding."""
    write_folder(folder, **changes)
    tensors = load_file(folder / "model.safetensors")
    calmer = {name: tensor / 4 for name, tensor in tensors.items() if name.endswith("q_proj.weight")}
    save_file(tensors | calmer, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return calm_folder(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def bundle(folder, tmp_path_factory):
    return build_quietly(folder, tmp_path_factory.mktemp("bundle") / "int8", kv="int8", **LIMITS)


def test_the_manifest_says_what_the_cache_holds(bundle, tiny_bundle):
    manifest, floats = open_bundle(bundle).manifest, open_bundle(tiny_bundle).manifest
    (target,) = manifest.targets
    assert (target.kv_dtype, target.cache_forms, target.dtype) == ("int8", FORMS, "float32")
    assert FORMS in manifest.files
    assert 4 * manifest.kv_bytes_per_token == floats.kv_bytes_per_token
    assert manifest.quantization["kv"] == "8 bits, a scale a head and channel"
    assert {state.dtype for state in manifest.contract.states} == {"float32"}  # of the universal graph
    assert (target.parity.status, target.parity.thresholds.name) == ("passed", "int8-cache")
    assert manifest.universal.thresholds.name == "float32"
    errors = [report.kv_error for report in target.parity.schedules if report.kv_error]
    assert 1e-3 < max(errors) < 0.05  # rounded, and not by more than 8 bits do


def test_the_engine_talks_and_holds_bytes(bundle):
    with Pipeline.load(bundle) as pipeline:
        assert pipeline.generate("the wind comes", GREEDY).token_ids
        cache = pipeline.engine.allocate(2)
    assert {buffer.dtype for buffer in cache.buffers} == {np.dtype(np.int8)}


def test_the_host_that_serves_can_prove_it_again(bundle):
    result = zonda("verify", bundle)
    assert result.returncode == 0, result.stderr
    assert "onnxruntime: proven on" in result.stdout


def test_inspect_shows_it(bundle):
    said = " ".join(zonda("inspect", bundle).stdout.split())
    assert "8 bits, a scale a head and channel" in said
    assert "128 bytes a token" in said


def test_a_gpu_runs_the_universal_graph_whose_cache_is_in_floats(bundle):
    (cuda,) = targets_of(open_bundle(bundle), CUDA_PROVIDER)
    assert (cuda.kv_dtype, cuda.cache_forms, numerics_of(cuda)) == ("", "", "float32")


def test_users_can_hold_it_to_their_checkpoint(bundle, folder):
    assert_engine_matches(bundle, folder, ["the wind comes down from the mountains", "hot and dry"])


def test_a_healthy_one_compares_clean(bundle, folder):
    for reference in (f"torch:{folder}", f"universal:{bundle}", f"lowered:{bundle}"):
        found = run_comparison(reference, str(bundle), layers=True)
        assert found.agrees
        assert found.finding is None
        assert found.thresholds.name == "int8-cache"
        errors = [error for step in found.steps for error in step.kv_errors.values()]
        assert (max(errors) == 0) == reference.startswith("lowered")
        assert max(errors) < 0.05


@pytest.mark.parametrize("quality", ["balanced", "fast"])
def test_quantised_weights_take_it_too(tmp_path, quality):
    folder = calm_folder(tmp_path / "model", num_hidden_layers=1)
    bundle = build_quietly(folder, tmp_path / "out", quant="int8", quality=quality, kv="int8", max_batch=4)
    (target,) = open_bundle(bundle).manifest.targets
    assert (target.quality, target.kv_dtype, len(target.graphs)) == (quality, "int8", 1 + (quality == "fast"))
    assert (target.parity.status, target.parity.thresholds.name) == ("passed", f"{quality}-int8-cache")
    with Pipeline.load(bundle) as pipeline:
        assert pipeline.generate("the wind comes " * 8, GREEDY).token_ids  # both graphs
    assert run_comparison(f"torch:{folder}", str(bundle)).agrees
    (cuda,) = targets_of(open_bundle(bundle), CUDA_PROVIDER)
    assert (numerics_of(target), numerics_of(cuda)) == (f"{quality}-int8-cache", "float32")


def test_a_build_that_is_not_proven(folder, tmp_path):
    bundle = build_quietly(folder, tmp_path / "out", kv="int8", verify="off", **LIMITS)
    (target,) = open_bundle(bundle).manifest.targets
    assert (target.kv_dtype, target.parity.status) == ("int8", "off")
    with Pipeline.load(bundle) as pipeline:
        assert pipeline.generate("the wind", GREEDY).token_ids


def test_a_proof_that_was_put_off_has_the_thresholds_of_the_cache(folder, tmp_path, monkeypatch):
    from zonda.export import plan

    honest = plan.make_plan
    monkeypatch.setattr(plan, "make_plan", lambda *a, **k: dataclasses.replace(honest(*a, **k), provable=False))
    bundle = build_quietly(folder, tmp_path / "out", kv="int8", **LIMITS)
    assert open_bundle(bundle).manifest.targets[0].parity.status == "pending"
    result = zonda("verify", bundle)
    assert result.returncode == 0, result.stderr
    assert "onnxruntime: proven on" in result.stdout


def test_the_dry_run_counts_a_quarter(folder, tmp_path):
    said = zonda("build", folder, "-o", tmp_path / "out", "--kv", "int8", "--dry-run").stdout
    assert "128 bytes a token" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv": "int4"}, "--kv is float32 or int8, found 'int4'"),
        ({"kv": "int8", "targets": ("tensorrt-rtx",)}, "--kv int8 is of the target onnxruntime"),
        ({"kv": "int8", "targets": ("onnxruntime", "tensorrt-rtx")}, "--kv int8 is of the target onnxruntime"),
    ],
)
def test_what_makes_no_sense_is_refused(folder, tmp_path, options, message):
    if "targets" in options:
        options = options | {"compute_capabilities": (80,)}
    with pytest.raises(BuildError, match=message):
        build_quietly(folder, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_model_whose_attention_does_not_fit_is_refused(tmp_path):
    folder = calm_folder(tmp_path / "model", num_hidden_layers=1, head_dim=12)
    with pytest.raises(BuildError, match=r"--kv int8 is for .* past_key_values\.0\.key does not fit it"):
        build_quietly(folder, tmp_path / "out", kv="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_scales_of_one_layer_that_are_half_as_large_fail_the_gate_which_names_it(folder, tmp_path, monkeypatch):
    """In the graph alone: half of the codes clip, and the file of forms reads them twice as large."""
    from zonda.export.lower import onnxruntime as lowering

    honest = lowering.with_int8_cache

    def plant(*given):
        made = honest(*given)
        for name, value in made.model.graph.initializers.items():
            if name.startswith("layer_1.cache.") and name.endswith("value_scales"):
                value.const_value = lowering.ir.tensor(value.const_value.numpy() / 2)
        return made

    monkeypatch.setattr(lowering, "with_int8_cache", plant)
    with pytest.raises(
        ParityError, match=r"is allowed.*First place: lowering: .* layer 1, model\.layers\.1\.self_attn"
    ):
        build_quietly(folder, tmp_path / "out", kv="int8", **LIMITS)
    assert list(tmp_path.iterdir()) == []
