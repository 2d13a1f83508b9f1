"""An engine on a plan for the doubles of TensorRT and CUDA, and ONNX Runtime's beside it."""

import pytest
from cuda_double import FakeCuda
from tensorrt_double import fake_tensorrt, write_plan

from zonda.runtime.bundle import open_bundle
from zonda.runtime.engines.onnxruntime import OnnxRuntimeEngine
from zonda.runtime.engines.tensorrt import TensorRtEngine


@pytest.fixture
def bundle(tiny_bundle):
    return open_bundle(tiny_bundle)


@pytest.fixture
def cuda():
    return FakeCuda()


@pytest.fixture
def trt(cuda):
    return fake_tensorrt(cuda)


@pytest.fixture
def open_plan(bundle, cuda, trt, tmp_path):
    """`open_plan(**plan)` is an engine on a plan that ONNX Runtime executes; what it holds must be gone in the end."""
    engines = []

    def make(*, engine_options=None, limits=None, **plan):
        manifest = bundle.manifest
        plan.setdefault("onnx", bundle.path / "onnx/universal.onnx")
        path = write_plan(tmp_path / "tiny.plan", manifest.contract, manifest.limits, **plan)
        options = {"cuda": cuda} | (engine_options or {})
        engine = TensorRtEngine(trt, path, manifest.contract, limits or manifest.limits, **options)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()
    assert cuda.live() == 0


@pytest.fixture
def reference(bundle):
    manifest = bundle.manifest
    engine = OnnxRuntimeEngine(bundle.path / "onnx/onnxruntime.onnx", manifest.contract, manifest.limits, threads=1)
    yield engine
    engine.close()
