"""What only a GPU can show: plans built for it compute what the bundle records, captured or not, and leave nothing."""

import time

import numpy as np
import pytest
import torch
from conftest import build_quietly
from support import SCENARIOS, Lowered, run_scenario

from zonda.models import registry
from zonda.models.cache import Cache
from zonda.models.checkpoints import open_checkpoint
from zonda.models.loading import load_weights
from zonda.plugins_trt import CubinLibrary, load
from zonda.plugins_trt.cuda import CudaDriver
from zonda.plugins_trt.launcher import Launcher
from zonda.runtime import Pipeline, SamplingParams, gpu
from zonda.runtime.bundle import open_bundle
from zonda.runtime.engines.cuda_memory import Device
from zonda.runtime.engines.tensorrt import TensorRtEngine
from zonda.runtime.loader import open_engine, targets_of
from zonda.runtime.metrics import THRESHOLDS
from zonda.runtime.records import remember, remembered_pick
from zonda.runtime.verification import prove_target

pytestmark = pytest.mark.gpu

RTX = (75, 80, 86, 89, 120, 121)
FORMS = ("plugins", "builtin")


@pytest.fixture(scope="module")
def kind():
    """The kind of plans for this host's GPU."""
    found = gpu.find_gpu()
    if isinstance(found, str):
        pytest.skip(found)
    kind = "tensorrt-rtx" if found.capability in RTX else "tensorrt"
    if not gpu.is_installed(gpu.MODULES[kind]):
        pytest.skip(f"{gpu.MODULES[kind]} is not installed: pip install 'zonda[{kind.replace('tensorrt-', '')}]'")
    return kind


def build_both(model, folder, kind, **limits):
    """A bundle with a plan with our kernels and one without, for this GPU."""
    found = gpu.find_gpu()
    options = {"targets": ("onnxruntime", kind), "compute_capabilities": (found.capability,)}
    return open_bundle(build_quietly(model, folder, plugins=("all", "none"), **options, **limits))


@pytest.fixture(scope="module")
def bundle(kind, tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("planned") / "tiny"
    return build_both(tiny_folder, folder, kind, capacity=112, max_batch=4, max_chunk=16)


@pytest.fixture(params=FORMS)
def planned(request, bundle, kind):
    """The bundle, and one of its plans."""
    (target,) = targets_of(bundle, f"{kind}-{request.param}")
    return bundle, target


def open_it(bundle, target, **options):
    kernels = bundle.file(target.kernels).read_bytes() if target.kernels else None
    trt = load(gpu.MODULES[target.kind])
    plan = bundle.file(target.graphs[0].file)
    manifest = bundle.manifest
    plugins = tuple(target.plugins)
    return TensorRtEngine(trt, plan, manifest.contract, manifest.limits, cubins=kernels, plugins=plugins, **options)


def test_every_schedule_of_the_golden_data(planned):
    bundle, target = planned
    engine = open_engine(bundle, target, bundle.manifest.limits)
    assert prove_target(bundle, target, engine).status == "passed"
    engine.close()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_scenario_equals_onnx_runtime(planned, scenario):
    bundle, target = planned
    steps = [[min(new, 16) for new in step] for step in SCENARIOS[scenario]]
    rows, length = len(steps[0]), int(np.array(steps).sum(0).max())
    tokens = np.random.default_rng(1).integers(0, bundle.manifest.limits.vocab_size, (rows, length))
    logits = []
    for one in (target, *targets_of(bundle, "onnxruntime")):
        engine = open_engine(bundle, one, bundle.manifest.limits)
        logits.append(run_scenario(Lowered(engine, rows), tokens, steps))
        engine.close()
    allowed = THRESHOLDS[target.dtype].max_error
    for found, wanted in zip(*logits, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=allowed * np.abs(wanted).max())


def test_every_kernel_of_the_plan_is_loaded_by_this_gpu(bundle, kind):
    (target,) = targets_of(bundle, f"{kind}-plugins")
    library = CubinLibrary.from_bytes(bundle.file(target.kernels).read_bytes())
    device = Device()
    with device.entered():
        launcher = Launcher(library, CudaDriver())
        for variant in library.variants:
            types = [dtype for _, dtype in launcher.cubin(variant).parameters]
            launcher.bind(variant, 1, [0.0] * sum(not dtype.startswith("*") for dtype in types))
        launcher.close()
    device.close()
    assert library.variants


def test_replayed_graphs_give_the_logits_of_plain_steps(planned):
    logits = {}
    for graphs in (False, True):
        engine = open_it(*planned, cuda_graphs=graphs)
        cache = engine.allocate(2)
        ones, zeros = np.ones(2, np.int32), np.zeros((2, 1), np.int64)
        logits[graphs] = [
            engine.step(cache, 0, np.array([[7], [token]]), np.full(2, token, np.int32), ones, zeros).copy()
            for token in range(8)
        ]
        assert engine.no_graphs == (None if graphs else "they were switched off")
        engine.close()
    np.testing.assert_array_equal(logits[False], logits[True])


def test_a_copied_row_continues_as_the_original(planned):
    engine = open_it(*planned)
    cache = engine.allocate(2)
    ids = np.array([[3, 1, 4, 1, 5]])
    engine.step(cache, 1, ids, np.zeros(1, np.int32), np.full(1, 5, np.int32), np.array([[4]]))
    cache.copy_row(1, 0, 5)
    for copied, original in zip(cache.read(0, 5), cache.read(1, 5), strict=True):
        np.testing.assert_array_equal(copied, original)
    ones, zeros = np.ones(2, np.int32), np.zeros((2, 1), np.int64)
    logits = engine.step(cache, 0, np.array([[9], [9]]), np.full(2, 5, np.int32), ones, zeros)
    np.testing.assert_array_equal(logits[0], logits[1])
    engine.close()


def test_closing_gives_the_memory_back(planned):
    device = Device()
    open_it(*planned).close()  # what libraries keep for the process
    with device.entered():
        before = device.memory()[0]
    engine = open_it(*planned)
    engine.allocate(4)
    engine.close()
    with device.entered():
        after = device.memory()[0]
    device.close()
    assert abs(before - after) < 4 << 20


def rate(generate, tokens: int) -> float:
    """Tokens a second of a call that generates `tokens`; the first call warms up."""
    generate()
    started = time.perf_counter()
    generate()
    return tokens / (time.perf_counter() - started)


def eager_generate(gguf, tokens: int):
    """A function that decodes greedily with the eager torch model in 16 bits: on the GPU if this torch can, else not."""
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    checkpoint = open_checkpoint(gguf)
    architecture = registry.of_config(checkpoint.config)
    model = architecture.for_rows(architecture.read_config(checkpoint.config), tokens, 0).eval()
    load_weights(model, checkpoint, dtype=dtype)
    model.to(device)

    @torch.no_grad()
    def generate() -> list[int]:
        with torch.device(device):
            cache, found = Cache.zeros(model.kv_shapes, 1, tokens, dtype), [1]
            one, zero = torch.ones(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int64)
            for position in range(tokens):
                offsets, positions = one * position, zero + position
                logits = model(torch.tensor([[found[-1]]]), offsets, positions, one, zero, cache)
                found.append(int(logits[0, 0].argmax()))
        return found[1:]

    return device, generate


@pytest.mark.slow
def test_smollm2_is_proven_and_its_tokens_a_second_stand_beside_eager_torchs(smollm2_gguf, kind, tmp_path, capsys):
    """Printed, not judged: what is faster on a GPU is not known before it has been measured there."""
    tokens = 128
    bundle = build_both(smollm2_gguf, tmp_path / "smollm2", kind, capacity=2048)
    device, generate = eager_generate(smollm2_gguf, tokens)
    lines = [f"eager torch on {device}: {rate(generate, tokens):.0f} tokens/s"]
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for target in targets_of(bundle, kind):
        engine = open_engine(bundle, target, bundle.manifest.limits)
        assert prove_target(bundle, target, engine).status == "passed"
        engine.close()
        with Pipeline.load(bundle.path, target=target.name) as pipeline:
            found = rate(lambda pipeline=pipeline: pipeline.generate("The capital of France is", params), tokens)
            assert pipeline.generate("The capital of France is", params).text.startswith(" Paris")
        lines.append(f"{target.name}: {found:.0f} tokens/s")
    with capsys.disabled():
        print(f"\n{gpu.find_gpu()}\n" + "\n".join(lines))


def test_bench_picks_one_of_two_proven_plans_and_load_takes_it(bundle, kind, tmp_path, monkeypatch, capsys):
    from zonda.runtime import cli

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    plans = targets_of(bundle, kind)
    for target in plans:
        engine = open_engine(bundle, target, bundle.manifest.limits)
        remember(bundle, target, prove_target(bundle, target, engine))
        engine.close()
    cli.bench(bundle.path, target=kind, batch=2, tokens=16, repeat=3)
    with capsys.disabled():
        print("\n" + capsys.readouterr().out)
    record = remembered_pick(bundle)
    assert set(record.request_s) == {target.name for target in plans}
    assert record.request_s[record.target] == min(record.request_s.values())
    with Pipeline.load(bundle.path) as pipeline:
        assert pipeline.target == record.target


def test_the_cuda_provider_of_onnx_runtime(planned):
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("onnxruntime has no CUDA provider: pip install 'zonda[cuda]' in an environment of its own")
    Pipeline.load(planned[0].path, target="onnxruntime-cuda", verify=True).close()
