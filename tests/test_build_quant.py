"""`--quant`: a checkpoint of floats becomes an engine whose weights are in blocks."""

import subprocess
import sys

import pytest
from conftest import build_quietly, write_folder

from zonda import BuildError
from zonda.export.compare.command import run_comparison
from zonda.export.testing import assert_engine_matches
from zonda.runtime import Pipeline, SamplingParams
from zonda.runtime.bundle import open_bundle

INT8, INT4 = "8 bits, blocks of 32", "4 bits, blocks of 32, offsets"
BUILD = [sys.executable, "-c", "from zonda.runtime.cli import main; main()", "build"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Large enough that weights weigh more than graphs."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    return write_folder(tmp_path_factory.mktemp("checkpoint") / "model", **sizes)


@pytest.fixture(scope="module")
def bundles(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundles")
    return {quant: build_quietly(folder, out / quant, quant=quant) for quant in ("none", "int8", "int4")}


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_the_manifest_says_how_weights_were_quantised(bundles, quant):
    manifest = open_bundle(bundles[quant]).manifest
    (target,) = manifest.targets
    assert target.quality == "balanced"
    assert target.parity.status == manifest.universal.status == "passed"
    assert target.parity.thresholds.name == "balanced"
    assert all(report.kl <= 0.03 for report in target.parity.schedules)
    assert manifest.source.format == "safetensors F32"
    said = manifest.quantization
    assert said["quant"] == quant
    assert said["method"].startswith("16 weights, blocks searched for the least weighted error")
    assert ("raised to 8 bits" in said["method"]) == (quant == "int4")
    assert (said["embedding"], said["norm"]) == (INT8, "float32")
    assert said["linear"] == (INT8 if quant == "int8" else f"{INT4}; {INT8}")


def test_a_bundle_of_floats_says_nothing_of_it(bundles):
    assert open_bundle(bundles["none"]).manifest.quantization.keys() == {"embedding", "linear", "norm", "kv"}


def test_the_weight_files_shrink(bundles):
    """Of a float, 8 bits with a scale for 32 are 9/32, 4 bits with scale and offset 6/32, before columns and tables."""
    size = {quant: open_bundle(path).manifest.files["onnx/weights.bin"] for quant, path in bundles.items()}
    tables = 2 * (128 + 128) * 32 * 4  # cos and sin
    floats = size["none"] - tables
    assert 0.27 < (size["int8"] - tables) / floats < 0.30
    assert size["int4"] < 0.87 * size["int8"]


def test_the_engine_talks_and_is_held_to_the_quantised_model(bundles, folder):
    with Pipeline.load(bundles["int4"]) as pipeline:
        greedy = SamplingParams(temperature=0.0, max_tokens=8)
        assert pipeline.generate("the wind comes", greedy).token_ids
    assert_engine_matches(bundles["int4"], folder, ["the wind comes down from the mountains", "hot and dry"])
    assert run_comparison(f"torch:{folder}", f"universal:{bundles['int4']}").agrees


def test_fast_takes_it_too(folder, tmp_path):
    bundle = build_quietly(folder, tmp_path / "out", quant="int4", quality="fast")
    (target,) = open_bundle(bundle).manifest.targets
    assert (target.quality, target.parity.status) == ("fast", "passed")


def test_the_dry_run_says_what_comes_out(folder, tmp_path):
    command = [*BUILD, str(folder), "-o", str(tmp_path / "out"), "--quant", "int4", "--dry-run"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = {line[:20].strip(): line[20:].strip() for line in said.splitlines()}
    assert lines["quant"] == "int4"
    assert "16 weights" in lines["method"]
    assert lines["temporary file"] == "1 MB"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant": "int3"}, "--quant is one of none, int8, int4, found 'int3'"),
        ({"quant": "int4", "quality": "exact"}, "--quality exact holds all weights in float32"),
        ({"quant": "int8", "reference": "transformers"}, "--reference transformers reads the checkpoint's weights"),
    ],
)
def test_what_makes_no_sense_is_refused(folder, tmp_path, options, message):
    with pytest.raises(BuildError, match=message):
        build_quietly(folder, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_in_blocks_is_refused(smollm2_gguf, tmp_path):
    message = r"Q4_1.* has 211 of its 211 in blocks already, the first .*: build it without --quant"
    with pytest.raises(BuildError, match=message):
        build_quietly(smollm2_gguf, tmp_path / "out", quant="int4")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_build_leaves_no_temporary_file(folder, tmp_path, monkeypatch):
    from zonda.export import onnx_files

    def fail(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_files, "check", fail)
    with pytest.raises(BuildError, match="is full"):
        build_quietly(folder, tmp_path / "out", quant="int4")
    assert list(tmp_path.iterdir()) == []
