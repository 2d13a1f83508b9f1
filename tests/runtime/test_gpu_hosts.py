"""Which target runs on which host, in words: hosts without a GPU, with another one, with another TensorRT."""

import json
import logging
import re
import subprocess
import sys

import msgspec
import pytest
from cuda_double import FakeCuda, Result
from gpu_hosts import rtx_target
from rich.console import Console

from zonda import BundleError, DeviceMemoryError, TargetUnavailableError
from zonda.plugins_trt.cuda import CudaDriver
from zonda.runtime import Pipeline, SamplingParams, gpu, loader, records, verification
from zonda.runtime.bundle import open_bundle
from zonda.runtime.gpu import Gpu
from zonda.runtime.inspection import inspection_page
from zonda.runtime.manifest import Parity, Target

pytestmark = pytest.mark.usefixtures("state")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"modules": ("cuda",)}, r"tensorrt_rtx is not installed; pip install 'zonda\[rtx\]'"),
        ({"found": "this host has no usable NVIDIA GPU"}, "no usable NVIDIA GPU"),
        (
            {"found": Gpu("NVIDIA H100", 90, 80 << 30)},
            "built for compute capability 80, 86, 89, 120; NVIDIA H100 here has 90: .* build with --target tensorrt ",
        ),
        (
            {"found": Gpu("Tesla T4", 75, 16 << 30)},
            "Tesla T4 here has 75: build again with --target tensorrt-rtx --compute-capability 75",
        ),
        (
            {"version": "1.6.0.20"},
            r"built with tensorrt-rtx-cu13 1.7.1.116, 1.6.0.20 .*pip install tensorrt-rtx-cu13==",
        ),
        ({}, r"has not been proven \(the build host has no GPU\); `zonda verify` proves it here"),
    ],
)
def test_what_keeps_a_plan_from_running_is_one_sentence_with_the_fix(with_plan, host, changes, words):
    host(**changes)
    path = with_plan()
    found = loader.choose_target(open_bundle(path), None)
    assert found[0].name == "onnxruntime"
    assert re.search(words, found[1]["tensorrt-rtx"])
    page = Console(record=True, width=400)
    page.print(inspection_page(open_bundle(path)))
    assert re.search("cannot run: .*" + words, page.export_text())


def test_a_full_tensorrt_plan_of_another_gpu_is_built_again_here(with_plan, host):
    path = with_plan(name="tensorrt", compute_capabilities=(80,))
    _, passed_over = loader.choose_target(open_bundle(path), None)
    assert "build again with --target tensorrt on this host" in passed_over["tensorrt"]


def test_a_forced_target_that_cannot_run_is_an_error_in_the_same_words(with_plan, host):
    host(found="this host has no usable NVIDIA GPU (cuInit failed)")
    path = with_plan()
    with pytest.raises(TargetUnavailableError, match="tensorrt-rtx: this host has no usable NVIDIA GPU"):
        Pipeline.load(path, target="tensorrt-rtx")
    with pytest.raises(TargetUnavailableError, match="tensorrt: the bundle was not built for it"):
        Pipeline.load(path, target="tensorrt")


def test_the_log_says_what_runs_and_what_was_passed_over(with_plan, host, caplog):
    host(modules=("cuda",))
    with caplog.at_level(logging.INFO, "zonda.runtime.loader"):
        Pipeline.load(with_plan()).close()
    assert "running onnxruntime (float32); not tensorrt-rtx: tensorrt_rtx is not installed" in caplog.text


def test_a_forced_plan_generates_what_onnx_runtime_generates(with_plan, host, doubles):
    path = with_plan()
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=1)
    prompts = ["hot and dry wind", "the", "def f(x)"]
    with Pipeline.load(path, target="onnxruntime") as pipeline:
        wanted = [result.text for result in pipeline.generate(prompts, params)]
    with Pipeline.load(path, target="tensorrt-rtx", verify=True) as pipeline:
        assert pipeline.target == "tensorrt-rtx"
        assert [result.text for result in pipeline.generate(prompts, params)] == wanted


def test_a_plan_runs_by_itself_once_it_has_been_proven_here(with_plan, host, doubles):
    bundle = open_bundle(with_plan())
    target = bundle.manifest.targets[0]
    engine = loader.open_engine(bundle, target, bundle.manifest.limits)
    records.remember(bundle, target, verification.prove_target(bundle, target, engine))
    engine.close()
    assert loader.choose_target(bundle, None) == (target, {})
    page = Console(record=True, width=200)
    page.print(inspection_page(bundle))
    assert "runs" in next(line for line in page.export_text().splitlines() if "tensorrt-rtx" in line)
    host(found=Gpu("NVIDIA A10", 86, 24 << 30))
    assert "has not been proven" in loader.choose_target(bundle, None)[1]["tensorrt-rtx"]


def test_a_proven_plan_comes_before_onnx_runtime(with_plan, host, doubles):
    with Pipeline.load(with_plan(parity=Parity(status="passed"))) as pipeline:
        assert (pipeline.target, pipeline.passed_over) == ("tensorrt-rtx", {})


def test_too_little_memory_is_told_before_a_prompt_is_taken(with_plan, host, doubles):
    doubles.total = 1000
    with pytest.raises(DeviceMemoryError, match="MB are free"):
        Pipeline.load(with_plan(), target="tensorrt-rtx")


def test_a_plan_in_two_files_is_not_half_run(with_plan, host, doubles):
    graphs = rtx_target().graphs
    graphs = (graphs[0], msgspec.structs.replace(graphs[1], file="onnx/universal.onnx"))
    with pytest.raises(BundleError, match="2 graph files"):
        Pipeline.load(with_plan(graphs=graphs), target="tensorrt-rtx")


def test_the_gpu_is_described_by_its_driver():
    cuda = FakeCuda(total=24 << 30, capability=(12, 0))
    assert gpu.probe(CudaDriver(cuda)) == Gpu("NVIDIA Double", 120, 24 << 30)


def test_a_host_whose_driver_finds_no_gpu_is_told_so(monkeypatch):
    cuda = FakeCuda()
    cuda.fail["cuInit"] = Result.CUDA_ERROR_NO_DEVICE
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", cuda)
    gpu.find_gpu.cache_clear()
    try:
        assert gpu.find_gpu() == (
            "this host has no usable NVIDIA GPU (cuInit failed: CUDA_ERROR_NO_DEVICE); run it on a host with one and its "
            "driver"
        )
    finally:
        gpu.find_gpu.cache_clear()


def test_manifests_without_the_new_fields_are_read(tiny_bundle):
    target = json.loads((tiny_bundle / "manifest.json").read_text())["targets"][0]
    for name in ("compute_capabilities", "plugins", "kernels", "kv_dtype"):
        target.pop(name, None)
    assert msgspec.convert(target, Target).kernels == ""


def test_the_engine_needs_neither_torch_nor_triton_nor_onnx():
    code = (
        "import sys\n"
        "for name in ('torch', 'triton', 'onnx', 'onnx_ir', 'onnxscript', 'transformers', 'onnxruntime'):\n"
        "    sys.modules[name] = None\n"
        "import zonda.runtime.engines.tensorrt, zonda.runtime.loader, zonda.runtime.gpu\n"
        "assert 'tensorrt' not in sys.modules and 'tensorrt_rtx' not in sys.modules and 'cuda' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
