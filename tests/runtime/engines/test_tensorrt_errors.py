"""What the TensorRT engine refuses, in which words, and that it holds nothing afterwards."""

import msgspec
import numpy as np
import pytest
from cuda_double import Result
from engine_steps import decode, prefill
from tensorrt_double import write_plan

from zonda import BundleError, CapacityError, DeviceMemoryError, EngineError
from zonda.runtime.engines.tensorrt import TensorRtEngine


def test_a_plan_that_is_none_is_refused_with_tensorrts_words(bundle, cuda, trt, tmp_path):
    (tmp_path / "x.plan").write_bytes(b"not a plan")
    with pytest.raises(EngineError, match=r"x\.plan: TensorRT cannot read the plan on this host: Serialization"):
        TensorRtEngine(trt, tmp_path / "x.plan", bundle.manifest.contract, bundle.manifest.limits, cuda=cuda)
    assert cuda.live() == 0


def test_activations_that_do_not_fit_are_told_in_numbers(open_plan, cuda):
    with pytest.raises(DeviceMemoryError, match=r"activations of one step needs 4,000.0 MB of GPU memory") as caught:
        open_plan(activations=2_000_000_000)
    assert (caught.value.needed, caught.value.total) == (4_000_000_000, 1 << 30)
    assert cuda.live() == 0


def test_a_cache_that_does_not_fit_is_told_in_numbers(open_plan, cuda):
    engine = open_plan()
    cuda.total = cuda.total - cuda.cuMemGetInfo()[1] + 100_000
    with pytest.raises(DeviceMemoryError, match=r"a KV cache of 4 rows needs 0.3 MB .* 0.1 of .* smaller max_batch"):
        engine.allocate(4)
    engine.allocate(1)


def test_weights_that_do_not_fit(open_plan, trt, cuda):
    trt.refuse.add("deserialize_cuda_engine")
    with pytest.raises(DeviceMemoryError, match=r"tiny.plan needs .* GPU memory"):
        open_plan()
    assert cuda.live() == 0


def test_a_context_that_does_not_fit(open_plan, trt):
    engine = open_plan()
    trt.refuse.add("create_execution_context")
    with pytest.raises(DeviceMemoryError, match="an execution context needs more GPU memory"):
        decode(engine, engine.allocate(1), [1], 0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("set_optimization_profile_async", "does not take profile 0"),
        ("set_input_shape", r"does not take input input_ids of shape \(1, 1\)"),
        ("set_tensor_address", "does not take address"),
        ("execute_async_v3", r"refused a step of input_ids \(1, 1\).*Error Code 1: Cuda Runtime"),
    ],
)
def test_what_tensorrt_refuses_is_named_and_the_engine_goes_on(open_plan, trt, call, words):
    engine = open_plan()
    cache = engine.allocate(1)
    trt.refuse.add(call)
    with pytest.raises(EngineError, match=words):
        decode(engine, cache, [1], 0)
    trt.refuse.clear()
    if call == "execute_async_v3":
        decode(engine, cache, [1], 0)


def test_a_fault_of_the_gpu_is_an_engine_error_and_close_still_works(open_plan, cuda):
    engine = open_plan()
    cache = engine.allocate(1)
    cuda.fail["cuStreamSynchronize"] = Result.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(EngineError, match="cuStreamSynchronize failed: CUDA_ERROR_ILLEGAL_ADDRESS"):
        decode(engine, cache, [1], 0)
    engine.close()
    assert cuda.live() == 0


def test_a_closed_engine_and_its_caches_refuse(open_plan):
    engine = open_plan()
    cache = engine.allocate(1)
    engine.close()
    engine.close()
    for use in (lambda: decode(engine, cache, [1], 0), lambda: engine.allocate(1), lambda: cache.read(0, 1)):
        with pytest.raises(EngineError, match="the engine is closed"):
            use()


def test_a_cache_of_another_engine_is_refused(open_plan, reference):
    engine = open_plan()
    with pytest.raises(EngineError, match="belongs to another engine"):
        decode(engine, reference.allocate(1), [1], 0)


def test_the_contract_is_checked_before_anything_is_touched(open_plan, cuda):
    engine = open_plan()
    cache = engine.allocate(1)
    before = len(cuda.calls)
    with pytest.raises(CapacityError, match="the capacity is 128"):
        decode(engine, cache, [1], 128)
    with pytest.raises(CapacityError, match="17 new tokens"):
        prefill(engine, cache, [1] * 17)
    assert len(cuda.calls) == before


def test_a_plan_of_another_contract_is_refused(open_plan, bundle, cuda, trt, tmp_path):
    spec = bundle.manifest.contract
    fewer = msgspec.structs.replace(spec, states=spec.states[:-1])
    path = write_plan(tmp_path / "p.plan", fewer, bundle.manifest.limits)
    with pytest.raises(EngineError, match=r"missing \['past_key_values.1.value', 'present.1.value'\]"):
        TensorRtEngine(trt, path, spec, bundle.manifest.limits, cuda=cuda)
    path = write_plan(tmp_path / "p.plan", spec, bundle.manifest.limits)
    with pytest.raises(EngineError, match=r"unknown \['past_key_values.1.value', 'present.1.value'\]"):
        TensorRtEngine(trt, path, fewer, bundle.manifest.limits, cuda=cuda)
    path.write_text(path.read_text().replace('"logits": ["OUTPUT", "FLOAT"', '"logits": ["OUTPUT", "HALF"'))
    with pytest.raises(EngineError, match="logits is float16"):
        TensorRtEngine(trt, path, spec, bundle.manifest.limits, cuda=cuda)
    assert cuda.live() == 0


def test_a_plan_with_too_small_a_cache_is_refused(open_plan, bundle):
    wider = msgspec.structs.replace(bundle.manifest.limits, capacity=140)
    with pytest.raises(BundleError, match="has 144 positions, 140 tokens and a chunk of 16 need 156"):
        open_plan(limits=wider)


def test_rows_that_tensorrt_cannot_address_are_refused(bundle, cuda, trt, tmp_path):
    odd = msgspec.structs.replace(bundle.manifest.limits, capacity=127)
    path = write_plan(tmp_path / "p.plan", bundle.manifest.contract, odd, dtype="HALF")
    text = path.read_text().replace("143, 16]", "143, 1]")
    path.write_text(text)
    with pytest.raises(EngineError, match="is no multiple of 256"):
        TensorRtEngine(trt, path, bundle.manifest.contract, odd, cuda=cuda)
    assert cuda.live() == 0


def test_an_input_that_tensorrt_dropped_is_not_bound(open_plan, reference, trt):
    engine = open_plan(unused=["input_lens"], unused_value=3)
    found = prefill(engine, engine.allocate(1), [1, 2, 3])
    wanted = prefill(reference, reference.allocate(1), [1, 2, 3])
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    assert "input_lens" not in trt.contexts[0].addresses


def test_a_host_without_a_gpu(bundle, trt, cuda, tmp_path):
    cuda.fail["cuInit"] = Result.CUDA_ERROR_NO_DEVICE
    path = write_plan(tmp_path / "p.plan", bundle.manifest.contract, bundle.manifest.limits)
    with pytest.raises(EngineError, match="cuInit failed: CUDA_ERROR_NO_DEVICE"):
        TensorRtEngine(trt, path, bundle.manifest.contract, bundle.manifest.limits, cuda=cuda)
