"""The ONNX bodies of QLinear and QEmbedding are their eager markers, on ONNX Runtime and in onnx.reference."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from zonda.export.functions import DOMAIN, VERSION
from zonda.export.functions.q_embedding import Q_EMBEDDING
from zonda.export.functions.q_linear import Q_LINEAR
from zonda.models import ops
from zonda.runtime.engines.ort import onnxruntime as ort

ROWS, COLUMNS = 7, 64


def run_ort(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options).run(None, feed)[0]


def run_reference(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> np.ndarray:
    return ReferenceEvaluator(model).run(None, feed)[0]


def one_node(marker, first: np.ndarray, stored: dict[str, np.ndarray], bits: int, block_size: int) -> onnx.ModelProto:
    """A model of one marker node with its body; `stored` are initialisers, as they are in a bundle."""
    overload = marker.select([True] * (1 + len(stored)))
    body = marker.bodies[overload].to_function_proto()
    body.name, body.overload = marker.name, overload
    names = ["first", *stored]
    node = helper.make_node(
        marker.name, names, ["y"], domain=DOMAIN, overload=overload, bits=bits, block_size=block_size
    )
    kind = helper.np_dtype_to_tensor_dtype(first.dtype)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("first", kind, [None] * first.ndim)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, functions=[body], opset_imports=opsets, ir_version=11)


@pytest.mark.parametrize("run", [run_ort, run_reference], ids=["onnxruntime", "reference"])
@pytest.mark.parametrize("with_offsets", [True, False], ids=["offsets", "symmetric"])
@pytest.mark.parametrize(("bits", "block_size"), [(4, 16), (4, 32), (8, 16), (8, 64)])
@pytest.mark.parametrize("marker", [Q_LINEAR, Q_EMBEDDING], ids=lambda marker: marker.name)
def test_body_is_the_marker(marker, bits, block_size, with_offsets, run):
    random = np.random.default_rng(0)
    blocks = (ROWS, COLUMNS // block_size)
    stored = {
        "codes": random.integers(0, 256, (ROWS, COLUMNS * bits // 8), np.uint8),
        "scales": random.normal(size=blocks).astype(np.float32),
    }
    if with_offsets:
        stored["offsets"] = random.normal(size=blocks).astype(np.float32)
    if marker is Q_LINEAR:
        first, op = random.normal(size=(2, 3, COLUMNS)).astype(np.float32), ops.q_linear
    else:
        first, op = random.integers(0, ROWS, (2, 3)), ops.q_embedding
    found = run(one_node(marker, first, stored, bits, block_size), {"first": first})
    tensors = [torch.from_numpy(array) for array in (first, *stored.values())]
    wanted = op(*tensors, *[None] * (4 - len(tensors)), bits, block_size).numpy()
    assert found.dtype == np.float32
    # sums of 64 products: float32 rounding, in an order of the runtime's own
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
