"""The step path on the CPU: what is bound, and that short and long steps write the same inputs."""

import numpy as np
import pytest
from support import SCENARIOS, Lowered, run_scenario

from zonda.runtime.bundle import open_bundle
from zonda.runtime.engines import onnxruntime as room
from zonda.runtime.engines.onnxruntime import OnnxRuntimeEngine


@pytest.fixture
def engine(tiny_bundle):
    manifest = open_bundle(tiny_bundle).manifest
    model = tiny_bundle / "onnx/onnxruntime.onnx"
    engine = OnnxRuntimeEngine(model, manifest.contract, manifest.limits, threads=1)
    yield engine
    engine.close()


def decode(engine, cache, token, offset, length=1, rows=1):
    ids = np.full((rows, length), token)
    return engine.step(
        cache,
        0,
        ids,
        np.full(rows, offset, np.int32),
        np.full(rows, length, np.int32),
        np.arange(length)[None].repeat(rows, 0),
    )


def test_steps_that_take_turns_in_length_are_bound_once(engine, monkeypatch):
    cache = engine.allocate(2)

    def a_round():
        for length in (1, 8, 2, 4, 1, 8):
            decode(engine, cache, 5, 0, length)
            decode(engine, cache, 5, 0, length, rows=2)

    a_round()  # binds, and lets the buffer of logits grow
    a_round()
    monkeypatch.setattr(OnnxRuntimeEngine, "_bind_buffers", None)
    monkeypatch.setattr(OnnxRuntimeEngine, "_bind_states", None)
    a_round()


def test_logits_are_a_view_of_the_same_buffer_step_after_step(engine):
    cache = engine.allocate(1)
    assert decode(engine, cache, 5, 0) is decode(engine, cache, 6, 1)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_inputs_written_number_by_number_are_those_that_numpy_writes(engine, monkeypatch, scenario):
    steps = SCENARIOS[scenario]
    tokens = np.random.default_rng(1).integers(0, 250, (len(steps[0]), int(np.array(steps).sum(0).max())))
    steps = [[min(new, 16) for new in step] for step in steps]
    found = {}
    for short in (8, 0, 64):
        monkeypatch.setattr(room, "_SHORT", short)
        found[short] = run_scenario(Lowered(engine, len(tokens)), tokens, steps)
    for wanted, *others in zip(*found.values(), strict=True):
        for got in others:
            np.testing.assert_array_equal(got, wanted)
