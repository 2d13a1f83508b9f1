"""Quantised weights in the graph for TensorRT: signed codes that it dequantises, the checkpoint's numbers, and a plan."""

from collections import Counter
from importlib.util import find_spec

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf_rows import weight_rows
from narrow_graphs import NUMPY, ROWS, TOLERANCE, UNITS, Graph, feed_and_compare
from onnx.reference import ReferenceEvaluator
from support import SCENARIOS, TWO_LAYERS, randomise

from zonda import BuildError
from zonda.export.device_plan import make_device_plan
from zonda.export.lower.tensorrt import lower
from zonda.export.lower.tensorrt_lint import lint
from zonda.export.lower.tensorrt_weights import Blocks
from zonda.export.tensorrt_build import build_plan, make_profiles, write_onnx
from zonda.export.tensorrt_target import PlanOptions, add_target
from zonda.export.tensorrt_weights import with_positive_scales
from zonda.export.universal import export_universal
from zonda.models.checkpoints.gguf_blocks import form_of, read_rows
from zonda.models.layers import BlockQuantizedWeight, QEmbedding
from zonda.models.llama import Llama
from zonda.models.ops.blocks import dequantize
from zonda.models.quantization import Form
from zonda.models.quantize import quantize_modules
from zonda.runtime.engines.ort import onnxruntime as ort
from zonda.runtime.manifest import Limits, Parity

KINDS = {
    "embed_tokens": Type.Q8_0,
    "lm_head": Type.Q8_0,
    "q_proj": Type.Q4_1,
    "k_proj": Type.Q4_1,
    "v_proj": Type.Q4_0,
    "o_proj": Type.Q5_1,
    "gate_proj": Type.Q4_0,
    "up_proj": Type.Q8_0,
    "down_proj": Type.Q5_0,
}
"""Module -> the GGUF type of its weight: 4 and 8 bits, with offsets and without, and a tied head."""


LIMITS = Limits(capacity=ROWS - 16, max_batch=4, max_chunk=16, vocab_size=61)

needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed: pip install -e '.[rtx]'"
)


def quantised(rows: int) -> Llama:
    model = Llama(TWO_LAYERS, rows)
    names = [name for name, module in model.named_modules(remove_duplicate=False) if hasattr(module, "weight")]
    kinds = {name: KINDS[name.split(".")[-1]] for name in names if name.split(".")[-1] in KINDS}
    quantize_modules(model, {f"{name}.weight": form_of(kind) for name, kind in kinds.items()})
    return model


@pytest.fixture(scope="module")
def model() -> Llama:
    made = quantised(ROWS).eval()
    randomise(made)
    for seed, (name, module) in enumerate(made.named_modules()):
        if isinstance(module, BlockQuantizedWeight):
            kind, (rows, columns) = KINDS[name.split(".")[-1]], module.shape
            deviation = 1 if "embed" in name else 2 / columns**0.5
            parts = read_rows(weight_rows(kind, rows, columns, deviation, seed), kind)
            for parameter, part in zip((module.codes, module.scales, module.offsets), parts, strict=True):
                if parameter is not None:
                    parameter.data = torch.from_numpy(part)
    return made


@pytest.fixture(scope="module")
def universal() -> ir.Model:
    with torch.device("meta"):
        return export_universal(quantised(ROWS))


@pytest.fixture(scope="module")
def load(model):
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return lambda name: tensors[name].detach()


@pytest.fixture(scope="module", params=list(UNITS))
def written(request, universal, load, tmp_path_factory):
    """(dtype, the ONNX file) without plugins."""
    lowered = lower(universal, request.param, ROWS, ())
    lint(lowered.model)
    return request.param, write_onnx(tmp_path_factory.mktemp(request.param), lowered, load)


def test_codes_are_signed_constants_that_nothing_but_their_dequantising_reads(universal):
    lowered = lower(universal, "float16", ROWS)
    initialisers = lowered.model.graph.initializers
    types = {name: (value.dtype.name, list(value.shape)) for name, value in initialisers.items() if "codes" in name}
    layer = "model.layers.0"
    assert types[f"{layer}.self_attn.q_proj.codes"] == ("INT4", [64, 64])
    assert types[f"{layer}.mlp.up_proj.codes"] == ("INT8", [96, 64])
    assert types[f"{layer}.mlp.down_proj.codes"] == ("INT8", [64, 96])
    for name in types:
        assert [use.node.op_type for use in initialisers[name].uses()] == ["DequantizeLinear"], name
    count = Counter(node.op_type for node in lowered.model.graph)
    assert count["DequantizeLinear"] == 7 * 2 + 1
    assert count["QLinear"] == count["QEmbedding"] == 0


def test_products_of_the_same_activations_share_their_block_sums(universal):
    model = lower(universal, "float16", ROWS).model
    count = Counter(node.op_type for node in model.graph)
    assert count["ReduceSum"] == 2 * 2, "q and k, and o; v, gate, up and down have no offsets"


def test_what_they_became_is_said(universal):
    forms = "4 bits, blocks of 32; 4 bits, blocks of 32, offsets; 8 bits, blocks of 32; 8 bits, blocks of 32, offsets"
    assert lower(universal, "bfloat16", ROWS).weights.classes == {
        "linear": forms,
        "embedding": "bfloat16, dequantised",
    }


def test_the_universal_graph_is_left_as_it_was(universal):
    before = ir.to_proto(universal).SerializeToString(deterministic=True)
    lower(universal, "float16", ROWS)
    assert ir.to_proto(universal).SerializeToString(deterministic=True) == before


def test_the_file_holds_the_models_numbers(written, model):
    """Codes are exact; what is rounded are scales, offsets and the table."""
    dtype, path = written
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, BlockQuantizedWeight):
            continue
        wanted = dequantize(
            module.codes, module.scales, module.offsets, module.form.bits, module.form.block_size
        ).numpy()
        if isinstance(module, QEmbedding):
            table = held["lm_head.weight"]  # the name under which the tied codes are exported
            np.testing.assert_array_equal(table, wanted.astype(NUMPY[dtype]))
            continue
        codes = held[f"{name}.codes"].astype(np.float32).reshape(*module.scales.shape, -1)
        scales = held[f"{name}.scales"].astype(np.float32)[..., None]
        offsets = held[f"{name}.offsets"].astype(np.float32)[..., None] if module.offsets is not None else 0
        found = (codes * scales + offsets).reshape(wanted.shape)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2 * UNITS[dtype] * np.abs(wanted).max())


@pytest.mark.parametrize("steps", SCENARIOS.values(), ids=SCENARIOS)
def test_the_graph_equals_the_eager_model(written, model, steps):
    """fp16 by ONNX Runtime, which has no bf16 on the CPU; bf16 by ONNX's reference."""
    dtype, path = written
    if dtype == "float16":
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Its own fusion of DequantizeLinear and MatMul would round the activations to 8 bits.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        run = ort.InferenceSession(path, options).run
    else:
        run = ReferenceEvaluator(onnx.load(path)).run
    error = feed_and_compare(lambda rows: Graph(lambda f: run(None, f), model, rows, NUMPY[dtype]), model, steps)
    print(f"{error / UNITS[dtype]:.2f} units")
    assert error < TOLERANCE * UNITS[dtype]


def test_a_table_beyond_float16_is_refused_by_name(universal, load, tmp_path):
    def large(name):
        return load(name) * 1e5 if name == "lm_head.scales" else load(name)

    with pytest.raises(BuildError, match=r"lm_head\.weight holds .*, more than float16 can: build with --dtype bf16"):
        write_onnx(tmp_path, lower(universal, "float16", ROWS, ()), large)


BLOCKS = Blocks("up_proj.codes", "up_proj.scales", None, Form(8, 2, offsets=False))


def test_eight_bit_blocks_get_positive_scales_and_stay_the_same_numbers():
    codes = torch.tensor([[0, 200, 128 - 127, 255, 130, 3], [1, 2, 128, 129, 130, 131]], dtype=torch.uint8)
    scales = torch.tensor([[0.5, -0.25, 0.0], [-1.0, 2.0, 1e-9]])
    signed, positive = with_positive_scales(BLOCKS, codes, scales, torch.float16)
    assert signed.dtype == torch.int8
    assert (positive.half() > 0).all()
    wanted = dequantize(codes, scales.half().float(), None, 8, 2)
    found = dequantize((signed.view(torch.uint8) ^ 0x80), positive, None, 8, 2)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_a_code_that_has_no_opposite_is_refused_under_a_negative_scale():
    codes = torch.tensor([[0, 1]], dtype=torch.uint8)
    with_positive_scales(BLOCKS, codes, torch.tensor([[0.5]]), torch.float16)
    with pytest.raises(BuildError, match=r"up_proj\.codes has a code of -128 with a negative scale"):
        with_positive_scales(BLOCKS, codes, torch.tensor([[-0.5]]), torch.float16)


@needs_rtx
def test_tensorrt_takes_them_and_keeps_them_quantised(written, tmp_path):
    path = written[1]
    report = build_plan(
        path,
        tmp_path,
        target="tensorrt-rtx",
        capabilities=(80, 86, 89, 120),
        profiles=make_profiles(LIMITS),
        kernel_cache=tmp_path,
    )
    assert report.layers["DEQUANTIZE"] == 7 * 2 + 1
    assert report.warnings == ()
    assert report.layers["KV_CACHE_UPDATE"] == 4


@needs_rtx
def test_the_target_says_what_it_holds_them_in(universal, load, tmp_path):
    options = PlanOptions("tensorrt-rtx", "float16", (80,), ())
    target = add_target(tmp_path, universal, load, LIMITS, Parity(status="off"), options)
    assert target.quantization["embedding"] == "float16, dequantised"
    assert target.quantization["linear"].startswith("4 bits, blocks of 32; ")


def test_the_dry_run_counts_codes_as_bytes_and_the_table_in_16_bits():
    with torch.device("meta"):
        model, floats = quantised(ROWS), Llama(TWO_LAYERS, ROWS)
    found = make_device_plan(model, LIMITS, "tensorrt-rtx-builtin").weights
    codes = sum(p.numel() * (1 if p.dtype == torch.uint8 else 2) for p in model.parameters())
    table = TWO_LAYERS.vocab_size * TWO_LAYERS.hidden_size * 2
    assert found - codes - table == sum(4 * t.numel() for t in {id(t): t for t in model.buffers()}.values())
    assert found < make_device_plan(floats, LIMITS, "tensorrt-rtx-builtin").weights
