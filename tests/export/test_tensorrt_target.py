"""`--target tensorrt-rtx` from the command line to the manifest, the dry run and `zonda inspect`."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import build_quietly
from rich.console import Console

from zonda import BuildError, TargetUnavailableError
from zonda.export import tensorrt_build
from zonda.export.tensorrt_target import PlanOptions
from zonda.plugins_trt import PLUGINS, CubinLibrary
from zonda.runtime import Pipeline
from zonda.runtime.bundle import open_bundle
from zonda.runtime.inspection import inspection_page

ALL = ",".join(PLUGINS)
ENTRY = [sys.executable, "build_engine.py"]
RTX = {"compute_capabilities": (80, 86, 89, 120), "max_batch": 4, "max_chunk": 16}

needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed: pip install -e '.[rtx]'"
)
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install -e '.[plugins]'"
)


@pytest.fixture(scope="module")
def both(tiny_folder, tmp_path_factory):
    """A bundle with plans for TensorRT-RTX, with our kernels and without, beside ONNX Runtime's graph."""
    out = tmp_path_factory.mktemp("bundle") / "both"
    options = {"targets": ("onnxruntime", "tensorrt-rtx"), "plugins": ("all", "none")} | RTX
    return open_bundle(build_quietly(tiny_folder, out, **options), full=True)


@needs_rtx
@needs_triton
def test_the_manifest_says_what_the_plan_is(both):
    ort, rtx, _ = both.manifest.targets
    assert (ort.name, ort.kind, ort.parity.status) == ("onnxruntime", "onnxruntime", "passed")
    assert (rtx.name, rtx.kind) == ("tensorrt-rtx-plugins", "tensorrt-rtx")
    assert (rtx.dtype, rtx.kv_dtype) == ("float16", "float16")
    assert rtx.compute_capabilities == (80, 86, 89, 120)
    assert rtx.plugins == {"AddRmsNorm": 4, "RmsNorm": 1, "RoPE": 2}
    assert rtx.tool_versions["tensorrt-rtx"]
    assert (rtx.parity.status, rtx.parity.reason) == ("pending", "a build does not run plans, which need a GPU")
    prefill, decode = rtx.graphs
    assert (prefill.role, prefill.profile, prefill.batch, prefill.sequence) == ("prefill", 0, (1, 4), (1, 16))
    assert (decode.role, decode.profile, decode.batch, decode.sequence) == ("decode", 1, (1, 4), (1, 1))
    assert prefill.num_logits == (1, 16)
    assert prefill.file == decode.file == "tensorrt-rtx/plugins.plan"
    assert prefill.activation_bytes >= decode.activation_bytes > 0
    assert rtx.weight_bytes > 2 * both.manifest.parameters
    assert {rtx.kernels, rtx.log, *rtx.weights} <= both.manifest.files.keys()
    assert not [name for name in both.manifest.files if ".onnx" in name and not name.startswith("onnx/")]


@needs_rtx
@needs_triton
def test_a_plan_without_our_kernels_lies_beside_it(both):
    _, rtx, builtin = both.manifest.targets
    assert (builtin.name, builtin.kind, builtin.plugins, builtin.kernels) == (
        "tensorrt-rtx-builtin",
        "tensorrt-rtx",
        {},
        "",
    )
    assert builtin.weights == ("tensorrt-rtx/builtin.plan",)
    assert "tensorrt-rtx/builtin.kernels" not in both.manifest.files
    assert both.checksums[builtin.weights[0]] != both.checksums[rtx.weights[0]]
    assert {builtin.log, *builtin.weights} <= both.manifest.files.keys()


@needs_rtx
@needs_triton
def test_every_capability_of_the_plan_has_its_kernels(both):
    target = both.manifest.targets[1]
    library = CubinLibrary.from_bytes(both.file(target.kernels).read_bytes())
    library.require(target.compute_capabilities)
    assert {variant.kernel for variant in library.variants} == {"add_rms_norm", "rms_norm", "rope"}


@needs_rtx
@needs_triton
def test_inspect_and_load_speak_of_it_and_run_the_proven_target(both):
    console = Console(record=True, width=200)
    console.print(inspection_page(both))
    text = console.export_text()
    assert "tensorrt-rtx-plugins" in text
    assert "tensorrt-rtx-builtin" in text
    assert "pending: a build does not run plans" in text
    with Pipeline.load(both.path) as pipeline:
        assert pipeline.target == "onnxruntime"
        assert list(pipeline.passed_over) == ["tensorrt-rtx-plugins", "tensorrt-rtx-builtin"]


@needs_rtx
def test_a_bundle_of_one_target_holds_no_other(tiny_folder, tmp_path):
    bundle = open_bundle(
        build_quietly(tiny_folder, tmp_path / "out", targets=("tensorrt-rtx",), dtype="bf16", plugins=("none",), **RTX)
    )
    (target,) = bundle.manifest.targets
    assert (target.dtype, target.plugins, target.kernels) == ("bfloat16", {}, "")
    assert bundle.manifest.universal.status == "passed"
    assert "onnx/onnxruntime.onnx" not in bundle.manifest.files
    with pytest.raises(TargetUnavailableError, match="tensorrt-rtx-builtin: "):
        Pipeline.load(bundle.path)


@needs_rtx
def test_a_build_that_dies_leaves_no_bundle(tiny_folder, tmp_path, monkeypatch):
    def die(request):
        raise BuildError("TensorRT died (exit status -11)")

    monkeypatch.setattr(tensorrt_build, "run_worker", die)
    with pytest.raises(BuildError, match="TensorRT died"):
        build_quietly(tiny_folder, tmp_path / "out", targets=("tensorrt-rtx",), plugins=("none",), **RTX)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("tensorrt-rtx",)}, "needs --compute-capability"),
        ({"targets": ("tensorrt-rtx",), "compute_capabilities": (90,)}, "not for 90"),
        ({"targets": ("tensorrt-rtx",), "compute_capabilities": (80,), "dtype": "fp8"}, "--dtype is fp16 or bf16"),
        ({"targets": ("tensorrt-rtx",), "compute_capabilities": (80,), "plugins": ("Gelu",)}, "--plugins is all, none"),
        ({"targets": ("tensorrt-rtx",), "compute_capabilities": (80,), "plugins": ("all", ALL)}, "each choice once"),
        ({"targets": ("onnxruntime", "onnxruntime")}, "names each target once"),
        ({"compute_capabilities": (80,)}, "are of a TensorRT target"),
        ({"dtype": "bf16"}, "are of a TensorRT target"),
    ],
)
def test_impossible_options_are_refused(tiny_folder, tmp_path, options, message):
    with pytest.raises(BuildError, match=message):
        build_quietly(tiny_folder, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def command(*arguments: str, cwd) -> subprocess.CompletedProcess:
    return subprocess.run([*ENTRY, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def test_the_dry_run_predicts_the_device(tiny_folder, tmp_path, request):
    result = command(
        str(tiny_folder), "-o", str(tmp_path / "out"), "--dry-run", "--target", "tensorrt-rtx", "--target", "onnxruntime",
        "--compute-capability", "8.0,120", "--plugins", "all", "--plugins", "none",
        cwd=request.config.rootpath,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for line in (
        "tensorrt-rtx-plugins device",
        "tensorrt-rtx-builtin device",
        "  weights",
        "256 bytes a token",
        "prefill",
        "decode",
        "plan on disk",
        "seconds",
    ):
        assert line in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("plugins", "name"),
    [
        (tuple(PLUGINS), "tensorrt-plugins"),
        ((), "tensorrt-builtin"),
        (("RmsNorm", "RoPE"), "tensorrt-rmsnorm-rope"),
    ],
)
def test_a_plan_is_called_by_its_kind_and_its_plugins(plugins, name):
    assert PlanOptions("tensorrt", "float16", (90,), plugins).name == name


def test_a_capability_that_is_no_number_is_one_line(tiny_folder, tmp_path, request):
    result = command(
        str(tiny_folder), "-o", str(tmp_path / "out"), "--target", "tensorrt-rtx", "--compute-capability", "ada",
        cwd=request.config.rootpath,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.startswith("error: --compute-capability is a list as 80,86,89,120; found 'ada'")


def test_a_build_that_cannot_fit_is_refused_before_it_starts(tiny_folder, tmp_path, monkeypatch):
    import psutil

    memory = psutil.virtual_memory()._replace(available=2 << 30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr("zonda.export.device_plan._WORKER", 4 << 30)
    with pytest.raises(
        BuildError, match=r"building for tensorrt-rtx-plugins needs 4.3 GB of memory, 2.1 GB are available"
    ):
        build_quietly(tiny_folder, tmp_path / "out", targets=("tensorrt-rtx",), **RTX)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@needs_rtx
@needs_triton
@pytest.mark.parametrize("plugins", ["all", "none"])
def test_smollm2_becomes_one_plan_for_four_architectures(smollm2_gguf, tmp_path, plugins):
    bundle = open_bundle(
        build_quietly(
            smollm2_gguf,
            tmp_path / "out",
            targets=("tensorrt-rtx",),
            compute_capabilities=(80, 86, 89, 120),
            capacity=2048,
            plugins=(plugins,),
            verify="off",
        )
    )
    (target,) = bundle.manifest.targets
    wanted = {"AddRmsNorm": 60, "RmsNorm": 1, "RoPE": 30}
    assert target.plugins == (wanted if plugins == "all" else {})
    assert sorted(target.plugins) == sorted(PLUGINS.keys() & target.plugins.keys())
    assert target.compute_capabilities == (80, 86, 89, 120)
    assert [graph.role for graph in target.graphs] == ["prefill", "decode"]
    size = bundle.manifest.files[target.weights[0]]
    assert target.weight_bytes <= size < target.weight_bytes + 50e6, "a plan is its weights and little more"
    prefill, decode = target.graphs
    print(
        f"\n{plugins}: weights {target.weight_bytes}, activations {prefill.activation_bytes}, {decode.activation_bytes}"
    )
