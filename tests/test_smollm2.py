"""SmolLM2-135M-Instruct from its GGUF: eager, universal and lowered against transformers on real tokens."""

from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
import transformers
from conftest import build_quietly
from support import SCENARIOS, Eager, Lowered, PlainOnnx, run_scenario
from tokenizers import Tokenizer

from zonda.models import registry
from zonda.models.checkpoints import open_checkpoint
from zonda.models.loading import load_weights
from zonda.runtime import Pipeline, SamplingParams, metrics
from zonda.runtime.bundle import open_bundle
from zonda.runtime.engines.onnxruntime import OnnxRuntimeEngine
from zonda.runtime.loader import open_engine
from zonda.runtime.manifest import Limits

pytestmark = pytest.mark.slow

TOLERANCE = 3e-4
"""float32 against float64 differs by 7.6e-5 at max |logit| 41 in transformers itself; four times that."""

TEXT = """In the lee of the Andes the zonda begins as a west wind from the ocean. It climbs the slopes, loses its water
as snow on the peaks, and falls on the other side dry, fast and hot: the air warms by about ten degrees for every
kilometre that it falls. On the 15th of July 2006 a thermometer rose from 3 to 27 degrees within an hour. People close
their shutters, horses grow nervous, and the dust finds every door. Then, at night, it stops as it came, and the cold
returns. Meteorologists call such winds foehn winds; the chinook of the Rocky Mountains is another. def warm(height_m):
    return 9.8 * height_m / 1000  # kelvin, the dry adiabatic lapse rate
Why does it matter? Because a wind that arrives suddenly is hard to forecast, fires spread with it, and aeroplanes must
cross the waves that stand above the ridge. A good forecast needs a model of the mountains as fine as the valleys are
narrow, and it needs it early enough. That is why the smallest fast computation can be worth more than a larger slow
one: the answer must come before the wind. The old people of the valley had a rule of their own, and it was not bad. If
the peaks are clear in the morning and a long white cloud lies on them like a cap, and if the dogs will not eat, then
bring in the washing. They were right about two times in three, which is better than the first weather models were."""
ROWS, CAPACITY = 640, 512


@pytest.fixture(scope="module")
def reference(smollm2_gguf):
    """(tokens (4, 310), logits of transformers (4, 310, V)): rows are the text begun at different places."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent,
        gguf_file=smollm2_gguf.name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    ).eval()
    tokenizer = Tokenizer.from_buffer(open_checkpoint(smollm2_gguf).files["tokenizer.json"])
    ids = tokenizer.encode(TEXT).ids
    assert len(ids) >= 320
    tokens = np.array([ids[start : start + 310] for start in (0, 3, 6, 9)])
    with torch.no_grad():
        logits = np.concatenate([model(torch.from_numpy(row[None])).logits.numpy() for row in tokens])
    return tokens, logits


@pytest.fixture(scope="module")
def executors(smollm2_gguf, smollm2_exact):
    checkpoint = open_checkpoint(smollm2_gguf)
    architecture = registry.of_config(checkpoint.config)
    eager = architecture.build(architecture.read_config(checkpoint.config), ROWS).eval()
    load_weights(eager, checkpoint)
    bundle = open_bundle(smollm2_exact)
    limits = Limits(capacity=CAPACITY, max_batch=4, max_chunk=ROWS - CAPACITY, vocab_size=49152)
    engine = OnnxRuntimeEngine(bundle.file("onnx/onnxruntime.onnx"), bundle.manifest.contract, limits)
    universal = bundle.file("onnx/universal.onnx")
    return {
        "eager": lambda rows: Eager(eager, rows, ROWS),
        "universal": lambda rows: PlainOnnx(universal, eager.kv_shapes, rows, ROWS),
        "lowered": lambda rows: Lowered(engine, rows),
    }


LONG = {
    "prefill": [[128]],
    "decode": [[100], *[[1]] * 12],
    "ragged batch of 4": [[90, 20, 65, 41], *[[1, 1, 1, 1]] * 4],
    "chunked prefill": [[96], [96], [96], [22]],
    "continuation after decode": [[60], [1], [1], [1], [70], [1], [1]],
    "batch with idle rows": [[40, 0, 30, 50], [1, 60, 0, 1], [0, 1, 1, 0], [30, 0, 1, 17], [1, 1, 1, 0]],
}


def test_the_scenarios_are_the_six():
    assert LONG.keys() == SCENARIOS.keys()
    assert sum(map(sum, LONG["chunked prefill"])) >= 300


@pytest.mark.parametrize("execution", ["eager", "universal", "lowered"])
@pytest.mark.parametrize("scenario", LONG, ids=str)
def test_scenario(reference, executors, execution, scenario):
    tokens, wanted = reference
    steps = LONG[scenario]
    found = run_scenario(executors[execution](len(steps[0])), tokens[: len(steps[0])], steps)
    for row, logits in enumerate(found):
        want = wanted[row, : len(logits)]
        np.testing.assert_allclose(logits, want, rtol=0, atol=TOLERANCE)
        np.testing.assert_array_equal(logits.argmax(-1), want.argmax(-1))


PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):\n    ",
    "In 1969, two astronauts walked on the moon, and the world watched them on television. What they brought back was",
]


def test_greedy_text_of_a_batch_equals_the_single_runs(smollm2_exact):
    """A difference is allowed only where the two best logits are closer than the measured float32 noise."""
    params = SamplingParams(temperature=0.0, max_tokens=40, logprobs=2)
    with Pipeline.load(smollm2_exact) as pipeline:
        batch = pipeline.generate(PROMPTS, params)
        singles = [pipeline.generate(prompt, params) for prompt in PROMPTS]
    assert batch[0].text.startswith(" Paris")
    for prompt, together, alone in zip(PROMPTS, batch, singles, strict=True):
        for step, (a, b) in enumerate(zip(together.token_ids, alone.token_ids, strict=False)):
            if a != b:
                first, second = alone.logprobs[step].top_logprobs
                gap = first.logprob - second.logprob
                print(f"near tie: {prompt!r}, step {step}: {gap:.2e}")
                assert gap < TOLERANCE
                break
        else:
            assert together.token_ids == alone.token_ids


def scored(bundle: Path, ids: list[int]) -> Iterator[np.ndarray]:
    """Logits after each token of each window of 512, which starts anew."""
    opened = open_bundle(bundle)
    limits = Limits(capacity=512, max_batch=1, max_chunk=512, vocab_size=49152)
    engine = OnnxRuntimeEngine(opened.file("onnx/onnxruntime.onnx"), opened.manifest.contract, limits)
    for start in range(0, len(ids), 512):
        window = np.array([ids[start : start + 512]])
        zero, length = np.zeros(1, np.int32), np.array([window.shape[1]], np.int32)
        yield engine.step(engine.allocate(1), 0, window, zero, length, np.arange(window.shape[1])[None])[0]


def test_balanced_costs_half_a_percent_of_perplexity_at_most(smollm2_exact, smollm2_bundle):
    """Against the dequantised model, on 16,384 tokens of Python's own manual."""
    assert open_bundle(smollm2_bundle).manifest.targets[0].quality == "balanced"
    tokenizer = Tokenizer.from_file(str(smollm2_exact / "tokenizer.json"))
    text = "\n".join(topic for _, topic in sorted(topics.items()))
    ids = tokenizer.encode(text[:120_000]).ids[: 32 * 512]
    assert len(ids) == 32 * 512
    parts = []
    for index, (want, got) in enumerate(zip(scored(smollm2_exact, ids), scored(smollm2_bundle, ids), strict=True)):
        following = np.array([*ids[index * 512 + 1 : index * 512 + 512], -1])
        parts += [
            metrics.deviations(want[part], got[part], following[part])
            for part in (slice(start, start + 64) for start in range(0, 512, 64))
        ]
    found = metrics.Deviations.join(parts)
    print(f"perplexity × {found.perplexity_ratio:.5f}, KL {found.kl.mean():.2e}, top-1 {found.agrees.mean():.4f}")
    assert found.perplexity_ratio < 1.005
    assert found.kl.mean() < 6e-3


def divergence(want: np.ndarray, got: np.ndarray) -> float:
    """Mean KL of logits (N, V), 64 at a time."""
    parts = [slice(start, start + 64) for start in range(0, len(want), 64)]
    unknown = np.full(len(want), -1)
    return float(metrics.Deviations.join([metrics.deviations(want[p], got[p], unknown[p]) for p in parts]).kl.mean())


def continued(bundle: Path, ids: list[int], chunked: int) -> np.ndarray:
    """Logits (N, V) after each token of one row: the first `chunked` in chunks of 256, then token by token."""
    opened = open_bundle(bundle)
    engine = open_engine(opened, opened.manifest.targets[0], opened.manifest.limits)
    cache, found, start = engine.allocate(1), [], 0
    while start < len(ids):
        length = min(256, chunked - start) if start < chunked else 1
        step = np.array([ids[start : start + length]])
        offsets, lens = np.array([start], np.int32), np.array([length], np.int32)
        found.append(engine.step(cache, 0, step, offsets, lens, np.arange(length)[None])[0].copy())
        start += length
    return np.concatenate(found)


def test_a_cache_of_8_bits_costs_little_on_1500_tokens(smollm2_gguf, smollm2_exact, tmp_path):
    """Against the float32 cache, on Python's manual: 4e-4 nats in chunks and 3e-3 token by token were measured."""
    bundle = build_quietly(smollm2_gguf, tmp_path / "kv", quality="exact", kv="int8")
    tokenizer = Tokenizer.from_file(str(smollm2_exact / "tokenizer.json"))
    text = "\n".join(topic for _, topic in sorted(topics.items()))
    ids = tokenizer.encode(text[:12_000]).ids[:1500]
    assert len(ids) == 1500
    want, got = (continued(path, ids, 1400) for path in (smollm2_exact, bundle))
    chunked, single = divergence(want[:1400], got[:1400]), divergence(want[1400:], got[1400:])
    print(f"KL in chunks {chunked:.2e}, token by token {single:.2e}")
    assert 0 < chunked < 1e-3
    assert single < 6e-3


def test_a_chat_turn_answers_and_stops(smollm2_bundle):
    with Pipeline.load(smollm2_bundle) as pipeline:
        session = pipeline.session()
        params = SamplingParams(temperature=0.0, max_tokens=60)
        first = session.chat("What is the capital of France? Answer in one word.", params)
        assert "Paris" in first.text
        assert first.finish_reason == "stop"
        assert "<|im_end|>" not in first.text
        second = session.chat("And of Italy?", params)
        assert "Rome" in second.text
        assert second.timings.cached_tokens >= first.timings.prompt_tokens
