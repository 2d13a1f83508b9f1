"""What only a GPU can show: a plan built for it computes what the bundle records, captured or not, and leaves nothing."""

import time

import numpy as np
import pytest

from zonda.plugins_trt import load
from zonda.runtime import Pipeline, SamplingParams, gpu
from zonda.runtime.bundle import open_bundle
from zonda.runtime.engines.cuda_memory import Device
from zonda.runtime.engines.tensorrt import TensorRtEngine
from zonda.runtime.loader import open_engine
from zonda.runtime.verification import prove_target

pytestmark = pytest.mark.gpu

RTX = (75, 80, 86, 89, 120, 121)


@pytest.fixture(scope="module")
def found():
    gpu_or_reason = gpu.find_gpu()
    if isinstance(gpu_or_reason, str):
        pytest.skip(gpu_or_reason)
    return gpu_or_reason


@pytest.fixture(scope="module", params=["all", "none"])
def planned(request, found, tiny_folder, tmp_path_factory):
    """A bundle with a plan for this GPU, with and without plugins."""
    from conftest import build_quietly

    target = "tensorrt-rtx" if found.capability in RTX else "tensorrt"
    if not gpu.is_installed(gpu.MODULES[target]):
        pytest.skip(f"{gpu.MODULES[target]} is not installed")
    path = build_quietly(
        tiny_folder,
        tmp_path_factory.mktemp("planned") / "tiny",
        targets=("onnxruntime", target),
        compute_capabilities=(found.capability,),
        dtype="fp16",
        plugins=(request.param,),
        capacity=112,
        max_batch=4,
        max_chunk=16,
    )
    bundle = open_bundle(path)
    return bundle, next(t for t in bundle.manifest.targets if t.kind == target)


def open_it(bundle, target, **options):
    kernels = bundle.file(target.kernels).read_bytes() if target.kernels else None
    trt = load(gpu.MODULES[target.kind])
    plan = bundle.file(target.graphs[0].file)
    manifest = bundle.manifest
    plugins = tuple(target.plugins)
    return TensorRtEngine(trt, plan, manifest.contract, manifest.limits, cubins=kernels, plugins=plugins, **options)


def test_every_schedule_of_the_golden_data(planned):
    bundle, target = planned
    engine = open_engine(bundle, target, bundle.manifest.limits)
    assert prove_target(bundle, target, engine).status == "passed"
    engine.close()


def test_replayed_graphs_give_the_logits_of_plain_steps(planned):
    logits = {}
    for graphs in (False, True):
        engine = open_it(*planned, cuda_graphs=graphs)
        cache = engine.allocate(2)
        ones, zeros = np.ones(2, np.int32), np.zeros((2, 1), np.int64)
        logits[graphs] = [
            engine.step(cache, 0, np.array([[7], [token]]), np.full(2, token, np.int32), ones, zeros).copy()
            for token in range(8)
        ]
        assert engine.no_graphs == (None if graphs else "they were switched off")
        engine.close()
    np.testing.assert_array_equal(logits[False], logits[True])


def test_a_copied_row_continues_as_the_original(planned):
    engine = open_it(*planned)
    cache = engine.allocate(2)
    ids = np.array([[3, 1, 4, 1, 5]])
    engine.step(cache, 1, ids, np.zeros(1, np.int32), np.full(1, 5, np.int32), np.array([[4]]))
    cache.copy_row(1, 0, 5)
    for copied, original in zip(cache.read(0, 5), cache.read(1, 5), strict=True):
        np.testing.assert_array_equal(copied, original)
    ones, zeros = np.ones(2, np.int32), np.zeros((2, 1), np.int64)
    logits = engine.step(cache, 0, np.array([[9], [9]]), np.full(2, 5, np.int32), ones, zeros)
    np.testing.assert_array_equal(logits[0], logits[1])
    engine.close()


def test_closing_gives_the_memory_back(planned):
    device = Device()
    open_it(*planned).close()  # what libraries keep for the process
    with device.entered():
        before = device.memory()[0]
    engine = open_it(*planned)
    engine.allocate(4)
    engine.close()
    with device.entered():
        after = device.memory()[0]
    device.close()
    assert abs(before - after) < 4 << 20


def test_tokens_a_second_are_printed(planned, capsys):
    bundle, target = planned
    with Pipeline.load(bundle.path, target=target.name) as pipeline:
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
        pipeline.generate("the wind", params)
        started = time.perf_counter()
        completion = pipeline.generate("the wind", params)
        rate = len(completion.token_ids) / (time.perf_counter() - started)
    with capsys.disabled():
        print(f"\n{target.name} on {gpu.find_gpu()}: {rate:.0f} tokens/s")
    assert len(completion.token_ids) == 64


def test_the_cuda_provider_of_onnx_runtime(planned):
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("onnxruntime has no CUDA provider: pip install 'zonda[cuda]' in an environment of its own")
    Pipeline.load(planned[0].path, target="onnxruntime-cuda", verify=True).close()
