"""Pipeline on a real engine: a tiny random Llama against transformers, batches against single runs."""

import json
import subprocess
import sys

import pytest
import torch

from zonda import RequestError, TargetUnavailableError
from zonda.runtime import Pipeline, SamplingParams
from zonda.runtime.bundle import open_bundle
from zonda.runtime.loader import choose_target

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = ["the wind", "hot and dry wind comes down from the mountains", "def f(x):", "¿qué día?"]


@pytest.fixture(scope="module")
def pipeline(tiny_bundle):
    with Pipeline.load(tiny_bundle, threads=1) as loaded:
        yield loaded


def test_greedy_equals_transformers(pipeline, tiny_reference):
    _, greedy = tiny_reference
    for prompt in PROMPTS:
        ids = pipeline.encode(prompt)
        assert list(pipeline.generate(prompt, GREEDY).token_ids) == greedy(ids, 12)


def test_a_batch_of_different_lengths_equals_the_single_runs(pipeline):
    batch = pipeline.generate(PROMPTS, GREEDY)
    assert [r.token_ids for r in batch] == [pipeline.generate(p, GREEDY).token_ids for p in PROMPTS]


def test_streamed_text_is_the_text(pipeline):
    for prompt in PROMPTS:
        assert "".join(c.text for c in pipeline.stream(prompt, GREEDY)) == pipeline.generate(prompt, GREEDY).text


def test_same_seed_same_text(pipeline):
    params = SamplingParams(seed=11, max_tokens=12, ignore_eos=True)
    assert pipeline.generate("the wind", params).token_ids == pipeline.generate("the wind", params).token_ids
    assert (
        pipeline.generate("the wind", params.replace(seed=12)).token_ids
        != pipeline.generate("the wind", params).token_ids
    )


def test_prompt_logprobs_equal_transformers(pipeline, tiny_reference):
    model, _ = tiny_reference
    ids = pipeline.encode(PROMPTS[1])
    result = pipeline.generate(ids, GREEDY.replace(prompt_logprobs=0, max_tokens=1))
    with torch.no_grad():
        exact = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    for position in range(1, len(ids)):
        assert result.prompt_logprobs[position].logprob == pytest.approx(
            float(exact[position - 1, ids[position]]), abs=1e-3
        )


def test_session_equals_a_fresh_prefill(pipeline):
    session = pipeline.session()
    first = session.chat("the wind", GREEDY)
    second = session.chat("hot", GREEDY)
    assert second.timings.cached_tokens == first.timings.prompt_tokens + 11
    fresh = pipeline.generate(session._spoken[:-12], GREEDY)
    assert fresh.token_ids == second.token_ids


def test_smaller_limits_can_be_asked_for_but_not_larger(tiny_bundle):
    with Pipeline.load(tiny_bundle, capacity=20, max_batch=1) as small:
        result = small.generate("the wind", SamplingParams(temperature=0, ignore_eos=True))
        assert result.finish_reason == "capacity"
    for options in ({"capacity": 129}, {"max_batch": 5}, {"threads": 0}, {"verify": "some"}):
        with pytest.raises(RequestError):
            Pipeline.load(tiny_bundle, **options)


def test_an_unbuilt_target_is_refused_in_words(tiny_bundle):
    with pytest.raises(TargetUnavailableError, match="tensorrt: the bundle was not built for it"):
        Pipeline.load(tiny_bundle, target="tensorrt")


def test_an_unproven_target_is_passed_over_unless_forced(tiny_bundle):
    import dataclasses

    import msgspec

    bundle = open_bundle(tiny_bundle)
    pending = msgspec.structs.replace(bundle.manifest.targets[0].parity, status="pending", reason="no memory")
    target = msgspec.structs.replace(bundle.manifest.targets[0], parity=pending)
    unproven = dataclasses.replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, targets=(target,)))
    with pytest.raises(TargetUnavailableError, match="has not been proven"):
        choose_target(unproven, None)
    assert choose_target(unproven, "onnxruntime")[0] is target


RUNTIME_IMPORTS = """
import json, sys, time
started = time.perf_counter()
import zonda.runtime
elapsed = time.perf_counter() - started
heavy = ('torch', 'onnx', 'transformers', 'triton')
at_import = [m for m in heavy if m in sys.modules]
from zonda.runtime import Pipeline, SamplingParams
Pipeline.load(sys.argv[1]).generate('the wind', SamplingParams(temperature=0, max_tokens=2))
print(json.dumps([elapsed, at_import, [m for m in heavy if m in sys.modules]]))
"""


def test_the_runtime_imports_nothing_heavy(tiny_bundle):
    run = subprocess.run([sys.executable, "-c", RUNTIME_IMPORTS, tiny_bundle], capture_output=True, check=True)
    elapsed, at_import, after_use = json.loads(run.stdout)
    assert at_import == []
    assert after_use == []
    assert elapsed < 2  # about 0.2 s; a generous bound, because this is no benchmark


def test_onnxruntime_is_imported_without_its_telemetry(tiny_bundle, tmp_path):
    """Its official builds write a device id into the home directory and report from the import on, unless told not to."""
    script = "import sys; from zonda.runtime import Pipeline; Pipeline.load(sys.argv[1]).generate('hi')"
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin"}
    subprocess.run([sys.executable, "-c", script, tiny_bundle], check=True, env=environment)
    assert list(tmp_path.rglob("*")) == []
