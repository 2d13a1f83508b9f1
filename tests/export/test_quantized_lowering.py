"""QLinear and QEmbedding on ONNX Runtime with 8-bit activations: each product, and a model of them in every form."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from support import TWO_LAYERS, Eager, Lowered, PlainOnnx, open_engine, randomise, run_scenario

from zonda import ParityError
from zonda.export.describe import make_contract
from zonda.export.functions import DOMAIN, MARKERS, VERSION
from zonda.export.lower.onnxruntime import lower
from zonda.export.lower.quantized import Correction, as_written, fuse_quantized
from zonda.export.onnx_files import LOWERED, UNIVERSAL, WEIGHTS, check, write
from zonda.export.universal import export_universal
from zonda.export.weight_proof import WrittenWeights
from zonda.models.layers import BlockQuantizedWeight, QEmbedding
from zonda.models.llama import Llama
from zonda.models.ops.blocks import dequantize, pack, unpack
from zonda.models.quantization import Form
from zonda.models.quantize import quantize_modules
from zonda.runtime import metrics
from zonda.runtime.engines.onnxruntime import OnnxRuntimeEngine
from zonda.runtime.engines.ort import onnxruntime as ort
from zonda.runtime.manifest import Limits

HALF_STEP = 1 / 254
"""Of a block's largest |x|: what rounding to -127 … 127 moves an activation by, at most."""


def drawn(bits, block, rows, blocks, offsets, seed=0):
    """codes, scales, offsets or None, as torch tensors."""
    random = np.random.default_rng(seed)
    codes = torch.from_numpy(random.integers(0, 1 << bits, (rows, blocks * block)).astype(np.uint8))
    scales = torch.from_numpy(random.uniform(0.01, 0.1, (rows, blocks)).astype(np.float32))
    shift = torch.from_numpy(random.normal(0, 0.2, (rows, blocks)).astype(np.float32)) if offsets else None
    return pack(codes, bits), scales, shift


def lowered_product(x, codes, scales, offsets, bits, block):
    """One QLinear through `fuse_quantized`, its weights as the file would hold them; the result and the operators."""
    names = ["x", "m.codes", "m.scales", *(["m.offsets"] if offsets is not None else [])]
    node = helper.make_node("QLinear", names, ["y"], domain=DOMAIN, bits=bits, block_size=block)
    weights = [t.numpy() for t in (codes, scales, offsets) if t is not None]
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "sequence", x.shape[2]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(a, n) for a, n in zip(weights, names[1:], strict=True)],
    )
    imports = [helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, VERSION)]
    model = ir.serde.deserialize_model(helper.make_model(graph, opset_imports=imports, ir_version=11))
    model.opset_imports["com.microsoft"] = 1
    packs = {}
    corrections = fuse_quantized(model.graph, packs)
    for name, (member,) in packs.items():
        part = {"m.codes": codes, "m.scales": scales}[member]
        if "m" in corrections:
            more = corrections["m"].quantize(offsets)[member == "m.scales"]
            part = torch.cat((part, more), 1)
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(part.numpy().reshape(value.shape.numpy()))
    ir.passes.common.RemoveUnusedNodesPass()(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0], Counter(node.op_type for node in model.graph)


def allowed(x, weight, block):
    """Σ over blocks of half a step of the block's activations times its weights' sizes: (B, S, N)."""
    steps = np.abs(x).reshape(*x.shape[:2], -1, block).max(-1) * HALF_STEP
    sizes = np.abs(weight).reshape(len(weight), -1, block).sum(-1)
    return np.einsum("bsk,nk->bsn", steps, sizes)


CASES = [(4, 32, 3, True), (4, 32, 32, True), (4, 16, 5, True), (8, 32, 18, True), (8, 16, 4, False), (4, 32, 4, False)]


@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize(("bits", "block", "blocks", "offsets"), CASES)
def test_a_product_is_off_by_the_rounding_of_its_activations_only(bits, block, blocks, offsets, tokens):
    """And by the rounding of the offsets, which is known: both bounds are derived, not tuned."""
    codes, scales, shift = drawn(bits, block, 7, blocks, offsets)
    x = np.random.default_rng(1).normal(size=(1, tokens, blocks * block)).astype(np.float32)
    found, operators = lowered_product(x, codes, scales, shift, bits, block)
    assert operators["MatMulNBits"] == 1
    wide_x, weight = x.astype(np.float64), dequantize(codes, scales, None, bits, block).double().numpy()
    wanted = np.einsum("bsk,nk->bsn", wide_x, weight)
    bound = allowed(wide_x, weight, block)
    if shift is not None:
        correction = Correction(bits, block, blocks)
        columns = dequantize(*correction.quantize(shift), None, bits, block).double().numpy()
        sums = np.zeros((1, tokens, correction.blocks * block))
        sums[..., :blocks] = wide_x.reshape(1, tokens, blocks, block).sum(-1)
        twice = np.concatenate([sums] * correction.parts, -1)
        left = shift.double().numpy() - columns.reshape(7, correction.parts, -1).sum(1)[:, :blocks]
        wanted = wanted + np.einsum("bsk,nk->bsn", sums[..., :blocks], shift.double().numpy())
        bound = bound + allowed(twice, columns, block)
        bound = bound + np.einsum("bsk,nk->bsn", np.abs(sums[..., :blocks]), np.abs(left))
    error = np.abs(found - wanted)
    assert (error <= bound + 1e-5 * np.abs(wanted).max()).all()
    assert error.max() > bound.max() / 1000  # activations are rounded: the test is about the fused operator


@pytest.mark.parametrize(("bits", "parts", "share"), [(4, 2, 1 / (7 * 28)), (8, 1, 1 / 254)])
def test_offsets_are_rounded_to_a_known_share_of_the_largest(bits, parts, share):
    shift = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    shift[3] = 0
    correction = Correction(bits, 32, 40)
    codes, scales = correction.quantize(shift)
    assert codes.shape == (5, correction.code_bytes)
    assert scales.shape == (5, correction.columns // 32)
    columns = dequantize(codes, scales, None, bits, 32).reshape(5, parts, -1).sum(1)
    for start in (0, 32):
        block = slice(start, min(start + 32, 40))
        largest = shift[:, block].abs().amax(1, keepdim=True)
        assert ((columns[:, block] - shift[:, block]).abs() <= share * largest * (1 + 1e-5)).all()
    assert not columns[:, 40:].any()


def test_long_rows_are_summed_by_reduction_short_ones_by_a_product():
    for blocks, sums in ((8, "MatMul"), (130, "ReduceSum")):
        codes, scales, shift = drawn(4, 32, 3, blocks, offsets=True)
        _, operators = lowered_product(np.ones((1, 1, blocks * 32), np.float32), codes, scales, shift, 4, 32)
        assert operators[sums] == 1


ROWS = 32
FORMS = {
    "embed": Form(4, 32, offsets=True),  # a table with offsets that the tied head reads too
    "q_proj": Form(4, 32, offsets=True),
    "k_proj": Form(4, 32, offsets=True),
    "v_proj": Form(4, 32, offsets=True),
    "o_proj": Form(8, 16, offsets=False),
    "gate_proj": Form(8, 32, offsets=True),
    "up_proj": Form(8, 32, offsets=True),
    "down_proj": Form(4, 32, offsets=False),
}


def build(rows: int) -> Llama:
    model = Llama(TWO_LAYERS, rows)
    forms = {
        f"{name}.weight": form
        for name, _ in model.named_modules(remove_duplicate=False)
        for key, form in FORMS.items()
        if key in name.rpartition(".")[2] or (key == "embed" and name == "lm_head")
    }
    quantize_modules(model, forms)
    return model


def export(directory, load, quality):
    """Both graphs and their weights; the meta module and the lowered graph."""
    with torch.device("meta"):
        module = build(ROWS)
    universal = export_universal(module)
    lowered = lower(universal, quality)
    write(directory, universal, lowered, load)
    return module, lowered


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Directory, eager model, meta module, lowered graph, and the loader of parameters."""
    directory, model = tmp_path_factory.mktemp("quantised"), build(ROWS).eval()
    randomise(model)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, BlockQuantizedWeight):  # weights of a spread at which every part counts
            spread = (1 if isinstance(module, QEmbedding) else 2 / module.shape[1] ** 0.5) / (
                0.29 * 2**module.form.bits
            )
            module.scales.copy_(spread * torch.empty_like(module.scales).uniform_(0.5, 1.5, generator=generator))
            if module.offsets is not None:
                module.offsets.copy_(module.scales * torch.randn(module.scales.shape, generator=generator))
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    module, lowered = export(directory, state.__getitem__, "balanced")
    return directory, model, module, lowered, state.__getitem__


def test_the_universal_graph_computes_what_the_eager_model_does(exported):
    """Though its weights lie in the file with columns that are none of its business."""
    directory, model, module, _, _ = exported
    check(directory)
    tokens, steps = np.random.default_rng(0).integers(0, 61, (2, 12)), [[7, 4], [1, 1], [3, 5]]
    wanted = run_scenario(Eager(model, 2, ROWS), tokens, steps)
    found = run_scenario(PlainOnnx(directory / UNIVERSAL, module.kv_shapes, 2, ROWS), tokens, steps)
    scale = max(np.abs(row).max() for row in wanted)
    for want, got in zip(wanted, found, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * scale)


def test_the_engine_is_within_the_gate_of_its_class(exported):
    directory, model, module, _, _ = exported
    tokens, steps = np.random.default_rng(0).integers(0, 61, (2, 12)), [[7, 4], [1, 1], [3, 5]]
    wanted = np.concatenate(run_scenario(Eager(model, 2, ROWS), tokens, steps))
    engine = open_engine(directory, module, 61, capacity=20, max_chunk=12)
    found = metrics.deviations(wanted, np.concatenate(run_scenario(Lowered(engine, 2), tokens, steps)))
    thresholds = metrics.THRESHOLDS["balanced"]
    assert found.relative_error.max() < thresholds.relative_error / 4
    assert found.kl.mean() < thresholds.kl
    assert found.relative_error.max() > 1e-4  # it does round


def no_corrections(graph):
    for tensor in graph.initializer:
        if tensor.name.startswith("sums_of_"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(0 * onnx.numpy_helper.to_array(tensor), tensor.name))


def swap_gate_and_up(graph):
    split = next(node for node in graph.node if node.op_type == "Split")
    first, second = split.output
    split.output[:] = [second, first]


def drop_a_residual(graph):
    norm = next(node for node in graph.node if node.op_type == "SkipSimplifiedLayerNormalization")
    norm.input[0] = norm.input[1]


def set_in_attention(name, value):
    def plant(graph):
        for node in graph.node:
            if node.op_type == "GroupQueryAttention":
                next(attribute for attribute in node.attribute if attribute.name == name).i = value

    return plant


FAULTS = {
    "offsets dropped": no_corrections,
    "gate and up swapped": swap_gate_and_up,
    "a residual dropped": drop_a_residual,
    "rotary interleaved": set_in_attention("rotary_interleaved", 1),
    "no rotary": set_in_attention("do_rotary", 0),
    "a window of 3": set_in_attention("local_window_size", 3),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_gate_of_the_class_sees_what_is_wrong_and_not_merely_rounded(exported, fault):
    """By the divergence of a schedule's tokens: the bounds for a single token are loose on purpose."""
    directory, model, module, _, _ = exported
    wrong = onnx.load(directory / LOWERED, load_external_data=False)
    FAULTS[fault](wrong.graph)
    path = directory / LOWERED.replace("onnxruntime", fault.replace(" ", "_"))
    path.write_bytes(wrong.SerializeToString())
    tokens, steps = np.random.default_rng(0).integers(0, 61, (2, 12)), [[7, 4], [1, 1], [3, 5]]
    wanted = np.concatenate(run_scenario(Eager(model, 2, ROWS), tokens, steps))
    limits = Limits(capacity=20, max_batch=4, max_chunk=12, vocab_size=61)
    engine = OnnxRuntimeEngine(path, make_contract(module.kv_shapes, 61), limits, threads=1)
    found = metrics.deviations(wanted, np.concatenate(run_scenario(Lowered(engine, 2), tokens, steps)))
    assert found.kl.mean() > metrics.THRESHOLDS["balanced"].kl


def test_every_linear_is_fused_and_what_shares_an_input_is_one(exported):
    operators = Counter(node.op_type for node in exported[3].model.graph)
    assert operators["MatMulNBits"] == 2 * 4 + 1
    assert operators["Concat"] == 2 * 2 + 1  # inputs with sums: of q, k and v, of gate and up, of the head
    assert operators["QEmbedding"] == 1
    assert not operators["QLinear"]


def test_rows_are_wide_in_the_file_and_lie_there_once(exported):
    directory, _, module, lowered, _ = exported
    stored = {id(t): t.nbytes for t in (*module.parameters(), *module.buffers())}
    wide = {id(module.get_submodule(name).codes): name for name in lowered.corrections}
    more = sum(
        (c.code_bytes + 4 * c.columns // c.block_size) * module.get_submodule(name).codes.shape[0]
        for name in wide.values()
        for c in [lowered.corrections[name]]
    )
    size = (directory / WEIGHTS).stat().st_size
    assert 0 <= size - sum(stored.values()) - more < 64 * len(stored)


def test_the_weight_proof_sees_a_wrong_column_of_a_correction(exported):
    directory, _, _, lowered, load = exported

    def written(name):
        return as_written(name, load(name), load, lowered.corrections)

    WrittenWeights(directory, lowered.packs).finish(written)
    entries = {t.name: t for t in onnx.load(directory / UNIVERSAL, load_external_data=False).graph.initializer}
    place = {e.key: e.value for e in entries["model.layers.0.self_attn.k_proj.codes"].external_data}
    file, position = directory / WEIGHTS, int(place["offset"]) + 32  # the first byte behind row 0's own 64 codes
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)
    try:
        with pytest.raises(ParityError, match=r"k_proj\.codes is not the checkpoint's: 1 of .* first at \[0, 32\]"):
            WrittenWeights(directory, lowered.packs).finish(written)
    finally:
        data[position] ^= 1
        file.write_bytes(data)


def test_left_exact_the_same_model_keeps_its_bodies(tmp_path, exported):
    _, _, _, _, load = exported
    _, lowered = export(tmp_path, load, "exact")
    operators = Counter(node.op_type for node in lowered.model.graph)
    assert operators["QLinear"] == 2 * 4 + 1
    assert not operators["MatMulNBits"]
    assert {marker.name for marker in MARKERS} >= {
        node.op_type for node in lowered.model.graph if node.domain == DOMAIN
    }
    assert (tmp_path / LOWERED).is_file()


def test_packed_codes_come_apart_as_they_were():
    codes = torch.arange(16, dtype=torch.uint8).reshape(1, 16)
    assert torch.equal(unpack(pack(codes, 4), 4), codes)
