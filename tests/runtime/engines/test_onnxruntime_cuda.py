"""ONNX Runtime's CUDA provider, with ONNX Runtime on the CPU reading the doubles' GPU memory in its place."""

import numpy as np
import pytest
from cuda_double import FakeCuda
from support import SCENARIOS, Lowered, run_scenario

from zonda import EngineError, TargetUnavailableError
from zonda.runtime import Pipeline
from zonda.runtime.bundle import open_bundle
from zonda.runtime.engines import onnxruntime as room
from zonda.runtime.engines.onnxruntime import OnnxRuntimeEngine


class CpuBinding:
    """An IOBinding that takes CUDA addresses for what they are here: addresses of this process."""

    def __init__(self, io):
        self.io = io
        self.bind_ortvalue_input, self.bind_ortvalue_output = io.bind_ortvalue_input, io.bind_ortvalue_output
        self.bound = {}

    def bind_input(self, name, device, *arguments):
        assert device == "cuda"
        self.bound[name] = arguments[-1]
        self.io.bind_input(name, "cpu", *arguments)

    def bind_output(self, name, device, *arguments):
        assert device == "cuda"
        self.bound[name] = arguments[-1]
        self.io.bind_output(name, "cpu", *arguments)


class CpuSession:
    def __init__(self, session):
        self.session, self.bindings = session, []

    def io_binding(self):
        self.bindings.append(CpuBinding(self.session.io_binding()))
        return self.bindings[-1]

    def run_with_iobinding(self, binding):
        self.session.run_with_iobinding(binding.io)


@pytest.fixture
def cuda(monkeypatch):
    opened = room.open_session
    monkeypatch.setattr(
        room,
        "open_session",
        lambda model, threads, _, **options: CpuSession(opened(model, threads, "cpu", **options)),
    )
    found = FakeCuda()
    yield found
    assert found.live() == 0


@pytest.fixture
def engine(tiny_bundle, cuda):
    manifest = open_bundle(tiny_bundle).manifest
    model = tiny_bundle / "onnx/universal.onnx"
    engine = OnnxRuntimeEngine(model, manifest.contract, manifest.limits, threads=1, provider="cuda", cuda=cuda)
    yield engine
    engine.close()


@pytest.mark.parametrize("scenario", ["chunked prefill", "batch with idle rows"])
def test_it_computes_what_the_cpu_computes(engine, tiny_bundle, scenario):
    manifest = open_bundle(tiny_bundle).manifest
    lowered = OnnxRuntimeEngine(tiny_bundle / "onnx/onnxruntime.onnx", manifest.contract, manifest.limits, threads=1)
    steps = SCENARIOS[scenario]
    tokens = np.random.default_rng(1).integers(0, 250, (len(steps[0]), int(np.array(steps).sum(0).max())))
    found = run_scenario(Lowered(engine, len(tokens)), tokens, steps)
    wanted = run_scenario(Lowered(lowered, len(tokens)), tokens, steps)
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_past_and_present_are_one_address_on_the_device(engine):
    cache = engine.allocate(2)
    one = np.ones((1, 1), np.int64)
    engine.step(cache, 1, one, np.zeros(1, np.int32), np.ones(1, np.int32), one * 0)
    (binding,) = engine._sessions[0].bindings
    for layout, address in zip(cache.layouts, cache.addresses(1), strict=True):
        assert binding.bound[layout.input] == binding.bound[layout.output] == address


def test_caches_of_the_host_are_refused(engine, tiny_bundle):
    manifest = open_bundle(tiny_bundle).manifest
    one = np.ones((1, 1), np.int64)
    cache = room.HostKvCache(manifest.contract, manifest.limits, 1)
    with pytest.raises(EngineError, match="belongs to another engine"):
        engine.step(cache, 0, one, np.zeros(1, np.int32), np.ones(1, np.int32), one * 0)


def test_an_onnxruntime_without_the_provider_says_what_to_install(tiny_bundle):
    if "CUDAExecutionProvider" in room.ort.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    with pytest.raises(TargetUnavailableError, match=r"has no CUDAExecutionProvider.*pip install 'zonda\[cuda\]'"):
        Pipeline.load(tiny_bundle, target="onnxruntime-cuda")


def test_a_silent_fall_back_to_the_cpu_is_refused(tiny_bundle, monkeypatch):
    monkeypatch.setattr(room.ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    original = room.ort.InferenceSession
    monkeypatch.setattr(
        room.ort,
        "InferenceSession",
        lambda model, options, providers, **more: original(model, options, providers=providers[1:], **more),
    )
    with pytest.raises(TargetUnavailableError, match="fallen back from CUDAExecutionProvider to CPUExecutionProvider"):
        Pipeline.load(tiny_bundle, target="onnxruntime-cuda")
