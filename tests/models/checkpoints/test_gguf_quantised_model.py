"""A GGUF in each block type as a model of QLinear and QEmbedding: eager, streamed, and as universal ONNX."""

import gguf
import numpy as np
import onnx
import pytest
import torch
from checkpoint_files import HEADS, KV_HEADS, TOKENS, permute, weights, write_model
from gguf import GGMLQuantizationType as Type
from gguf_models import IDS, ROWS, STEPS, build, dequantised_logits, largest
from gguf_rows import KINDS, random_blocks, weight_rows
from support import RELATIVE_TOLERANCE, Eager, PlainOnnx, run_scenario

from zonda import CheckpointError, ParityError
from zonda.export import onnx_files
from zonda.export.lower.onnxruntime import lower
from zonda.export.proof import run_eager
from zonda.export.universal import export_universal
from zonda.export.weight_proof import WrittenWeights
from zonda.models import layers
from zonda.models.checkpoints import open_checkpoint
from zonda.models.loading import load_weights, match_parameters
from zonda.models.quantization import Form
from zonda.models.quantize import count_weights, quantize_modules, quantized_forms, tensor_classes

HIDDEN, LAYERS = 256, 2  # blocks of the K types are 256 long
ATTENTION = "model.layers.0.self_attn"


def write(path, embedding: Type, linear: Type, down: Type | None = None, *, tied: bool = True, table: float = 1):
    """A two-layer model with weights of a spread at which every part counts; `down` is for the down projections.

    table: deviation of the embedding, and of a head, whose logits deviate by sqrt(HIDDEN) times that.
    """
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    shapes = {
        name.replace("layers.0", f"layers.{layer}"): array.shape
        for layer in range(LAYERS)
        for name, array in weights(HIDDEN).items()
    }
    if not tied:
        shapes["lm_head.weight"] = (len(TOKENS), HIDDEN)
    tensors = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        if len(shape) == 1:
            array = np.random.default_rng(seed).normal(1, 0.2, shape).astype(np.float32)
        else:
            module = name.split(".")[-2]
            kind = {"embed_tokens": embedding, "lm_head": embedding, "down_proj": linear if down is None else down}.get(
                module, linear
            )
            rows = weight_rows(kind, *shape, table if "embed" in name else 2 / shape[1] ** 0.5, seed)
            heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(module)
            array = permute(rows, heads) if heads else rows, kind
        tensors[names.get_name(name, (".weight",))] = array
    return write_model(path, {"llama.block_count": LAYERS}, tensors, drop=list(tensors), hidden=HIDDEN)


def build_quantised(checkpoint):
    module = build(checkpoint)
    quantize_modules(module, quantized_forms(module, checkpoint))
    return module


FILES = {kind.name: {"embedding": kind, "linear": kind} for kind in KINDS} | {
    "mixed": {"embedding": Type.Q6_K, "linear": Type.Q4_K, "down": Type.Q6_K},
    "mixed, untied": {"embedding": Type.Q8_0, "linear": Type.Q5_K, "down": Type.Q5_0, "tied": False},
}


@pytest.fixture(scope="module", params=FILES)
def checkpoint(request, tmp_path_factory):
    return open_checkpoint(write(tmp_path_factory.mktemp("gguf") / "model.gguf", **FILES[request.param]))


@pytest.fixture(scope="module")
def wanted(checkpoint):
    """Logits of the dequantised float32 model, row by row."""
    return dequantised_logits(checkpoint)


def test_every_linear_and_the_embedding_hold_what_the_file_holds(checkpoint):
    module = build_quantised(checkpoint)
    for name, part in module.named_modules():
        assert type(part) not in (layers.Linear, layers.Embedding)
        if isinstance(part, layers.BlockQuantizedWeight):
            tied = name == "lm_head" and checkpoint.config["tie_word_embeddings"]
            stored = checkpoint.tensors[f"{'model.embed_tokens' if tied else name}.weight"]
            assert (part.form, part.shape) == (stored.form, stored.shape)
    assert count_weights(module) == count_weights(build(checkpoint))
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in module.parameters())


def test_eager_logits_are_those_of_the_dequantised_model(checkpoint, wanted):
    model = build_quantised(checkpoint).eval()
    load_weights(model, checkpoint)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32, torch.uint8}
    found = run_scenario(Eager(model, 2, ROWS), IDS, STEPS)
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * largest(wanted))


def test_streamed_from_the_checkpoint_the_logits_are_the_same(checkpoint):
    model, module = build_quantised(checkpoint).eval(), build_quantised(checkpoint)
    load_weights(model, checkpoint)
    names = match_parameters(module, checkpoint)
    prompts = [IDS[0, :5], IDS[1]]
    golden = run_eager(module, onnx_files.tensor_source(module, checkpoint, names), prompts)
    padded = np.zeros((2, 12), np.int64)
    padded[0, :5], padded[1] = prompts
    lens, positions = np.array([5, 12], np.int32), np.arange(12)[None].repeat(2, 0)
    logits = Eager(model, 2, 12).step(padded, np.zeros(2, np.int32), lens, positions)
    np.testing.assert_array_equal(golden.logits, np.concatenate([logits[0, :5], logits[1]]))
    assert all(parameter.is_meta for parameter in module.parameters())


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """The bundle's ONNX files, as a build writes them."""
    directory, module = tmp_path_factory.mktemp("onnx"), build_quantised(checkpoint)
    load = onnx_files.tensor_source(module, checkpoint, match_parameters(module, checkpoint))
    universal = export_universal(module)
    lowered = lower(universal)
    onnx_files.write(directory, universal, lowered, load)
    return directory, module, load, lowered.packs


def test_the_universal_graph_is_valid_and_computes_the_same(exported, wanted):
    directory, module, _, _ = exported
    onnx_files.check(directory)
    for file in (onnx_files.UNIVERSAL, onnx_files.LOWERED):
        runner = PlainOnnx(directory / file, module.kv_shapes, 2, ROWS)
        for got, want in zip(run_scenario(runner, IDS, STEPS), wanted, strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=RELATIVE_TOLERANCE * largest(wanted))


def test_the_weight_file_holds_every_code_once_and_as_it_is(exported, checkpoint):
    directory, module, _, _ = exported
    stored = {id(t): t.nbytes for t in (*module.parameters(), *module.buffers())}
    size = (directory / onnx_files.WEIGHTS).stat().st_size
    assert 0 <= size - sum(stored.values()) < 64 * len(stored)
    graph = onnx.load(directory / onnx_files.UNIVERSAL).graph
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    blocks = checkpoint.blocks(f"{ATTENTION}.q_proj.weight")
    np.testing.assert_array_equal(held[f"{ATTENTION}.q_proj.codes"], blocks.codes.numpy())
    np.testing.assert_array_equal(held[f"{ATTENTION}.q_proj.scales"], blocks.scales.numpy())
    assert (f"{ATTENTION}.q_proj.offsets" in held) == (blocks.offsets is not None)


def test_the_weight_proof_sees_a_wrong_code(exported):
    directory, _, load, packs = exported
    report = WrittenWeights(directory, packs).finish(load)
    assert report.bytes > 0
    file = directory / onnx_files.WEIGHTS
    data = bytearray(file.read_bytes())
    entry = next(
        t
        for t in onnx.load(directory / onnx_files.UNIVERSAL, load_external_data=False).graph.initializer
        if t.name.endswith("up_proj.codes")
    )
    place = {e.key: e.value for e in entry.external_data}
    position = int(place["offset"]) + 5
    data[position] ^= 1
    file.write_bytes(data)
    with pytest.raises(ParityError, match=r"up_proj\.codes is not the checkpoint's: 1 of"):
        WrittenWeights(directory, packs).finish(load)
    data[position] ^= 1
    file.write_bytes(data)


def test_a_tied_head_shares_the_embeddings_parameters(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", Type.Q4_1, Type.Q4_0))
    module = build_quantised(checkpoint)
    load_weights(module, checkpoint)
    head, table = module.lm_head, module.model.embed_tokens
    assert (type(head), type(table)) == (layers.QLinear, layers.QEmbedding)
    assert (head.codes, head.scales, head.offsets) == (table.codes, table.scales, table.offsets)
    assert match_parameters(module, checkpoint)["lm_head.offsets"] == "model.embed_tokens.weight"


@pytest.mark.parametrize("other", [Type.F32, Type.IQ3_S], ids=lambda kind: kind.name)
def test_what_has_no_form_stays_in_floats(tmp_path, other):
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", Type.F16, Type.Q4_0, other))
    module = build_quantised(checkpoint)
    assert type(module.model.embed_tokens) is layers.Embedding
    assert type(module.lm_head) is layers.Linear
    assert type(module.model.layers[1].mlp.down_proj) is layers.Linear
    assert type(module.model.layers[1].mlp.up_proj) is layers.QLinear
    assert checkpoint.blocks("model.embed_tokens.weight") is None
    assert checkpoint.blocks("model.norm.weight") is None
    load_weights(module, checkpoint)


def test_tensor_classes_say_what_weights_are_held_in(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", Type.Q6_K, Type.Q4_K, Type.Q8_0, tied=False))
    floats = {"embedding": "float32", "linear": "float32", "norm": "float32"}
    assert tensor_classes(build(checkpoint)) == floats
    linear = "4 bits, blocks of 32, offsets; 8 bits, blocks of 16; 8 bits, blocks of 32"
    held = {"embedding": "8 bits, blocks of 16", "linear": linear, "norm": "float32"}
    assert tensor_classes(build_quantised(checkpoint)) == held


def test_biases_stay_and_are_added(tmp_path):
    extra = {
        f"blk.0.{name}.bias": np.ones(HIDDEN // (1 if "q" in name else 2), np.float32)
        for name in ("attn_q", "attn_k", "attn_v")
    }
    extra["blk.0.attn_output.bias"] = np.ones(HIDDEN, np.float32)
    path = write_model(tmp_path / "m.gguf", extra=extra, quant=Type.Q8_0, hidden=HIDDEN)
    checkpoint = open_checkpoint(path)
    model, floats = build_quantised(checkpoint).eval(), build(checkpoint).eval()
    load_weights(model, checkpoint)
    load_weights(floats, checkpoint)
    x = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(0))
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        found, wanted = (getattr(m.model.layers[0].self_attn, name) for m in (model, floats))
        assert type(found) is layers.QLinear
        torch.testing.assert_close(found(x), wanted(x), rtol=1e-6, atol=1e-5)


def test_a_module_made_for_another_form_is_refused(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", Type.Q8_0, Type.Q4_0))
    module = build(checkpoint)
    quantize_modules(module, {f"{ATTENTION}.v_proj.weight": Form(4, 32, offsets=True)})
    words = r"1 of another form: .*v_proj\.weight, which is Q4_0, expected 4 bits, blocks of 32, offsets"
    with pytest.raises(CheckpointError, match=words):
        match_parameters(module, checkpoint)


@pytest.mark.parametrize("start", [0, 2], ids=["scale", "minimum"])
def test_a_scale_that_is_no_finite_number_is_an_error(tmp_path, start):
    rows = random_blocks(Type.Q4_1, len(TOKENS), 0, np.ones(1))
    rows[7, start : start + 2] = np.float16([np.inf]).view(np.uint8)
    path = write_model(tmp_path / "m.gguf", extra={"output.weight": (rows, Type.Q4_1)})
    with pytest.raises(CheckpointError, match=r"output\.weight has a scale or minimum that is not a finite number"):
        open_checkpoint(path).blocks("lm_head.weight")


def test_a_form_for_what_is_no_linear_is_refused(tmp_path):
    module = build(open_checkpoint(write_model(tmp_path / "m.gguf")))
    with pytest.raises(ValueError, match=r"not the weights of a Linear or Embedding: model\.norm\.weight"):
        quantize_modules(module, {"model.norm.weight": Form(4, 32, offsets=False)})
    with pytest.raises(ValueError, match="rows of 32 do not divide into blocks of 64"):
        quantize_modules(module, {"lm_head.weight": Form(4, 64, offsets=False)})
