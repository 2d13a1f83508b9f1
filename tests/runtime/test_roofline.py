"""The roofline's arithmetic against counts made by hand, and its page."""

import subprocess
import sys

import pytest

from zonda import RequestError
from zonda.runtime import roofline
from zonda.runtime.bundle import Bundle, open_bundle
from zonda.runtime.manifest import Graph, Parity, Target

HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, DIM, CONTEXT = 64, 96, 2, 4, 2, 16, 128
A100 = next(g for g in roofline.GPUS if g.capability == 80)


def zonda(*arguments):
    command = [sys.executable, "-c", "from zonda.runtime.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def bundle(tiny_bundle):
    return open_bundle(tiny_bundle)


def test_flops_are_two_a_weight_and_token_and_causal_attention(bundle):
    (target,) = bundle.manifest.targets
    work = roofline.work_of(bundle, target)
    vocab = bundle.manifest.limits.vocab_size
    layer = HIDDEN * HEADS * DIM * 2 + HIDDEN * KV_HEADS * DIM * 2 + 3 * HIDDEN * MLP + 2 * HIDDEN
    weights = LAYERS * layer + HIDDEN
    attention = LAYERS * HEADS * (2 * 2 * DIM) * CONTEXT**2 / 2  # q·k and p·v
    assert work.context == CONTEXT
    assert work.prompt_flops == 2 * weights * CONTEXT + attention + 2 * vocab * HIDDEN


def test_a_decode_step_reads_the_weights_without_the_embedding_and_the_cache(bundle):
    (target,) = bundle.manifest.targets
    work = roofline.work_of(bundle, target)
    vocab = bundle.manifest.limits.vocab_size
    assert work.weight_bytes == bundle.manifest.files["onnx/weights.bin"] - vocab * HIDDEN * 4
    assert work.kv_bytes == LAYERS * 2 * KV_HEADS * DIM * 4 * CONTEXT == bundle.manifest.kv_bytes_per_token * CONTEXT
    assert work.decode_seconds(A100) == pytest.approx((work.weight_bytes + work.kv_bytes) / 2.039e12)


def test_a_plan_is_counted_in_its_own_type(bundle):
    (other,) = bundle.manifest.targets
    graph = Graph(role="decode", file="onnx/weights.bin", batch=(1, 1), sequence=(1, 1))
    plan = Target(
        name="tensorrt-rtx",
        graphs=(graph, graph),
        weights=("onnx/weights.bin",),
        dtype="float16",
        kv_dtype="float16",
        tool_versions={},
        parity=Parity(status="pending"),
    )
    assert roofline.work_of(bundle, plan).kv_bytes * 2 == roofline.work_of(bundle, other).kv_bytes


def test_a_table_that_a_plan_dequantised_is_not_read(bundle, monkeypatch):
    config = bundle.read_json("config.json") | {"tie_word_embeddings": True}
    monkeypatch.setattr(Bundle, "read_json", lambda *_: config)
    values = {"name": "p", "kind": "tensorrt-rtx", "graphs": (), "weights": (), "dtype": "float16", "tool_versions": {}}
    plan = Target(**values, parity=Parity(status="pending"), weight_bytes=1_000_000)
    both = Target(
        **values, parity=plan.parity, weight_bytes=1_000_000, quantization={"embedding": "float16, dequantised"}
    )
    table = bundle.manifest.limits.vocab_size * HIDDEN * 2
    assert roofline.work_of(bundle, plan).weight_bytes == 1_000_000
    assert roofline.work_of(bundle, both).weight_bytes == 1_000_000 - table


def test_a_long_prompt_is_bound_by_compute_and_a_short_one_by_the_weights():
    work = roofline.Work(1024, 1_000_000_000, 0, 2e12)
    assert work.prefill_seconds(A100, "float16") == pytest.approx(2e12 / 312e12)
    assert work.prefill_seconds(A100, "float32") == pytest.approx(2e12 / 19.5e12)
    assert roofline.Work(1, 1_000_000_000, 0, 2e9).prefill_seconds(A100, "float16") == pytest.approx(1 / 2039)


def test_experts_are_refused(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(Bundle, "read_json", lambda *_: {"num_local_experts": 8})
    with pytest.raises(RequestError, match="experts"):
        roofline.work_of(bundle, bundle.manifest.targets[0])


def test_the_page_says_that_it_is_arithmetic(tiny_bundle):
    page = zonda("inspect", tiny_bundle, "--roofline").stdout
    for words in ("onnxruntime, float32: a decode step reads", "RTX 4090", "Arithmetic, not measurement"):
        assert words in " ".join(page.split())
    assert "choose one" in zonda("inspect", tiny_bundle, "--roofline", "--json").stderr
