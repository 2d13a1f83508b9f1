"""Building: what comes out, what is refused, and that nothing half-written is ever left."""

import dataclasses
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import onnx_ir as ir
import pytest
from conftest import build_quietly, write_folder

from zonda import BuildError, CheckpointError, ConfigError, ParityError, UnsupportedArchitectureError, ZondaError
from zonda.export import onnx_files
from zonda.runtime import Pipeline
from zonda.runtime.bundle import open_bundle

ENTRY = [sys.executable, "build_engine.py"]


def left_behind(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_manifest_tells_the_whole_story(tiny_bundle, tiny_folder):
    manifest = open_bundle(tiny_bundle).manifest
    assert manifest.architecture == "LlamaForCausalLM"
    assert (manifest.source.name, manifest.source.format) == ("tiny", "safetensors F32")
    assert list(manifest.source.sha256) == ["model.safetensors"]
    assert (manifest.limits.capacity, manifest.limits.max_batch, manifest.limits.max_chunk) == (128, 4, 16)
    assert manifest.kv_bytes_per_token == 2 * 2 * 16 * 2 * 4
    assert manifest.eos_token_ids == (0,)
    assert len(manifest.contract.states) == 4
    (target,) = manifest.targets
    assert target.parity.status == "passed"
    assert target.parity.weights.tensors > 10
    assert {r.name for r in target.parity.schedules} >= {"prefill", "chunked prefill", "decode", "ragged batch"}
    for report in target.parity.schedules:
        assert 0 <= report.max_error <= target.parity.thresholds.max_error * target.parity.max_logit


def test_the_same_build_twice_gives_the_same_bytes(tiny_bundle, tiny_folder, tmp_path):
    """All but what is measured: the golden data, and with them the parity figures in the manifest, hold float noise."""
    again = build_quietly(tiny_folder, tmp_path / "again", max_batch=4, max_chunk=16)
    first, second = open_bundle(tiny_bundle).checksums, open_bundle(again).checksums
    measured = {"golden.safetensors", "manifest.json"}
    assert first.keys() == second.keys() > {"onnx/universal.onnx", "onnx/onnxruntime.onnx", "onnx/weights.bin"}
    assert {n: d for n, d in first.items() if n not in measured} == {
        n: d for n, d in second.items() if n not in measured
    }


def test_an_existing_place_is_refused_unless_told_and_then_replaced(tiny_folder, tmp_path):
    out = tmp_path / "out"
    build_quietly(tiny_folder, out, verify="off")
    before = (out / "SHA256SUMS").read_bytes()
    with pytest.raises(BuildError, match="exists"):
        build_quietly(tiny_folder, out)
    assert (out / "SHA256SUMS").read_bytes() == before
    build_quietly(tiny_folder, out, overwrite=True, capacity=64, verify="off")
    assert open_bundle(out).manifest.limits.capacity == 64
    assert left_behind(tmp_path) == ["out"]


def test_a_folder_that_is_no_bundle_is_never_replaced(tiny_folder, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("…")
    with pytest.raises(BuildError, match="not an engine bundle"):
        build_quietly(tiny_folder, tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis/chapter1.tex").exists()


def test_a_failed_proof_leaves_no_bundle_and_the_old_one_in_place(tiny_folder, tmp_path, monkeypatch):
    """The weight file gets one wrong value; the proof reads the checkpoint, so it sees the difference."""
    out = tmp_path / "out"
    build_quietly(tiny_folder, out, verify="off")
    before = (out / "SHA256SUMS").read_bytes()
    honest = onnx_files.write

    def corrupt(staging, *arguments):
        honest(staging, *arguments)
        weights = np.memmap(staging / onnx_files.WEIGHTS, np.float32, "r+")
        weights[weights.size // 2] += 0.5
        weights.flush()

    monkeypatch.setattr(onnx_files, "write", corrupt)
    with pytest.raises(
        ParityError, match=r"_proj\.weight is not the checkpoint's: 1 of [\d,]+ values differ, first at"
    ):
        build_quietly(tiny_folder, out, overwrite=True)
    assert (out / "SHA256SUMS").read_bytes() == before
    assert left_behind(tmp_path) == ["out"]


@pytest.mark.parametrize("where", ["export", "lowering"])
def test_a_failed_proof_names_the_first_place(tiny_folder, tmp_path, monkeypatch, where):
    """eps × 100 in one norm of the exported or of the lowered graph; the shared definition is right."""
    from zonda.export import universal
    from zonda.export.lower import onnxruntime as lowering

    room, name, attribute = {
        "export": (universal, "export_universal", "eps"),
        "lowering": (lowering, "lower", "epsilon"),
    }[where]
    honest = getattr(room, name)

    def plant(*given):
        made = honest(*given)
        graph = (made if where == "export" else made.model).graph
        norm = next(node for node in graph if "rms_norm_1" in [output.name for output in node.outputs])
        norm.attributes[attribute] = ir.AttrFloat32(attribute, 100 * norm.attributes[attribute].as_float())
        return made

    monkeypatch.setattr(room, name, plant)
    place = rf"First place: {where}: .* layer 0, model\.layers\.0\.post_attention_layernorm: RmsNorm.*; eps is 0\.0001"
    with pytest.raises(ParityError, match=rf"schedule 'prefill', step 0 .* is allowed.*{place}"):
        build_quietly(tiny_folder, tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_verify_off_is_recorded(tiny_folder, tmp_path):
    bundle = build_quietly(tiny_folder, tmp_path / "out", verify="off")
    assert open_bundle(bundle).manifest.targets[0].parity.status == "off"


def run_limited(command, limit: int):
    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(command, capture_output=True, text=True, preexec_fn=restrict, check=False)


def test_a_full_disk_is_said_and_cleaned_up(tiny_folder, tmp_path, request):
    """A limit on file size stands in for a full disk: the kernel refuses the same write call."""
    command = [*ENTRY, str(tiny_folder), "-o", str(tmp_path / "out")]
    os.chdir(request.config.rootpath)
    result = run_limited(command, 100_000)
    assert result.returncode == 1
    assert "is full" in result.stderr
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_build_leaves_nothing_that_looks_finished(tiny_folder, tmp_path, number, request):
    out = tmp_path / "out"
    command = [*ENTRY, str(tiny_folder), "-o", str(out)]
    process = subprocess.Popen(command, cwd=request.config.rootpath, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.building-*/onnx/weights.bin")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not out.exists()
    if number != signal.SIGKILL:
        assert left_behind(tmp_path) == []
    build_quietly(tiny_folder, out, verify="off")
    assert left_behind(tmp_path) == ["out"]  # what the killed build left is swept


def test_the_dry_run_predicts_and_writes_nothing(tiny_folder, tmp_path, request):
    command = [*ENTRY, str(tiny_folder), "-o", str(tmp_path / "out"), "--dry-run"]
    result = subprocess.run(command, cwd=request.config.rootpath, capture_output=True, text=True, check=True)
    for line in ("bundle on disk", "build memory, peak", "engine memory", "KV cache"):
        assert line in result.stdout
    assert "256 bytes a token" not in result.stdout
    assert "512 bytes a token" in result.stdout
    assert left_behind(tmp_path) == []


def test_a_build_that_cannot_fit_is_refused_before_it_starts(tiny_folder, tmp_path, monkeypatch):
    import shutil

    import psutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BuildError, match=r"the disk of .* has 1 kB"):
        build_quietly(tiny_folder, tmp_path / "out")
    monkeypatch.undo()
    memory = psutil.virtual_memory()._replace(available=10**6)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(BuildError, match=r"of memory, 1 MB are available"):
        build_quietly(tiny_folder, tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_a_host_that_can_build_but_not_run_records_the_proof_as_pending(tiny_folder, tmp_path, monkeypatch):
    from zonda import TargetUnavailableError
    from zonda.export import plan

    honest = plan.make_plan
    monkeypatch.setattr(
        plan,
        "make_plan",
        lambda *a, **k: dataclasses.replace(honest(*a, **k), provable=False, why_not_provable="it needs 30 GB"),
    )
    bundle = build_quietly(tiny_folder, tmp_path / "out")
    with pytest.raises(TargetUnavailableError, match=r"not been proven .it needs 30 GB"):
        Pipeline.load(bundle)
    Pipeline.load(bundle, target="onnxruntime").close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 129}, "--capacity 129 is more than the 128 positions"),
        ({"capacity": -1}, "--capacity must be at least 1"),
        ({"max_batch": 0}, "--max-batch must be at least 1"),
        ({"max_chunk": -1}, "--max-chunk must be at least 1"),
        ({"targets": ("abacus",)}, "unknown target 'abacus'; known: onnxruntime"),
        ({"verify": "maybe"}, "--verify is strict or off"),
    ],
)
def test_impossible_options_are_refused(tiny_folder, tmp_path, options, message):
    with pytest.raises(BuildError, match=message):
        build_quietly(tiny_folder, tmp_path / "out", **options)
    assert left_behind(tmp_path) == []


def test_a_missing_model_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        build_quietly("nowhere/at/all", tmp_path / "out")


def edit_config(folder, **changes):
    import json

    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "REMOVED"}))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architectures": ["Unheard"]}, UnsupportedArchitectureError, "supported: .*LlamaForCausalLM"),
        ({"hidden_size": "REMOVED"}, ConfigError, "the key 'hidden_size' is missing"),
        ({"num_hidden_layers": 3}, CheckpointError, "9 missing: model.layers.2"),
        ({"num_hidden_layers": 1}, CheckpointError, "9 unexpected: model.layers.1"),
        ({"intermediate_size": 97}, CheckpointError, "6 of another shape: .*expected"),
        ({"tie_word_embeddings": True}, CheckpointError, "ties .*but their weights differ"),
    ],
)
def test_a_config_that_does_not_fit_its_weights(tmp_path, changes, error, message):
    folder = write_folder(tmp_path / "model")
    edit_config(folder, **changes)
    with pytest.raises(error, match=message):
        build_quietly(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_ends_with_one_line_and_status_1(tmp_path, request):
    command = [*ENTRY, str(tmp_path / "nothing.gguf"), "-o", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=request.config.rootpath, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error:")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_every_error_is_a_zonda_error():
    assert all(issubclass(e, ZondaError) for e in (BuildError, CheckpointError, ConfigError, ParityError))


def test_the_eager_model_is_proven_too_if_that_is_asked_for(tiny_folder, tmp_path):
    bundle = build_quietly(tiny_folder, tmp_path / "out", reference="transformers")
    (target,) = open_bundle(bundle).manifest.targets
    proof = target.parity.reference_proof
    assert proof.name.startswith("transformers ")
    assert proof.tokens > 200
    assert proof.relative_error < 1e-5
    assert proof.top1_agreement == 1


def test_a_wrong_definition_is_seen_by_transformers_alone(tiny_folder, tmp_path, monkeypatch):
    """eps × 1000 in the shared definition: eager model and engine agree with each other."""
    from zonda.models import layers

    honest = layers.RmsNorm.__init__

    def wrong(self, size, eps):
        honest(self, size, eps * 1000)

    monkeypatch.setattr(layers.RmsNorm, "__init__", wrong)
    build_quietly(tiny_folder, tmp_path / "eager")
    with pytest.raises(ParityError, match=r"eager model differs from transformers [\d.]+ at prompt \d, token \d+"):
        build_quietly(tiny_folder, tmp_path / "transformers", reference="transformers")
    assert left_behind(tmp_path) == ["eager"]


@pytest.mark.parametrize("options", [{"reference": "llama.cpp"}, {"reference": "transformers", "verify": "off"}])
def test_an_impossible_reference_is_refused(tiny_folder, tmp_path, options):
    with pytest.raises(BuildError, match="--reference"):
        build_quietly(tiny_folder, tmp_path / "out", **options)
