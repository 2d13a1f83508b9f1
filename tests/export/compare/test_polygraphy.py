"""Zonda's runners in a Polygraphy script of a user."""

import numpy as np
import pytest
from polygraphy.comparator import Comparator, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from zonda import BundleError
from zonda.export.compare.polygraphy_runners import CompareSteps, EagerRunner, EngineRunner, OnnxRunner, feeds
from zonda.runtime.bundle import open_bundle

PROMPTS = [[5, 17, 3, 88, 120, 4, 9, 31], [7, 7, 250, 1], [40, 41]]


@pytest.fixture(autouse=True)
def quiet():
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        yield


@pytest.fixture
def steps(tiny_bundle):
    return feeds(PROMPTS, open_bundle(tiny_bundle).manifest.limits)


def test_every_runner_agrees_with_eager_torch(tiny_folder, tiny_bundle, steps):
    runners = [
        EagerRunner(tiny_folder),
        OnnxRunner(tiny_bundle),
        OnnxRunner(tiny_bundle, "lowered"),
        EngineRunner(tiny_bundle),
        EngineRunner(tiny_bundle, "onnxruntime"),
    ]
    results = Comparator.run(runners, data_loader=steps)
    for other in range(1, len(runners)):
        judge = CompareSteps("float32")
        assert Comparator.compare_accuracy(results, comparisons=[(0, other)], compare_func=judge)
        assert len(judge.reports) == len(steps)


def test_polygraphys_own_comparison_works_too(tiny_bundle, steps):
    results = Comparator.run([OnnxRunner(tiny_bundle, "lowered"), EngineRunner(tiny_bundle)], data_loader=steps)
    assert Comparator.compare_accuracy(results, compare_func=SimpleCompareFunc(atol=1e-3, rtol=1e-3))


def test_activating_again_begins_with_an_empty_cache(tiny_bundle, steps):
    runner = EngineRunner(tiny_bundle)
    logits = []
    for _ in range(2):
        with runner:
            logits.append([runner.infer(feed)["logits"] for feed in steps])
    for first, second in zip(*logits, strict=True):
        np.testing.assert_array_equal(first, second)


def test_keys_and_values_are_outputs_on_request(tiny_bundle, steps):
    with EngineRunner(tiny_bundle, states=True, capacity=64) as runner:
        outputs = runner.infer(steps[0])
    assert outputs["present.1.value"].shape == (3, 2, 64, 16)


def test_a_difference_fails(tiny_bundle, steps):
    with EngineRunner(tiny_bundle, states=True) as runner:
        want = [runner.infer(feed) for feed in steps]
    judge = CompareSteps("float32")
    assert all(judge(one, dict(one))["step"] for one in want)
    assert not judge(want[0], want[0] | {"logits": want[0]["logits"] * 1.001})["step"]
    assert not judge(want[0], want[0] | {"present.0.key": want[0]["present.0.key"] * 1.001})["step"]


def test_a_broken_bundle_is_a_typed_error(tmp_path):
    with pytest.raises(BundleError, match="not an engine bundle"), EngineRunner(tmp_path):
        pass
