"""The TensorRT engine against doubles of TensorRT and CUDA that execute the graph by ONNX Runtime."""

import gc
import threading

import numpy as np
import pytest
from cuda_double import Result, array_at
from engine_steps import decode, prefill
from support import SCENARIOS, Lowered, run_scenario
from tensorrt_double import PROFILES, fake_tensorrt, write_plan

from zonda import CapacityError, EngineError
from zonda.runtime.engines.tensorrt import TensorRtEngine
from zonda.runtime.golden import GOLDEN, Golden
from zonda.runtime.metrics import THRESHOLDS
from zonda.runtime.parity import prove


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


def test_a_closed_engine_holds_nothing(open_plan, cuda):
    engine = open_plan()
    cache = engine.allocate(2)
    for offset in range(3):
        decode(engine, cache, [1, 2], offset)
    assert cuda.live() > 5
    engine.close()
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
