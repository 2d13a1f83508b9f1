"""The very ONNX that TensorRT is given, run on the CPU, computes what the eager model computes.

ONNX's reference evaluator runs the standard operators, Triton's interpreter the kernels of the plugin nodes. Nothing
here says how TensorRT itself rounds; it says that the graph and the kernels are right.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from unittest import mock

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from narrow_graphs import NUMPY, ROWS, TOLERANCE, UNITS, Graph, feed_and_compare
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from support import SCENARIOS, random_with_quantised_norm, with_quantised_norm

from zonda.export.lower.tensorrt import lower, parse_plugins
from zonda.export.tensorrt_build import write_onnx
from zonda.export.universal import export_universal
from zonda.models.llama import Llama
from zonda.plugins_trt import PLUGINS
from zonda.runtime import contract
from zonda.runtime.engines.ort import onnxruntime as ort

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install -e '.[plugins]'"
)


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_with_quantised_norm(ROWS)


@pytest.fixture(scope="module")
def universal():
    with torch.device("meta"):
        return export_universal(with_quantised_norm(ROWS))


@pytest.fixture(scope="module")
def interpret():
    """`interpret(marker, tensors)` in a process that never compiles."""
    from zonda.plugins_trt.kernels import interpreter

    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        yield lambda marker, tensors: pool.submit(interpreter.interpret, marker, tensors).result()


def to_torch(array: np.ndarray) -> torch.Tensor:
    array = array.copy()  # constants are read-only, and torch warns of that
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def plugin_operators(interpret) -> list[type[OpRun]]:
    """The plugin nodes as operators of the evaluator, that run the kernels and count it."""

    def operator(name: str) -> type[OpRun]:
        def run(self, *inputs, **attributes):
            values = {field.name: field.kind(attributes[field.name]) for field in PLUGINS[name].fields}
            outputs = interpret(PLUGINS[name].create(values), [to_torch(array) for array in inputs])
            return tuple(to_numpy(tensor) for tensor in outputs)

        return type(name, (OpRun,), {"op_domain": "zonda", "_run": run})

    return [operator(name) for name in PLUGINS]


@pytest.fixture(scope="module", params=list(UNITS))
def evaluator(request, universal, model, interpret, tmp_path_factory):
    """(dtype, run) of the graph with all plugins."""
    folder = tmp_path_factory.mktemp(request.param)
    tensors = dict(model.state_dict()) | dict(model.named_buffers(remove_duplicate=False))
    path = write_onnx(folder, lower(universal, request.param, ROWS), tensors.__getitem__)
    reference = ReferenceEvaluator(onnx.load(path), new_ops=plugin_operators(interpret))
    return request.param, lambda feed: reference.run(None, feed)


@pytest.mark.parametrize("steps", SCENARIOS.values(), ids=SCENARIOS)
def test_the_graph_with_interpreted_kernels_equals_the_eager_model(evaluator, model, steps):
    dtype, run = evaluator
    error = feed_and_compare(lambda rows: Graph(run, model, rows, NUMPY[dtype]), model, steps)
    assert error < TOLERANCE * UNITS[dtype]


@pytest.fixture(scope="module")
def session(universal, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("none")
    tensors = dict(model.state_dict()) | dict(model.named_buffers(remove_duplicate=False))
    path = write_onnx(folder, lower(universal, "float16", ROWS, parse_plugins("none")), tensors.__getitem__)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # it says at every step that the cache was not bound in place
    return ort.InferenceSession(path, options)


@pytest.mark.parametrize("steps", SCENARIOS.values(), ids=SCENARIOS)
def test_the_graph_without_plugins_on_onnx_runtime_equals_the_eager_model(session, model, steps):
    def run(feed):
        return session.run(None, feed)

    error = feed_and_compare(lambda rows: Graph(run, model, rows, np.float16), model, steps)
    assert error < TOLERANCE * UNITS["float16"]


def test_the_tolerance_is_not_blind(evaluator, model):
    """A position that is one too high for RoPE and mask alike moves the logits by more."""
    dtype, run = evaluator

    def shifted(feed):
        return run(
            feed
            | {contract.START_OFFSETS_KERNEL: feed[contract.START_OFFSETS_KERNEL] + (feed["input_lens"] > 1)[:, None]}
        )

    error = feed_and_compare(
        lambda rows: Graph(shifted, model, rows, NUMPY[dtype]), model, SCENARIOS["continuation after decode"]
    )
    assert error > 2 * TOLERANCE * UNITS[dtype]
