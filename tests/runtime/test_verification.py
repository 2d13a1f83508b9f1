"""A bundle proves itself again where it serves, and remembers outside itself that it did."""

import re
import shutil
import subprocess
import sys

import msgspec
import numpy as np
import onnx
import pytest

from zonda import BundleError, ParityError, TargetUnavailableError
from zonda.runtime import Pipeline, records, verification
from zonda.runtime.bundle import open_bundle
from zonda.runtime.loader import choose_target, open_engine


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def zonda(*arguments):
    command = [sys.executable, "-c", "from zonda.runtime.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_verify_says_in_words_what_it_checked(tiny_bundle):
    result = zonda("verify", tiny_bundle)
    assert result.returncode == 0, result.stderr
    files, target = result.stdout.splitlines()
    assert re.fullmatch(r"\d+ files, [\d.]+ MB: all as the build wrote them", files)
    assert re.match(r"onnxruntime: proven on \d{3,4} tokens \(prefill, chunked prefill, decode, ragged batch", target)
    assert "logits within" in target
    assert "keys and values within" in target


def test_verify_needs_neither_torch_nor_onnx(tiny_bundle):
    code = (
        "import sys\\n"
        "for name in ('torch', 'onnx', 'onnx_ir', 'onnxscript', 'polygraphy', 'transformers'): sys.modules[name] = None\\n"
        f"sys.argv = ['zonda', 'verify', {str(tiny_bundle)!r}]\\n"
        "from zonda.runtime.cli import main; main()"
    ).replace("\\n", "\n")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "proven on" in result.stdout


@pytest.fixture
def altered(tiny_bundle, tmp_path):
    """A bundle whose lowered graph has another eps, sealed again as if it were what the build wrote."""
    from zonda.export.bundle import list_files, seal

    bundle = shutil.copytree(tiny_bundle, tmp_path / "altered")
    manifest = open_bundle(bundle).manifest
    model = onnx.load(bundle / "onnx/onnxruntime.onnx", load_external_data=False)
    norm = next(node for node in model.graph.node if node.op_type == "SkipSimplifiedLayerNormalization")
    (epsilon,) = (attribute for attribute in norm.attribute if attribute.name == "epsilon")
    epsilon.f *= 1000
    (bundle / "onnx/onnxruntime.onnx").write_bytes(model.SerializeToString())
    for name in ("manifest.json", "SHA256SUMS"):
        (bundle / name).unlink()
    seal(bundle, msgspec.structs.replace(manifest, files=list_files(bundle)))
    return bundle


def test_verify_fails_where_the_engine_computes_something_else(altered):
    result = zonda("verify", altered)
    assert result.returncode == 1
    assert "all as the build wrote them" in result.stdout
    assert re.search(r"error: the engine differs from the reference: schedule 'prefill', step 0", result.stderr)


def test_a_pipeline_can_prove_its_engine_when_it_is_loaded(tiny_bundle, altered):
    Pipeline.load(tiny_bundle, verify=True).close()
    with pytest.raises(ParityError, match="schedule 'quick'"):
        Pipeline.load(altered, verify=True)
    Pipeline.load(altered).close()


def test_a_flipped_bit_is_found_before_anything_runs(tiny_bundle, tmp_path):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "flipped")
    weights = np.memmap(bundle / "onnx/weights.bin", np.uint8, "r+")
    weights[100] ^= 1
    weights.flush()
    result = zonda("verify", bundle)
    assert result.returncode == 1
    assert result.stdout == ""
    assert "weights.bin is not the file that the build wrote" in result.stderr


def test_a_pending_target_is_used_once_it_has_been_proven_here(tiny_bundle, state, monkeypatch):
    bundle = open_bundle(tiny_bundle)
    (target,) = bundle.manifest.targets
    pending = msgspec.structs.replace(target.parity, status="pending", reason="no memory", schedules=())
    target = msgspec.structs.replace(target, parity=pending)
    unproven = type(bundle)(bundle.path, msgspec.structs.replace(bundle.manifest, targets=(target,)), bundle.checksums)
    with pytest.raises(TargetUnavailableError, match=r"no memory.*zonda verify"):
        choose_target(unproven, None)
    engine = open_engine(unproven, target, unproven.manifest.limits)
    record = records.remember(unproven, target, verification.prove_target(unproven, target, engine))
    assert record.is_relative_to(state)
    assert choose_target(unproven, None)[0].name == "onnxruntime"
    monkeypatch.setattr(records, "_host", lambda: "another host")
    with pytest.raises(TargetUnavailableError):
        choose_target(unproven, None)


def test_a_bundle_without_golden_data_cannot_be_verified(tiny_folder, tmp_path):
    from conftest import build_quietly

    bundle = build_quietly(tiny_folder, tmp_path / "off", verify="off")
    result = zonda("verify", bundle)
    assert result.returncode == 1
    assert "built with --verify off" in result.stderr
    with pytest.raises(BundleError, match="--verify off"):
        Pipeline.load(bundle, verify=True)


def test_an_unknown_target_is_not_silently_skipped(tiny_bundle):
    result = zonda("verify", tiny_bundle, "--target", "tensorrt")
    assert result.returncode == 1
    assert "no target to verify" in result.stderr
