"""The TensorRT engine against doubles of TensorRT and CUDA that execute the graph by ONNX Runtime."""

import gc
import threading

import msgspec
import numpy as np
import pytest
from gpu_doubles import PROFILES, FakeCuda, Result, array_at, fake_tensorrt, write_plan
from support import SCENARIOS, Lowered, run_scenario

from zonda import BundleError, CapacityError, DeviceMemoryError, EngineError
from zonda.plugins_trt.cubins import Cubin, CubinLibrary, Usage, Variant
from zonda.runtime.bundle import open_bundle
from zonda.runtime.engines.onnxruntime import OnnxRuntimeEngine
from zonda.runtime.engines.tensorrt import TensorRtEngine
from zonda.runtime.golden import GOLDEN, Golden
from zonda.runtime.metrics import THRESHOLDS
from zonda.runtime.parity import prove


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


def decode(engine, cache, tokens, offset, first_row=0):
    """One token a row."""
    batch = len(tokens)
    ids, offsets = np.array(tokens, np.int64)[:, None], np.full(batch, offset, np.int32)
    ones, zeros = np.ones(batch, np.int32), np.zeros((batch, 1), np.int64)
    return engine.step(cache, first_row, ids, offsets, ones, zeros).copy()


def prefill(engine, cache, tokens, row=0, offset=0):
    ids, length = np.array([tokens], np.int64), len(tokens)
    last = np.array([[length - 1]])
    return engine.step(cache, row, ids, np.array([offset], np.int32), np.array([length], np.int32), last).copy()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_scenario_equals_onnx_runtime(open_plan, reference, scenario):
    steps = [[min(new, 16) for new in step] for step in SCENARIOS[scenario]]
    total = np.array(steps).sum(0).max()
    tokens = np.random.default_rng(1).integers(0, 250, (len(steps[0]), int(total)))
    found = run_scenario(Lowered(open_plan(), len(tokens)), tokens, steps)
    wanted = run_scenario(Lowered(reference, len(tokens)), tokens, steps)
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_the_golden_data_of_a_bundle_prove_it_keys_and_values_included(open_plan, bundle):
    parity = prove(open_plan(), Golden.read(bundle.file(GOLDEN)), THRESHOLDS["float32"])
    assert {"prefill", "chunked prefill", "decode", "ragged batch"} <= {report.name for report in parity.schedules}


def test_past_and_present_of_a_row_are_one_address(open_plan, trt, bundle):
    engine = open_plan()
    cache = engine.allocate(3)
    prefill(engine, cache, [5, 6, 7], row=2)
    _, addresses = trt.contexts[0].executed[0]
    for state, address in zip(bundle.manifest.contract.states, cache.addresses(2), strict=True):
        assert addresses[state.input] == addresses[state.output] == address
    rows = [cache.addresses(row)[0] for row in range(3)]
    assert rows[1] - rows[0] == rows[2] - rows[1] == 2 * (128 + 16) * 16 * 4  # Hkv · C · D · float32


def test_offsets_and_positions_are_of_each_row(open_plan, trt, cuda):
    engine = open_plan()
    cache = engine.allocate(2)
    seen = {}

    def look(context):
        for name in ("seqlen_offsets", "start_offsets_kernel", "input_lens"):
            dtype = np.int64 if name == "start_offsets_kernel" else np.int32
            seen[name] = array_at(context.addresses[name], context.shapes[name], dtype).tolist()

    trt.during_execution.append(look)
    ids, positions = np.ones((2, 3), np.int64), np.zeros((2, 1), np.int64)
    engine.step(cache, 0, ids, np.array([4, 9], np.int32), np.array([3, 0], np.int32), positions)
    assert seen == {
        "seqlen_offsets": [4, 9],
        "start_offsets_kernel": [[4, 5, 6], [9, 10, 11]],
        "input_lens": [3, 0],
    }


def test_a_step_is_one_copy_up_one_execution_and_the_logits_down(open_plan, cuda, bundle):
    engine = open_plan()
    cache = engine.allocate(1)
    before = len(cuda.calls)
    prefill(engine, cache, [1, 2, 3])
    calls = [call for call in cuda.calls[before:] if call[0].startswith("cuMemcpy")]
    assert [call[0] for call in calls] == ["cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync"]
    assert calls[1][3] == bundle.manifest.limits.vocab_size * 4


def test_prefill_and_decode_have_a_context_of_their_profile(open_plan, trt):
    engine = open_plan()
    cache = engine.allocate(2)
    prefill(engine, cache, [1, 2, 3])
    decode(engine, cache, [4], 3)
    prefill(engine, cache, [5, 6], offset=4)
    decode(engine, cache, [7, 8], 6)
    decode(engine, cache, [7], 6)
    assert [(c.profile, len(c.executed)) for c in trt.contexts] == [(1, 2), (0, 2), (0, 1)]
    assert len({c.memory for c in trt.contexts}) == 1
    assert trt.log.count("create_runtime_cache") == 1


def test_full_tensorrt_needs_no_run_time_configuration(open_plan, cuda, bundle, tmp_path, reference):
    module = fake_tensorrt(cuda, rtx=False)
    path = write_plan(
        tmp_path / "full.plan",
        bundle.manifest.contract,
        bundle.manifest.limits,
        onnx=bundle.path / "onnx/onnxruntime.onnx",
    )
    engine = TensorRtEngine(module, path, bundle.manifest.contract, bundle.manifest.limits, cuda=cuda)
    found = prefill(engine, engine.allocate(1), [9, 8, 7])
    wanted = prefill(reference, reference.allocate(1), [9, 8, 7])
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    engine.close()
    assert cuda.live() == 0


def test_a_batch_that_no_profile_takes_is_computed_in_groups_of_rows(open_plan, trt, reference):
    profiles = [PROFILES[0], PROFILES[1] | {"batch": [1, 2]}]
    steps = [[9, 2, 13], [1, 1, 1], [3, 0, 2]]
    tokens = np.random.default_rng(2).integers(0, 250, (3, 16))
    found = run_scenario(Lowered(open_plan(profiles=profiles), 3), tokens, steps)
    wanted = run_scenario(Lowered(reference, 3), tokens, steps)
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert [shapes["input_ids"] for shapes, _ in trt.contexts[0].executed[:2]] == [(2, 13), (1, 13)]


def test_limits_are_what_the_profiles_take(open_plan):
    profiles = [{"batch": [1, 2], "sequence": [1, 8], "num_logits": [1, 2]}]
    engine = open_plan(profiles=profiles)
    assert (engine.limits.max_batch, engine.limits.max_chunk) == (2, 8)
    ids, positions = np.ones((1, 5), np.int64), np.arange(3)[None]
    with pytest.raises(EngineError, match="no profile of the plan takes 5 tokens with 3 logits a row"):
        engine.step(engine.allocate(1), 0, ids, np.zeros(1, np.int32), np.full(1, 5, np.int32), positions)


class TestGraphs:
    def test_a_repeated_decode_step_is_captured_and_then_replayed(self, open_plan, reference, cuda, trt):
        engine = open_plan()
        caches = engine.allocate(1), reference.allocate(1)
        for offset, token in enumerate((3, 1, 4, 1, 5)):
            found = decode(engine, caches[0], [token], offset)
            wanted = decode(reference, caches[1], [token], offset)
            np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
        assert cuda.count("cuStreamBeginCapture") == 1
        assert cuda.count("cuGraphLaunch") == 4
        assert len(trt.contexts[0].executed) == 2  # once for real, once while capturing
        assert engine.no_graphs is None

    def test_a_replay_asks_nothing_of_tensorrt(self, open_plan, cuda):
        engine = open_plan()
        cache = engine.allocate(1)
        for offset in range(2):
            decode(engine, cache, [1], offset)
        before = len(cuda.calls)
        decode(engine, cache, [1], 2)
        assert [call[0] for call in cuda.calls[before:]] == ["cuCtxSetCurrent", "cuGraphLaunch", "cuStreamSynchronize"]

    def test_each_batch_size_has_its_own_graph_and_keeps_it(self, open_plan, cuda):
        engine = open_plan()
        cache = engine.allocate(3)
        for offset in range(6):
            decode(engine, cache, [1] * (offset % 3 + 1), offset)
        for offset in range(6, 9):
            decode(engine, cache, [1] * (offset % 3 + 1), offset)
        assert cuda.count("cuStreamBeginCapture") == len(cuda.executables) == 3

    def test_another_cache_or_row_is_captured_again(self, open_plan, cuda, reference):
        engine = open_plan()
        first, second = engine.allocate(1), engine.allocate(2)
        wanted = decode(reference, reference.allocate(1), [7], 0)
        for cache, row in ((first, 0), (second, 0), (second, 1)):
            for _ in range(3):
                found = decode(engine, cache, [7], 0, row)
                np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
        assert cuda.count("cuStreamBeginCapture") == 3
        assert len(cuda.executables) == 1

    def test_larger_logits_move_and_are_captured_again(self, open_plan, cuda):
        engine = open_plan()
        cache = engine.allocate(1)
        for offset in range(3):
            decode(engine, cache, [7], offset)
        engine.step(
            cache,
            0,
            np.ones((1, 16), np.int64),
            np.array([3], np.int32),
            np.array([16], np.int32),
            np.arange(16)[None],
        )
        for offset in range(19, 22):
            decode(engine, cache, [7], offset)
        assert cuda.count("cuStreamBeginCapture") == 2

    def test_callers_that_take_turns_run_without_a_graph_and_do_not_thrash(self, open_plan, cuda):
        engine = open_plan()
        caches = engine.allocate(1), engine.allocate(1)
        for offset in range(8):
            decode(engine, caches[offset % 2], [7], offset)
        assert cuda.count("cuStreamBeginCapture") == 0

    @pytest.mark.parametrize(
        ("call", "result"),
        [
            ("cuStreamBeginCapture", Result.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED),
            ("cuStreamEndCapture", Result.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED),
            ("cuGraphInstantiate", Result.CUDA_ERROR_OUT_OF_MEMORY),
        ],
    )
    def test_a_failed_capture_falls_back_with_its_reason(self, open_plan, cuda, reference, caplog, call, result):
        engine = open_plan()
        cache, other = engine.allocate(1), reference.allocate(1)
        cuda.fail[call] = result
        for offset in range(3):
            found, wanted = decode(engine, cache, [7], offset), decode(reference, other, [7], offset)
            np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
        assert f"{call} failed: {result.name}" in engine.no_graphs
        assert "decode steps run without a CUDA graph" in caplog.text
        assert cuda.count(call) == 1

    def test_a_step_that_tensorrt_refuses_while_capturing_falls_back(self, open_plan, cuda, trt):
        engine = open_plan()
        cache = engine.allocate(1)
        trt.during_execution.append(lambda _: cuda.capturing is None)
        for offset in range(3):
            decode(engine, cache, [7], offset)
        assert "TensorRT refused a step" in engine.no_graphs
        assert (len(cuda.graphs), len(cuda.executables), cuda.capturing) == (0, 0, None)

    def test_a_plan_that_cannot_be_captured_is_not(self, open_plan, cuda, trt):
        engine = open_plan()
        trt.refuse.add("is_stream_capturable")
        cache = engine.allocate(1)
        for offset in range(3):
            decode(engine, cache, [7], offset)
        assert engine.no_graphs == "TensorRT says that this plan cannot be captured"
        assert cuda.count("cuStreamBeginCapture") == 0

    def test_graphs_can_be_switched_off(self, open_plan, cuda):
        engine = open_plan(engine_options={"cuda_graphs": False})
        cache = engine.allocate(1)
        for offset in range(3):
            decode(engine, cache, [7], offset)
        assert cuda.count("cuStreamBeginCapture") == 0


class TestCache:
    def test_it_is_zeroed(self, open_plan):
        engine = open_plan()
        assert not any(state.any() for state in engine.allocate(2).read(1, 128))

    def test_rows_are_copied_on_the_device(self, open_plan, cuda):
        engine = open_plan()
        cache = engine.allocate(3)
        prefill(engine, cache, [1, 2, 3, 4], row=2)
        before = len(cuda.calls)
        cache.copy_row(2, 0, 3)
        assert {call[0] for call in cuda.calls[before:]} == {"cuCtxSetCurrent", "cuMemcpy2DAsync"}
        for copied, original in zip(cache.read(0, 4), cache.read(2, 4), strict=True):
            assert copied.shape == (2, 4, 16)
            np.testing.assert_array_equal(copied[:, :3], original[:, :3])
            assert original.any()
            assert not copied[:, 3].any()
        assert not any(state.any() for state in cache.read(1, 4))

    def test_a_copied_prefix_continues_as_the_original(self, open_plan):
        engine = open_plan()
        cache = engine.allocate(2)
        prefill(engine, cache, [1, 2, 3, 4], row=1)
        cache.copy_row(1, 0, 4)
        np.testing.assert_allclose(decode(engine, cache, [5], 4, 0), decode(engine, cache, [5], 4, 1), atol=1e-6)

    def test_rows_and_lengths_outside_are_refused(self, open_plan):
        cache = open_plan().allocate(2)
        with pytest.raises(CapacityError, match="row 2 of a cache of 2"):
            cache.copy_row(0, 2, 1)
        with pytest.raises(EngineError, match="145 tokens"):
            cache.read(0, 145)

    @pytest.mark.parametrize(("dtype", "found"), [("HALF", np.float16), ("BF16", np.float32)])
    def test_sixteen_bit_states_are_read_as_numbers(self, open_plan, cuda, dtype, found):
        engine = open_plan(onnx=None, dtype=dtype)
        cache = engine.allocate(1)
        value = np.float16(1.5).view(np.uint16) if dtype == "HALF" else np.uint16(0x3FC0)
        for address in cache.addresses(0):
            array_at(address, (2 * 144 * 16,), np.uint16)[:] = value
        for state in cache.read(0, 5):
            assert (state.dtype, state.shape) == (found, (2, 5, 16))
            assert (state == 1.5).all()

    def test_memory_goes_back_when_the_cache_is_forgotten(self, open_plan, cuda):
        engine = open_plan()
        held = len(cuda.device_memory)
        cache = engine.allocate(2)
        del cache
        gc.collect()
        engine.allocate(1)
        gc.collect()
        with engine._device.entered():
            pass
        assert len(cuda.device_memory) == held

    def test_threads_may_copy_while_another_steps(self, open_plan):
        engine = open_plan()
        cache, other = engine.allocate(2), engine.allocate(2)
        prefill(engine, other, [1, 2, 3], row=0)
        wanted = other.read(0, 3)
        worker = threading.Thread(target=lambda: [other.copy_row(0, 1, 3) for _ in range(50)])
        worker.start()
        for offset in range(20):
            decode(engine, cache, [7, 7], offset)
        worker.join()
        for copied, original in zip(other.read(1, 3), wanted, strict=True):
            np.testing.assert_array_equal(copied, original)


class TestErrors:
    def test_a_plan_that_is_none_is_refused_with_tensorrts_words(self, bundle, cuda, trt, tmp_path):
        (tmp_path / "x.plan").write_bytes(b"not a plan")
        with pytest.raises(EngineError, match=r"x\.plan: TensorRT cannot read the plan on this host: Serialization"):
            TensorRtEngine(trt, tmp_path / "x.plan", bundle.manifest.contract, bundle.manifest.limits, cuda=cuda)
        assert cuda.live() == 0

    def test_activations_that_do_not_fit_are_told_in_numbers(self, open_plan, cuda):
        with pytest.raises(
            DeviceMemoryError, match=r"activations of one step needs 4,000.0 MB of GPU memory"
        ) as caught:
            open_plan(activations=2_000_000_000)
        assert (caught.value.needed, caught.value.total) == (4_000_000_000, 1 << 30)
        assert cuda.live() == 0

    def test_a_cache_that_does_not_fit_is_told_in_numbers(self, open_plan, cuda):
        engine = open_plan()
        cuda.total = cuda.total - cuda.cuMemGetInfo()[1] + 100_000
        with pytest.raises(
            DeviceMemoryError, match=r"a KV cache of 4 rows needs 0.3 MB .* 0.1 of .* smaller max_batch"
        ):
            engine.allocate(4)
        engine.allocate(1)

    def test_weights_that_do_not_fit(self, open_plan, trt, cuda):
        trt.refuse.add("deserialize_cuda_engine")
        with pytest.raises(DeviceMemoryError, match=r"tiny.plan needs .* GPU memory"):
            open_plan()
        assert cuda.live() == 0

    def test_a_context_that_does_not_fit(self, open_plan, trt):
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
    def test_what_tensorrt_refuses_is_named_and_the_engine_goes_on(self, open_plan, trt, call, words):
        engine = open_plan()
        cache = engine.allocate(1)
        trt.refuse.add(call)
        with pytest.raises(EngineError, match=words):
            decode(engine, cache, [1], 0)
        trt.refuse.clear()
        if call == "execute_async_v3":
            decode(engine, cache, [1], 0)

    def test_a_fault_of_the_gpu_is_an_engine_error_and_close_still_works(self, open_plan, cuda):
        engine = open_plan()
        cache = engine.allocate(1)
        cuda.fail["cuStreamSynchronize"] = Result.CUDA_ERROR_ILLEGAL_ADDRESS
        with pytest.raises(EngineError, match="cuStreamSynchronize failed: CUDA_ERROR_ILLEGAL_ADDRESS"):
            decode(engine, cache, [1], 0)
        engine.close()
        assert cuda.live() == 0

    def test_a_closed_engine_and_its_caches_refuse(self, open_plan):
        engine = open_plan()
        cache = engine.allocate(1)
        engine.close()
        engine.close()
        for use in (lambda: decode(engine, cache, [1], 0), lambda: engine.allocate(1), lambda: cache.read(0, 1)):
            with pytest.raises(EngineError, match="the engine is closed"):
                use()

    def test_a_cache_of_another_engine_is_refused(self, open_plan, reference):
        engine = open_plan()
        with pytest.raises(EngineError, match="belongs to another engine"):
            decode(engine, reference.allocate(1), [1], 0)

    def test_the_contract_is_checked_before_anything_is_touched(self, open_plan, cuda):
        engine = open_plan()
        cache = engine.allocate(1)
        before = len(cuda.calls)
        with pytest.raises(CapacityError, match="the capacity is 128"):
            decode(engine, cache, [1], 128)
        with pytest.raises(CapacityError, match="17 new tokens"):
            prefill(engine, cache, [1] * 17)
        assert len(cuda.calls) == before

    def test_a_plan_of_another_contract_is_refused(self, open_plan, bundle, cuda, trt, tmp_path):
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

    def test_a_plan_with_too_small_a_cache_is_refused(self, open_plan, bundle):
        wider = msgspec.structs.replace(bundle.manifest.limits, capacity=140)
        with pytest.raises(BundleError, match="has 144 positions, 140 tokens and a chunk of 16 need 156"):
            open_plan(limits=wider)

    def test_rows_that_tensorrt_cannot_address_are_refused(self, bundle, cuda, trt, tmp_path):
        odd = msgspec.structs.replace(bundle.manifest.limits, capacity=127)
        path = write_plan(tmp_path / "p.plan", bundle.manifest.contract, odd, dtype="HALF")
        text = path.read_text().replace("143, 16]", "143, 1]")
        path.write_text(text)
        with pytest.raises(EngineError, match="is no multiple of 256"):
            TensorRtEngine(trt, path, bundle.manifest.contract, odd, cuda=cuda)
        assert cuda.live() == 0

    def test_an_input_that_tensorrt_dropped_is_not_bound(self, open_plan, reference, trt):
        engine = open_plan(unused=["input_lens"], unused_value=3)
        found = prefill(engine, engine.allocate(1), [1, 2, 3])
        wanted = prefill(reference, reference.allocate(1), [1, 2, 3])
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
        assert "input_lens" not in trt.contexts[0].addresses

    def test_a_host_without_a_gpu(self, bundle, trt, cuda, tmp_path):
        cuda.fail["cuInit"] = Result.CUDA_ERROR_NO_DEVICE
        path = write_plan(tmp_path / "p.plan", bundle.manifest.contract, bundle.manifest.limits)
        with pytest.raises(EngineError, match="cuInit failed: CUDA_ERROR_NO_DEVICE"):
            TensorRtEngine(trt, path, bundle.manifest.contract, bundle.manifest.limits, cuda=cuda)


def test_a_closed_engine_holds_nothing(open_plan, cuda):
    engine = open_plan()
    cache = engine.allocate(2)
    for offset in range(3):
        decode(engine, cache, [1, 2], offset)
    assert cuda.live() > 5
    engine.close()
    assert cuda.live() == 0


class TestPlugins:
    NODES = (("RmsNorm", {"eps": 1e-5}),)

    @pytest.fixture
    def kernels(self):
        variant = Variant("rms_norm", ("fp32",) * 3, (("hidden", 64),))
        parameters = (("x", "*fp32"), ("weight", "*fp32"), ("y", "*fp32"), ("eps", "fp32"), ("rows", "i32"))
        cubin = Cubin(variant, 89, "kernel", b"image", parameters, (("ROWS", 4),), 8, 4096, Usage(30, 0, 0))
        return CubinLibrary((89,), (cubin,)).to_bytes()

    def test_they_are_registered_before_the_plan_is_read_and_gone_afterwards(self, open_plan, trt, kernels):
        engine = open_plan(plugins=self.NODES, engine_options={"cubins": kernels, "plugins": ("RmsNorm",)})
        decode(engine, engine.allocate(1), [1], 0)
        creators = trt.get_plugin_registry().creators
        assert [name for name, _, _ in creators] == ["RmsNorm"]
        engine.close()
        assert not creators

    def test_a_plan_without_its_kernels_is_refused_with_the_plugins_name(self, open_plan):
        with pytest.raises(EngineError, match="Cannot find plugin: RmsNorm"):
            open_plan(plugins=self.NODES)

    def test_kernels_are_unloaded_with_the_engine(self, open_plan, trt, cuda, kernels):
        engine = open_plan(plugins=self.NODES, engine_options={"cubins": kernels, "plugins": ("RmsNorm",)})
        creator = trt.get_plugin_registry().get_creator("RmsNorm", "1", "zonda")
        trt.during_execution.append(lambda _: creator.around.launcher().prepare("rms_norm"))
        decode(engine, engine.allocate(1), [1], 0)
        assert list(cuda.modules.values()) == [b"image"]
        engine.close()
        assert not cuda.modules

    def test_a_plugin_that_fails_in_a_step_is_an_error_with_its_node(self, open_plan, trt, kernels):
        engine = open_plan(plugins=self.NODES, engine_options={"cubins": kernels, "plugins": ("RmsNorm",)})
        failures = trt.get_plugin_registry().get_creator("RmsNorm", "1", "zonda").around.failures

        def fail(context):
            failures.entries.append(("layers_0_norm", "enqueue", EngineError("no kernel")))
            return False

        trt.during_execution.append(fail)
        with pytest.raises(EngineError, match="node layers_0_norm: no kernel"):
            decode(engine, engine.allocate(1), [1], 0)

    def test_attributes_of_another_build_are_an_error_with_the_node(self, open_plan, kernels):
        options = {"cubins": kernels, "plugins": ("RmsNorm",)}
        with pytest.raises(EngineError, match="node of RmsNorm: RmsNorm has no attribute 'epsilon'"):
            open_plan(plugins=[("RmsNorm", {"epsilon": 1e-5})], engine_options=options)

    def test_damaged_kernels_are_refused(self, open_plan, cuda):
        with pytest.raises(BundleError, match="kernel library is damaged"):
            open_plan(plugins=self.NODES, engine_options={"cubins": b"xx", "plugins": ("RmsNorm",)})
        assert cuda.live() == 0


def test_an_engine_may_be_closed_by_another_thread_than_the_one_that_opened_it(open_plan, cuda):
    engine = open_plan()
    decode(engine, engine.allocate(1), [1], 0)
    before = len(cuda.calls)
    closer = threading.Thread(target=engine.close)
    closer.start()
    closer.join()
    assert cuda.calls[before] == ("cuCtxSetCurrent", 0x77)
    assert cuda.live() == 0
