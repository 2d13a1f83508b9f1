"""A GGUF built with --quality fast: two graphs over one weight file, one KV cache and one set of buffers."""

import shutil

import msgspec
import numpy as np
import onnx
import pytest
import torch
from checkpoint_files import TOKENS
from conftest import build_quietly
from gguf import GGMLQuantizationType as Type
from rich.console import Console
from test_gguf_quantised_model import write

from zonda import BuildError, BundleError, ParityError
from zonda.export import onnx_files
from zonda.export.lower.int8 import SHORTEST_PREFILL, derived_source
from zonda.export.lower.onnxruntime import lower
from zonda.export.plan import make_plan
from zonda.export.universal import export_universal
from zonda.export.weight_proof import WrittenWeights
from zonda.models import registry
from zonda.models.checkpoints import open_checkpoint
from zonda.models.loading import match_parameters
from zonda.models.quantize import quantize_modules, quantized_forms
from zonda.runtime import Pipeline
from zonda.runtime.bundle import CHECKSUMS, file_sha256, open_bundle
from zonda.runtime.engines import ort_session
from zonda.runtime.engines.onnxruntime import OnnxRuntimeEngine
from zonda.runtime.golden import GOLDEN, Golden
from zonda.runtime.inspection import inspection_page
from zonda.runtime.loader import choose_target, open_engine
from zonda.runtime.manifest import Limits, encode
from zonda.runtime.sampling import SamplingParams
from zonda.runtime.schedules import quick_schedules, schedules
from zonda.runtime.verification import prove_target

CHUNK = 32
OPTIONS = {"quality": "fast", "capacity": 64, "max_batch": 4, "max_chunk": CHUNK}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf", Type.Q8_0, Type.Q4_1, table=0.1)


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory):
    return build_quietly(checkpoint, tmp_path_factory.mktemp("bundle") / "fast", **OPTIONS)


@pytest.fixture
def copy(bundle, tmp_path):
    """A bundle that a test may bend."""
    return shutil.copytree(bundle, tmp_path / "copy")


def change_manifest(path, **changes) -> None:
    """Change the target of a bundle's manifest, and its checksum with it."""
    manifest = open_bundle(path).manifest
    target = msgspec.structs.replace(manifest.targets[0], **changes)
    old = file_sha256(path / "manifest.json")
    (path / "manifest.json").write_bytes(encode(msgspec.structs.replace(manifest, targets=(target,))))
    sums = (path / CHECKSUMS).read_text().replace(old, file_sha256(path / "manifest.json"))
    (path / CHECKSUMS).write_text(sums)


def engine_of(bundle, *graphs: str) -> OnnxRuntimeEngine:
    """An engine of some of the bundle's graphs: the first, and from SHORTEST_PREFILL tokens on the second."""
    opened = open_bundle(bundle)
    model, *prefill = (opened.file(graph) for graph in graphs)
    return OnnxRuntimeEngine(
        model,
        opened.manifest.contract,
        opened.manifest.limits,
        threads=1,
        prefill=(prefill[0], SHORTEST_PREFILL) if prefill else None,
    )


def step(engine, cache, ids, offsets):
    """Logits of every token of ids (B, S)."""
    batch, length = ids.shape
    positions = np.arange(length)[None].repeat(batch, 0)
    return engine.step(cache, 0, ids, np.array(offsets, np.int32), np.full(batch, length, np.int32), positions).copy()


def test_the_manifest_says_which_steps_each_graph_runs(bundle):
    manifest = open_bundle(bundle, full=True).manifest
    (target,) = manifest.targets
    decode, prefill = target.graphs
    assert (decode.role, decode.file, decode.sequence) == ("decode", onnx_files.LOWERED, (1, SHORTEST_PREFILL - 1))
    assert (prefill.role, prefill.file, prefill.sequence) == (
        "prefill",
        onnx_files.PREFILL,
        (SHORTEST_PREFILL, CHUNK),
    )
    assert (target.quality, target.parity.status, target.parity.thresholds.name) == ("fast", "passed", "fast")


def test_the_proof_runs_both_graphs_and_so_does_a_quick_one(bundle):
    limits, golden = open_bundle(bundle).manifest.limits, Golden.read(bundle / GOLDEN)
    for plans in (schedules, quick_schedules):
        widths = {max(new) for schedule in plans([len(p) for p in golden.prompts], limits) for new in schedule.steps}
        assert min(widths) < SHORTEST_PREFILL <= max(widths)


@pytest.mark.parametrize("broken", [onnx_files.LOWERED, onnx_files.PREFILL])
@pytest.mark.parametrize("quick", [True, False], ids=["quick", "whole"])
def test_a_proof_sees_a_mistake_in_either_graph(copy, broken, quick):
    opened = open_bundle(copy)
    model = onnx.load(copy / broken, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "rotary_interleaved":
                attribute.i = 1
    (copy / broken).write_bytes(model.SerializeToString())
    target, _ = choose_target(opened, None)
    engine = open_engine(opened, target, opened.manifest.limits, 1)
    with pytest.raises(ParityError):
        prove_target(opened, target, engine, quick=quick)


def test_it_loads_verifies_and_generates(bundle):
    with Pipeline.load(bundle, verify=True, threads=1) as pipeline:
        text = "the wind comes down from the mountains hot and dry"
        assert len(pipeline.generate(text, SamplingParams(max_tokens=8, min_tokens=8)).token_ids) == 8


def test_inspection_shows_both(bundle):
    console = Console(width=200)
    with console.capture() as captured:
        console.print(inspection_page(open_bundle(bundle)))
    page = captured.get()
    assert "float32, fast" in page
    assert f"decode: 1 to {SHORTEST_PREFILL - 1} tokens a row" in page
    assert f"prefill: {SHORTEST_PREFILL} to {CHUNK} tokens a row" in page


def test_each_graph_runs_its_own_steps_over_the_same_cache(bundle):
    """Prefill, decode and prefill again, as three engines with a cache each do it by themselves, bit by bit."""
    both = engine_of(bundle, onnx_files.LOWERED, onnx_files.PREFILL)
    alone = {name: engine_of(bundle, name) for name in (onnx_files.LOWERED, onnx_files.PREFILL)}
    ids = np.random.default_rng(0).integers(0, both.limits.vocab_size, (2, 48))
    cache = both.allocate(2)
    caches = {name: engine.allocate(2) for name, engine in alone.items()}
    begin = 0
    for length in (20, 1, 1, SHORTEST_PREFILL - 1, SHORTEST_PREFILL - 15, 5):
        name = onnx_files.PREFILL if length >= SHORTEST_PREFILL else onnx_files.LOWERED
        part = ids[:, begin : begin + length]
        for buffer, shared in zip(caches[name].buffers, cache.buffers, strict=True):
            buffer[...] = shared
        wanted = step(alone[name], caches[name], part, [begin, begin])
        np.testing.assert_array_equal(step(both, cache, part, [begin, begin]), wanted)
        for buffer, shared in zip(caches[name].buffers, cache.buffers, strict=True):
            np.testing.assert_array_equal(shared[:, :, : begin + length], buffer[:, :, : begin + length])
        begin += length
    first, second = (step(alone[name], caches[name], ids[:, :20], [0, 0]) for name in alone)
    assert not np.array_equal(first, second)  # or the steps above would not tell the graphs apart


@pytest.mark.parametrize("graphs", [(onnx_files.LOWERED,), (onnx_files.LOWERED, onnx_files.PREFILL)], ids=["1", "2"])
def test_only_sessions_that_take_turns_stop_spinning(bundle, monkeypatch, graphs):
    told = []

    class Options(ort_session.ort.SessionOptions):
        def add_session_config_entry(self, key, value):
            told.append((key, value))
            super().add_session_config_entry(key, value)

    monkeypatch.setattr(ort_session.ort, "SessionOptions", Options)
    engine_of(bundle, *graphs)
    assert told.count(("session.force_spinning_stop", "1")) == (0 if len(graphs) == 1 else 2)


def test_a_closed_engine_runs_neither(bundle):
    engine = engine_of(bundle, onnx_files.LOWERED, onnx_files.PREFILL)
    cache = engine.allocate(1)
    engine.close()
    for length in (1, SHORTEST_PREFILL):
        with pytest.raises(Exception, match="closed"):
            step(engine, cache, np.zeros((1, length), np.int64), [0])


def test_a_bundle_without_the_prefill_graphs_file_is_refused(copy):
    (copy / onnx_files.PREFILL).unlink()
    with pytest.raises(BundleError, match=r"prefill\.onnx is missing"):
        Pipeline.load(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda graphs: graphs[:1],
        lambda graphs: graphs[1:],
        lambda graphs: (*graphs, graphs[1]),
        lambda graphs: (graphs[0], msgspec.structs.replace(graphs[1], sequence=(SHORTEST_PREFILL + 1, CHUNK))),
        lambda graphs: (msgspec.structs.replace(graphs[0], sequence=(2, SHORTEST_PREFILL - 1)), graphs[1]),
    ],
    ids=["no prefill", "no decode", "two of one", "a gap", "no single token"],
)
def test_a_target_whose_graphs_leave_steps_out_is_refused(copy, change):
    change_manifest(copy, graphs=change(open_bundle(copy).manifest.targets[0].graphs))
    with pytest.raises(BundleError, match="one for decode and one for prefill"):
        Pipeline.load(copy)


def test_chunks_too_short_for_a_prefill_graph_are_refused(checkpoint, tmp_path):
    with pytest.raises(BuildError, match="steps of 16 tokens and more; with chunks of 8 there are none"):
        build_quietly(checkpoint, tmp_path / "out", **OPTIONS | {"max_chunk": 8})


def test_a_float_checkpoint_has_one_graph(tiny_folder, tmp_path):
    out = build_quietly(tiny_folder, tmp_path / "out", **OPTIONS)
    (graph,) = open_bundle(out).manifest.targets[0].graphs
    assert (graph.role, graph.file) == ("any", onnx_files.LOWERED)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """(folder, module, load, lowered): the ONNX files as a build writes them."""
    opened, folder = open_checkpoint(checkpoint), tmp_path_factory.mktemp("onnx")
    architecture = registry.of_config(opened.config)
    with torch.device("meta"):
        module = architecture.for_rows(architecture.read_config(opened.config), OPTIONS["capacity"], CHUNK)
    quantize_modules(module, quantized_forms(module, opened))
    load = onnx_files.tensor_source(module, opened, match_parameters(module, opened, architecture.ignored))
    universal = export_universal(module)
    lowered = lower(universal, "fast")
    onnx_files.write(folder, universal, lowered, load)
    return folder, module, load, lowered


def places(path) -> dict[str, tuple[int, int]]:
    """(offset, length) of each external initialiser."""
    found = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.external_data:
            fields = {entry.key: entry.value for entry in tensor.external_data}
            found[tensor.name] = int(fields["offset"]), int(fields["length"])
    return found


def test_what_both_graphs_use_lies_once_in_the_file(exported):
    folder, _, _, lowered = exported
    decode, prefill = (places(folder / name) for name in (onnx_files.LOWERED, onnx_files.PREFILL))
    shared = decode.keys() & prefill.keys()
    for name in ("lm_head.codes", "lm_head.scales", "model.norm.weight", "model.layers.1.mlp.down_proj.codes.blocks"):
        assert name in shared
    assert all(decode[name] == prefill[name] for name in shared)
    assert prefill.keys() - decode.keys() == set(lowered.derived)
    ends = [offset + length for offset, length in prefill.values()]
    assert max(ends) == (folder / onnx_files.WEIGHTS).stat().st_size


def test_the_linears_of_the_tokens_that_want_logits_are_the_decode_graphs(exported):
    _, _, _, lowered = exported
    rounded = {name.removesuffix(".int8") for name in lowered.derived if name.endswith(".int8")}
    of_all_tokens = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert rounded == {f"model.layers.0.{name}" for name in of_all_tokens} | {"model.layers.1.self_attn.q_proj"}


def test_the_plan_knows_the_file(exported):
    folder, module, _, _ = exported
    limits = Limits(capacity=64, max_batch=4, max_chunk=CHUNK, vocab_size=len(TOKENS))
    more = make_plan(module, limits, "fast").bundle - make_plan(module, limits, "balanced").bundle
    derived = places(folder / onnx_files.PREFILL).items() - places(folder / onnx_files.LOWERED).items()
    written = sum(length for name, (_, length) in derived if ".int8" in name)
    last_layer = written // 2
    assert written <= more <= written + 2 * last_layer


def test_the_weight_proof_sees_one_wrong_byte_of_a_derived_weight(exported):
    folder, _, load, lowered = exported
    source, own = onnx_files.file_source(lowered, load), places(folder / onnx_files.PREFILL)

    def prove():
        return WrittenWeights(folder, lowered.packs, lowered.derived).finish(source)

    assert prove().tensors == len(places(folder / onnx_files.UNIVERSAL)) + len(lowered.derived)
    file = folder / onnx_files.WEIGHTS
    data = bytearray(file.read_bytes())
    for name in ("model.layers.0.mlp.down_proj.int8", "model.layers.0.self_attn.q_proj.int8.scales"):
        place = own[name][0] + 5
        data[place] ^= 1
        file.write_bytes(data)
        with pytest.raises(ParityError, match=rf"{name} is not the checkpoint's: 1 of"):
            prove()
        data[place] ^= 1
    file.write_bytes(data)


def test_a_derived_weight_that_no_graph_has_is_an_error(exported):
    folder, _, _, lowered = exported
    with pytest.raises(ParityError, match=r"has the weight model\.layers\.9\.int8"):
        WrittenWeights(folder, lowered.packs, [*lowered.derived, "model.layers.9.int8"])


def test_the_file_is_the_same_whenever_it_is_written(exported, bundle):
    folder, _, load, lowered = exported
    assert file_sha256(folder / onnx_files.WEIGHTS) == file_sha256(bundle / onnx_files.WEIGHTS)
    name = "model.layers.0.mlp.down_proj.int8"
    once, again = (derived_source(lowered.derived, load)(name) for _ in range(2))
    np.testing.assert_array_equal(once, again)
