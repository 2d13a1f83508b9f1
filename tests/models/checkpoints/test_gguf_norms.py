"""A GGUF whose norms are in blocks: QRmsNorm from the file to the logits, and what stays in floats."""

from importlib.util import find_spec
from types import SimpleNamespace

import gguf
import numpy as np
import onnx
import pytest
import torch
from checkpoint_files import LAYERS, weights, write_model
from conftest import build_quietly
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from gguf_models import IDS, ROWS, STEPS, build, dequantised_logits, largest
from support import RELATIVE_TOLERANCE, Eager, PlainOnnx, export_graphs, run_scenario

from zonda import CheckpointError
from zonda.export import onnx_files
from zonda.export.proof import run_eager
from zonda.models import layers
from zonda.models.checkpoints import open_checkpoint
from zonda.models.checkpoints.base import TensorInfo
from zonda.models.gemma import OffsetRmsNorm
from zonda.models.loading import load_weights, match_parameters
from zonda.models.quantization import Form
from zonda.models.quantize import count_weights, quantize_norms, tensor_classes
from zonda.plugins_trt import CubinLibrary
from zonda.runtime.bundle import open_bundle

HIDDEN = 64
NORM = "model.norm.weight"


def gains() -> dict[str, np.ndarray]:
    """GGUF's name -> the gain of every norm; their spread is wide enough for each block to have a scale of its own."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    vectors = [name for name, array in weights(HIDDEN).items() if array.ndim == 1]
    random = np.random.default_rng(5)
    return {names.get_name(n, (".weight",)): random.normal(1, 0.3, HIDDEN).astype(np.float32) for n in vectors}


def write_with_norms(path, kind: Type = Type.Q8_0):
    vectors = gains()
    extra = {name: (quantize(gain, kind), kind) for name, gain in vectors.items()}
    return write_model(path, extra=extra, drop=list(vectors), hidden=HIDDEN)


def build_quantised(checkpoint):
    module = build(checkpoint)
    assert quantize_norms(module, checkpoint) == []
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(write_with_norms(tmp_path_factory.mktemp("gguf") / "model.gguf"))


@pytest.fixture(scope="module")
def wanted(checkpoint):
    """Logits of the model with dequantised gains."""
    return dequantised_logits(checkpoint)


@pytest.fixture(scope="module")
def exact(checkpoint):
    """The same in float64: torch's float32 is up to 1.7e-5 of the largest off, the graphs' 5e-6."""
    return dequantised_logits(checkpoint, torch.float64)


def test_codes_and_scales_are_the_files_own(checkpoint):
    blocks = checkpoint.blocks(NORM)
    assert (blocks.shape, blocks.form) == ((HIDDEN,), Form(8, 32, offsets=False))
    stored = quantize(gains()["output_norm.weight"], Type.Q8_0).reshape(-1, 34)
    gain = blocks.as_gain()
    np.testing.assert_array_equal(gain.codes.numpy(), stored[:, 2:].view(np.int8))
    np.testing.assert_array_equal(gain.scales.numpy(), stored[:, :2].copy().view(np.float16)[:, 0].astype(np.float32))
    values = (gain.codes.float() * gain.scales[:, None]).flatten()
    np.testing.assert_array_equal(values.numpy(), dequantize(stored.reshape(-1), Type.Q8_0))
    torch.testing.assert_close(values, blocks.dequantize(), rtol=0, atol=0)
    torch.testing.assert_close(values, checkpoint.load(NORM), rtol=0, atol=0)


def test_every_norm_becomes_a_q_rms_norm(checkpoint):
    module = build_quantised(checkpoint)
    norms = [part for part in module.modules() if isinstance(part, layers.RmsNorm | layers.QRmsNorm)]
    assert [type(part) for part in norms] == [layers.QRmsNorm] * (2 * LAYERS + 1)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert match_parameters(module, checkpoint)["model.norm.codes"] == NORM
    assert count_weights(module) == count_weights(build(checkpoint))
    assert tensor_classes(module)["norm"] == "8 bits, blocks of 32"


def test_eager_logits_are_those_of_the_dequantised_model(checkpoint, wanted):
    model = build_quantised(checkpoint).eval()
    load_weights(model, checkpoint)
    for got, want in zip(run_scenario(Eager(model, 2, ROWS), IDS, STEPS), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * largest(wanted))


def test_streamed_from_the_checkpoint_the_logits_are_the_same(checkpoint):
    module = build_quantised(checkpoint)
    source = onnx_files.tensor_source(module, checkpoint, match_parameters(module, checkpoint))
    golden = run_eager(module, source, [IDS[0, :5]])
    model = build_quantised(checkpoint).eval()
    load_weights(model, checkpoint)
    positions = np.arange(5)[None]
    logits = Eager(model, 1, 5).step(IDS[:1, :5], np.zeros(1, np.int32), np.array([5], np.int32), positions)
    np.testing.assert_array_equal(golden.logits, logits[0])


def test_both_graphs_compute_the_same_and_the_lowered_one_by_onnx_runtimes_norms(checkpoint, exact, tmp_path):
    module = build_quantised(checkpoint)
    load = onnx_files.tensor_source(module, checkpoint, match_parameters(module, checkpoint))
    export_graphs(tmp_path, lambda _: build_quantised(checkpoint), load, ROWS)
    onnx_files.check(tmp_path)
    for file in (onnx_files.UNIVERSAL, onnx_files.LOWERED):
        runner = PlainOnnx(tmp_path / file, module.kv_shapes, 2, ROWS)
        for got, want in zip(run_scenario(runner, IDS, STEPS), exact, strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=RELATIVE_TOLERANCE * largest(exact))
    operators = [node.op_type for node in onnx.load(tmp_path / onnx_files.LOWERED, load_external_data=False).graph.node]
    assert "QRmsNorm" not in operators
    assert operators.count("DequantizeLinear") == 2 * LAYERS + 1
    assert operators.count("SkipSimplifiedLayerNormalization") == 2 * LAYERS


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed: pip install -e '.[rtx]'")
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: pip install -e '.[plugins]'")
def test_the_bundle_and_its_plan_hold_them(tmp_path):
    """Every QRmsNorm node became our plugin in a plan for four architectures, or the worker would have refused it."""
    path = build_quietly(
        write_with_norms(tmp_path / "model.gguf"),
        tmp_path / "bundle",
        targets=("onnxruntime", "tensorrt-rtx"),
        compute_capabilities=(80, 86, 89, 120),
        max_batch=2,
        max_chunk=16,
    )
    bundle = open_bundle(path, full=True)
    ort, rtx = bundle.manifest.targets
    assert bundle.manifest.quantization["norm"] == "8 bits, blocks of 32"
    assert ort.parity.status == "passed"
    assert bundle.manifest.universal.status == "passed"
    assert rtx.plugins == {"QRmsNorm": 2 * LAYERS + 1, "RoPE": LAYERS}
    library = CubinLibrary.from_bytes(bundle.file(rtx.kernels).read_bytes())
    library.require((80, 86, 89, 120))
    assert {variant.kernel for variant in library.variants} == {"q_rms_norm", "rope"}


def test_gains_of_four_bits_stay_in_floats_and_are_named(tmp_path):
    checkpoint = open_checkpoint(write_with_norms(tmp_path / "m.gguf", Type.Q4_0))
    module = build(checkpoint)
    assert NORM in quantize_norms(module, checkpoint)
    assert type(module.model.norm) is layers.RmsNorm
    load_weights(module, checkpoint)


def test_gains_in_floats_are_left_alone(tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf"))
    module = build(checkpoint)
    assert quantize_norms(module, checkpoint) == []
    assert type(module.model.norm) is layers.RmsNorm


def test_a_gain_that_is_a_sum_stays_in_floats_and_is_named():
    """Gemma multiplies by offset + weight: codes and scales of the weight are not those of the gain."""
    model = torch.nn.ModuleDict({"norm": OffsetRmsNorm(64, 1e-6, 1.0)})
    info = TensorInfo((64,), torch.float32, "Q8_0", Form(8, 32, offsets=False))
    assert quantize_norms(model, SimpleNamespace(tensors={"norm.weight": info})) == ["norm.weight"]
    assert type(model["norm"]) is OffsetRmsNorm


def test_a_scale_that_is_no_finite_number_is_an_error(tmp_path):
    row = quantize(np.ones(HIDDEN, np.float32), Type.Q8_0)
    row[:2] = np.float16([np.inf]).view(np.uint8)
    path = write_model(
        tmp_path / "m.gguf", extra={"output_norm.weight": (row, Type.Q8_0)}, drop=["output_norm.weight"], hidden=HIDDEN
    )
    checkpoint = open_checkpoint(path)
    module = build(checkpoint)
    quantize_norms(module, checkpoint)
    with pytest.raises(
        CheckpointError, match=r"output_norm\.weight has a scale or minimum that is not a finite number"
    ):
        load_weights(module, checkpoint)
