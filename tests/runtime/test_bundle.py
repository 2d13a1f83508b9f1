"""A bundle is not trusted: what is altered, missing or leads outside is refused before anything runs."""

import hashlib
import json
import shutil

import numpy as np
import onnx
import pytest

from zonda import BundleError
from zonda.runtime import Pipeline
from zonda.runtime.bundle import CHECKSUMS, MANIFEST, open_bundle


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def reseal(bundle, edit) -> None:
    """Change the manifest and give everything right checksums again: an attacker can compute sha256 too."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    edit(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    names = [MANIFEST, *(name for name in manifest["files"] if (bundle / name).is_file())]
    lines = [f"{hashlib.sha256((bundle / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    lines += [f"{'0' * 64}  {n}\n" for n in manifest["files"] if n not in names]
    (bundle / CHECKSUMS).write_text("".join(lines))


def test_a_whole_bundle_opens(bundle):
    opened = open_bundle(bundle, full=True)
    assert opened.manifest.targets[0].parity.status == "passed"
    assert set(opened.checksums) == {MANIFEST, *opened.manifest.files}


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "onnx/onnxruntime.onnx", MANIFEST, "tokenizer_config.json"]
)
def test_a_flipped_bit_is_found(bundle, name):
    path = bundle / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"sha256 differs"):
        Pipeline.load(bundle)


def test_a_flipped_bit_in_the_weights_is_found_by_full_verification(bundle):
    path = bundle / "onnx/weights.bin"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"weights\.bin is not the file that the build wrote"):
        Pipeline.load(bundle, verify="full")


def test_any_flipped_bit_of_any_file_is_found_before_anything_runs(bundle):
    """All files get their share of 500 positions, the two small lists 60 each."""
    random = np.random.default_rng(0)
    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    assert {MANIFEST, CHECKSUMS, "golden.safetensors"} <= {path.name for path in files}
    for path in files:
        data = path.read_bytes()
        count = 60 if path.name in (MANIFEST, CHECKSUMS) else -(-380 // (len(files) - 2))
        for position in random.integers(0, len(data), count).tolist():
            flipped = bytearray(data)
            flipped[position] ^= 1 << int(random.integers(8))
            path.write_bytes(flipped)
            with pytest.raises(BundleError):
                open_bundle(bundle, full=True)
        path.write_bytes(data)
    open_bundle(bundle, full=True)


@pytest.mark.parametrize("bit", range(8))
def test_line_ends_of_the_checksums_count_too(bundle, bit):
    """Text readers take several characters for the end of a line."""
    path = bundle / CHECKSUMS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1 << bit
    data[data.index(b"\n")] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(BundleError):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["onnx/weights.bin", "tokenizer.json", "onnx/onnxruntime.onnx"])
def test_a_truncated_file_is_found_by_its_size(bundle, name):
    data = (bundle / name).read_bytes()
    (bundle / name).write_bytes(data[:-1])
    with pytest.raises(BundleError, match=rf"has {len(data) - 1:,} bytes, the build wrote {len(data):,}"):
        Pipeline.load(bundle)


@pytest.mark.parametrize("name", ["onnx/weights.bin", "tokenizer.json", MANIFEST, CHECKSUMS])
def test_a_missing_file_is_named(bundle, name):
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=r"missing|not an engine bundle"):
        Pipeline.load(bundle)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "onnx/../../outside", "..", "a\\b", "onnx/"])
def test_a_path_that_leaves_the_bundle_is_refused(bundle, name):
    (bundle.parent / "outside").write_text("secret")
    reseal(bundle, lambda manifest: manifest["files"].update({name: 6}))
    with pytest.raises(BundleError, match=r"leaves the bundle|missing"):
        Pipeline.load(bundle)


def test_a_symbolic_link_is_refused(bundle):
    target = bundle.parent / "outside.json"
    shutil.move(bundle / "tokenizer.json", target)
    (bundle / "tokenizer.json").symlink_to(target)
    with pytest.raises(BundleError, match="symbolic link"):
        Pipeline.load(bundle)


def test_a_linked_folder_is_refused(bundle):
    shutil.move(bundle / "onnx", bundle.parent / "onnx")
    (bundle / "onnx").symlink_to(bundle.parent / "onnx")
    with pytest.raises(BundleError, match="symbolic link"):
        Pipeline.load(bundle)


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/passwd", "nowhere.bin"])
def test_external_data_outside_the_bundle_is_refused(bundle, location):
    path = bundle / "onnx/onnxruntime.onnx"
    size = (bundle / "onnx/weights.bin").stat().st_size
    (bundle / "outside.bin").write_bytes(b"\0" * size)
    graph = onnx.load(path, load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(graph.SerializeToString())
    reseal(bundle, lambda manifest: manifest["files"].update({"onnx/onnxruntime.onnx": path.stat().st_size}))
    with pytest.raises(BundleError, match="ONNX Runtime cannot open the graph"):
        Pipeline.load(bundle)


def test_a_graph_that_is_no_onnx_is_refused(bundle):
    path = bundle / "onnx/onnxruntime.onnx"
    path.write_bytes(b"no graph")
    reseal(bundle, lambda manifest: manifest["files"].update({"onnx/onnxruntime.onnx": 8}))
    with pytest.raises(BundleError, match="cannot open the graph"):
        Pipeline.load(bundle)


def test_a_newer_schema_is_refused_with_the_version_to_get(bundle):
    reseal(bundle, lambda manifest: manifest.update(schema=99, zonda_version="9.1"))
    with pytest.raises(BundleError, match=r"schema 99.*use zonda 9\.1 or newer"):
        Pipeline.load(bundle)


def test_unknown_fields_pass(bundle):
    reseal(bundle, lambda manifest: manifest.update(news="from a later minor version"))
    Pipeline.load(bundle).close()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.pop("contract"), "contract"),
        (lambda m: m.update(limits="many"), "limits"),
        (lambda m: m["limits"].update(capacity="1"), "capacity"),
        (lambda m: m.update(kind="xlora"), "kind 'xlora' has no loader"),
        (lambda m: m["contract"].update(layout="paged-1"), "paged-1"),
        (
            lambda m: m["contract"]["inputs"].append(
                {"role": "adapter_ids", "name": "a", "dtype": "int32", "shape": []}
            ),
            "adapter_ids",
        ),
        (lambda m: m["files"].pop("config.json"), "config.json"),
    ],
)
def test_a_malformed_manifest_is_refused(bundle, edit, message):
    from zonda import ZondaError

    reseal(bundle, edit)
    if message == "config.json":
        with (bundle / CHECKSUMS).open("a") as file:
            file.write(f"{'0' * 64}  config.json\n")
    with pytest.raises(ZondaError, match=message):
        Pipeline.load(bundle)


@pytest.mark.parametrize("text", ["", "garbage", "abc  manifest.json\n", "\0\n" * 5])
def test_malformed_checksums_are_refused(bundle, text):
    (bundle / CHECKSUMS).write_text(text)
    with pytest.raises(BundleError):
        Pipeline.load(bundle)


def test_manifest_json_that_is_not_json(bundle):
    (bundle / MANIFEST).write_text("{")
    digest = hashlib.sha256(b"{").hexdigest()
    (bundle / CHECKSUMS).write_text(f"{digest}  {MANIFEST}\n")
    with pytest.raises(BundleError, match="not readable"):
        Pipeline.load(bundle)


def test_a_folder_that_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match="no such directory"):
        Pipeline.load(tmp_path / "nothing")
    with pytest.raises(BundleError, match="not an engine bundle"):
        Pipeline.load(tmp_path)


def test_a_broken_tokenizer_is_named(bundle):
    (bundle / "tokenizer.json").write_text("{}")
    reseal(bundle, lambda manifest: manifest["files"].update({"tokenizer.json": 2}))
    with pytest.raises(BundleError, match="is not a tokenizer"):
        Pipeline.load(bundle)
