"""Plans are built without a GPU, are what was asked for, and a build that fails says why and leaves nothing."""

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
import torch
from support import random_with_quantised_norm, with_quantised_norm

from zonda import BuildError
from zonda.export import tensorrt_build, tensorrt_worker
from zonda.export.lower.tensorrt import lower, parse_plugins
from zonda.export.tensorrt_build import build_plan, check_capabilities, make_profiles, write_onnx
from zonda.export.universal import export_universal
from zonda.models.llama import Llama
from zonda.plugins_trt import PLUGINS, CubinLibrary
from zonda.runtime.manifest import Limits

needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed: pip install -e '.[rtx]'"
)
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install -e '.[plugins]'"
)

LIMITS = Limits(capacity=32, max_batch=4, max_chunk=16, vocab_size=61)
ROWS = LIMITS.capacity + LIMITS.max_chunk


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_with_quantised_norm(ROWS)


@pytest.fixture(scope="module")
def universal() -> ir.Model:
    with torch.device("meta"):
        return export_universal(with_quantised_norm(ROWS))


@pytest.fixture(scope="module")
def kernel_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def write(folder: Path, universal: ir.Model, model: Llama, dtype="float16", plugins="all") -> Path:
    tensors = dict(model.state_dict()) | dict(model.named_buffers(remove_duplicate=False))
    return write_onnx(folder, lower(universal, dtype, ROWS, parse_plugins(plugins)), tensors.__getitem__)


def build(onnx: Path, cache: Path, capabilities=(80, 89), target="tensorrt-rtx"):
    return build_plan(
        onnx,
        onnx.parent,
        target=target,
        capabilities=capabilities,
        profiles=make_profiles(LIMITS),
        kernel_cache=cache,
    )


@needs_rtx
@needs_triton
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_marker_is_our_plugin_every_cache_update_in_place_and_both_profiles_are_there(
    universal, model, tmp_path, kernel_cache, dtype
):
    report = build(write(tmp_path, universal, model, dtype), kernel_cache)
    kinds = sorted(name.rsplit("_", 1)[0] for name in report.plugin_layers)
    assert kinds == [*["AddRmsNorm"] * 4, "QRmsNorm", "RoPE", "RoPE"]
    assert report.layers["PLUGIN_V3"] == 7
    assert report.layers["KV_CACHE_UPDATE"] == 4
    assert report.profiles == len(report.activations) == 2
    assert report.weights >= 2 * sum(p.numel() for p in model.parameters())
    assert report.warnings == ()
    plan = (tmp_path / "model.plan").read_bytes()
    assert len(plan) == report.plan_bytes
    assert np.float32(1e-6).tobytes() in plan
    library = CubinLibrary.from_bytes((tmp_path / "model.kernels").read_bytes())
    assert library.capabilities == (80, 89)
    assert {variant.kernel for variant in library.variants} == {"add_rms_norm", "q_rms_norm", "rope"}
    log = (tmp_path / "model.log").read_text()
    assert "INFO: Opset version:    24" in log
    assert str(tmp_path) not in log


@needs_rtx
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_without_plugins_nothing_is_a_plugin_and_triton_is_not_needed(
    universal, model, tmp_path, kernel_cache, monkeypatch, dtype
):
    monkeypatch.setattr(tensorrt_build, "compile_kernels", None)
    report = build(write(tmp_path, universal, model, dtype, "none"), kernel_cache)
    assert report.plugin_layers == ()
    assert "PLUGIN_V3" not in report.layers
    assert report.layers["KV_CACHE_UPDATE"] == 4


@needs_rtx
def test_the_lint_comes_before_tensorrt(universal, model, tmp_path, kernel_cache, monkeypatch):
    onnx = write(tmp_path, universal, model, plugins="none")
    graph = ir.load(onnx)
    attention = next(node for node in graph.graph if node.op_type == "Attention")
    attention.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
    ir.save(graph, onnx)
    monkeypatch.setattr(tensorrt_build, "run_worker", None)
    with pytest.raises(BuildError, match=rf"{attention.name}: is_causal masks from the first key"):
        build(onnx, kernel_cache)


@needs_rtx
def test_what_tensorrt_refuses_is_said_with_the_node(universal, model, tmp_path, kernel_cache):
    onnx = write(tmp_path, universal, model, plugins="none")
    graph = ir.load(onnx)
    attention = next(node for node in graph.graph if node.op_type == "Attention")
    attention.op_type, attention.name = "NobodyKnows", "the_node"
    ir.save(graph, onnx)
    with pytest.raises(BuildError, match=r"TensorRT does not take the graph: the_node: .*Plugin not found"):
        build(onnx, kernel_cache)
    assert not (tmp_path / "model.plan").exists()


DYING = """
import os, sys
print("words on the way", file=sys.stderr, flush=True)
os.kill(os.getpid(), 11)
"""


def test_a_crash_of_tensorrt_is_a_build_error_with_the_end_of_its_log(tmp_path, monkeypatch):
    """A stand-in for the interpreter dies as TensorRT does when its heap is corrupt."""
    script = tmp_path / "python"
    script.write_text(f"#!{tensorrt_build.sys.executable}\n{DYING}")
    script.chmod(0o755)
    (tmp_path / "model.log").write_text("INFO: first\nINFO: the last message\n")
    monkeypatch.setattr(tensorrt_build.sys, "executable", str(script))
    request = tensorrt_build.Request(
        module="tensorrt_rtx",
        onnx="",
        plan="",
        log=str(tmp_path / "model.log"),
        kernels="",
        capabilities=(80,),
        profiles=(),
        operators=(),
        plugins={},
        cache_updates=0,
    )
    with pytest.raises(BuildError, match=r"(?s)TensorRT died \(exit status -11\).*the last message.*words on the way"):
        tensorrt_build.run_worker(request)


REQUEST = SimpleNamespace(plugins={"RoPE_6": {}, "RmsNorm_1": {"eps": 1e-5}}, cache_updates=4)


@pytest.mark.parametrize(
    ("plugins", "updates", "message"),
    [
        (["RoPE_6"], 4, "2 nodes should be plugins, 1 are; not: RmsNorm_1"),
        (["RoPE_6", "RmsNorm_1", "Another"], 4, "2 nodes should be plugins, 3 are"),
        (["RoPE_6", "RmsNorm_1"], 3, "4 cache updates should be in place, 3 are KV_CACHE_UPDATE"),
    ],
)
def test_a_plan_that_is_not_what_was_asked_for_is_refused(plugins, updates, message):
    with pytest.raises(BuildError, match=message):
        tensorrt_worker.check_layers(plugins, tensorrt_worker.Counter(KV_CACHE_UPDATE=updates), REQUEST)


def test_a_plan_without_an_attribute_is_refused(tmp_path):
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"...eps..." + np.float32(1e-6).tobytes())
    with pytest.raises(BuildError, match=r"RmsNorm_1: its attribute eps = 1e-05 is not in the plan"):
        tensorrt_worker.check_plan(SimpleNamespace(plan=str(plan), plugins=REQUEST.plugins))
    plan.write_bytes(b"...eps..." + np.float32(1e-5).tobytes())
    tensorrt_worker.check_plan(SimpleNamespace(plan=str(plan), plugins=REQUEST.plugins))


def test_full_tensorrt_is_not_told_compute_capabilities():
    tensorrt_worker.set_capabilities(SimpleNamespace(), None, (80,))
    told = []
    config = SimpleNamespace(set_compute_capability=lambda *arguments: told.append(arguments))
    rtx = SimpleNamespace(ComputeCapability=SimpleNamespace(SM80="SM80", SM120="SM120"))
    tensorrt_worker.set_capabilities(rtx, config, (80, 120))
    assert told == [("SM80", 0), ("SM120", 1)]
    assert config.num_compute_capabilities == 2


def test_a_plan_of_full_tensorrt_is_for_the_gpu_at_hand():
    def driver():
        return SimpleNamespace(capability=lambda: 90)

    tensorrt_worker.check_device(SimpleNamespace(), (90,), driver)
    tensorrt_worker.check_device(SimpleNamespace(ComputeCapability=None), (80, 86), driver)
    for asked in ((80,), (80, 90)):
        with pytest.raises(BuildError, match="for this host's GPU only: pass --compute-capability 90"):
            tensorrt_worker.check_device(SimpleNamespace(), asked, driver)


def test_full_tensorrt_is_named_if_it_is_not_installed(universal, model, tmp_path, kernel_cache):
    if find_spec("tensorrt") is not None:
        pytest.skip("tensorrt is installed")
    with pytest.raises(BuildError, match=r"tensorrt cannot be loaded: .*pip install 'zonda\[tensorrt\]'"):
        build(write(tmp_path, universal, model, plugins="none"), kernel_cache, (90,), "tensorrt")


@pytest.mark.parametrize(
    ("target", "capabilities", "dtype", "message"),
    [
        ("tensorrt-rtx", (), "float16", "needs --compute-capability"),
        ("tensorrt-rtx", (80, 90), "float16", "not for 90; .*need --target tensorrt"),
        ("tensorrt-rtx", (75, 80), "bfloat16", "compute capability 75 has no bfloat16"),
    ],
)
def test_capabilities_that_cannot_be_are_refused(target, capabilities, dtype, message):
    with pytest.raises(BuildError, match=message):
        check_capabilities(target, capabilities, dtype)


def test_a_weight_beyond_float16_is_refused_by_name(universal, model, tmp_path):
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        kept = weight[3, 5].item()
        weight[3, 5] = 1e5
        with pytest.raises(BuildError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1e\+05, .*--dtype bf16"):
            write(tmp_path, universal, model)
        weight[3, 5] = kept


def test_the_profiles_cover_the_limits():
    prefill, decode = make_profiles(LIMITS)
    assert prefill.dimensions == {"batch": (1, 1, 4), "sequence": (1, 16, 16), "num_logits": (1, 1, 16)}
    assert decode.dimensions == {"batch": (1, 1, 4), "sequence": (1, 1, 1), "num_logits": (1, 1, 1)}


def test_expected_remarks_are_not_warnings():
    assert tensorrt_worker.in_words("ModelImporter.cpp:1071: Make sure input input_ids has Int64 binding.") == ""
    assert tensorrt_worker.in_words("Foo.cpp:12: Something is odd") == "Something is odd"


def test_importing_the_builder_imports_no_tensorrt():
    import subprocess
    import sys

    code = "import sys, zonda.export, zonda.export.tensorrt_build, zonda.export.lower.tensorrt\n"
    code += "assert not [m for m in sys.modules if m.startswith(('tensorrt', 'triton.'))]"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_plugin_has_a_name_for_the_command_line():
    assert parse_plugins("all") == tuple(PLUGINS)
    assert msgspec.json.encode(make_profiles(LIMITS))
