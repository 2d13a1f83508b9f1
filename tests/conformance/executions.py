"""The executions of a case: eager torch, the ONNX bodies on two runtimes, the ONNX Runtime lowering.

Each takes a case whose inputs have their final types and returns its results by name. None knows what is right.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from conformance.cases import DTYPES, STORED, Call, Case
from onnx import helper
from onnx.reference import ReferenceEvaluator

from zonda.export.functions import DOMAIN, MARKERS, VERSION
from zonda.export.lower.onnxruntime import lower
from zonda.export.universal import IR_VERSION
from zonda.models import ops
from zonda.runtime.engines.ort import onnxruntime as ort

Results = dict[str, np.ndarray]
Tensors = Sequence[Any]

BY_NAME = {marker.name: marker for marker in MARKERS}


def _rope(inputs: Tensors, a: dict[str, Any]) -> Tensors:
    q, k, cos, sin, positions = inputs
    interleaved = bool(a["interleaved"])
    if k is None:
        return (ops.rope_single(q, cos, sin, positions, a["num_heads"], interleaved),)
    return ops.rope(q, k, cos, sin, positions, a["num_heads"], a["num_key_value_heads"], interleaved)


def _cached_attention(inputs: Tensors, a: dict[str, Any]) -> Tensors:
    return (ops.cached_attention(*inputs, a["num_heads"], a["scale"], a["window"], a["softcap"]),)


def _moe(inputs: Tensors, a: dict[str, Any]) -> Tensors:
    swiglu = (a["alpha"], a["beta"], a["limit"])
    return (ops.moe(*inputs, a["top_k"], bool(a["normalize"]), *swiglu),)


EAGER: dict[str, Callable[[Tensors, dict[str, Any]], Tensors]] = {
    "Add": lambda inputs, _: (inputs[0] + inputs[1],),
    "RmsNorm": lambda inputs, a: (ops.rms_norm(*inputs, a["eps"]),),
    "QRmsNorm": lambda inputs, a: (ops.q_rms_norm(*inputs, a["eps"]),),
    "RoPE": _rope,
    "KvCacheUpdate": lambda inputs, _: (ops.kv_cache_update(*inputs),),
    "CachedAttention": _cached_attention,
    "QLinear": lambda inputs, a: (ops.q_linear(*inputs, a["bits"], a["block_size"]),),
    "MoE": _moe,
    "QEmbedding": lambda inputs, a: (ops.q_embedding(*inputs, a["bits"], a["block_size"]),),
}
"""Operator of a call -> its torch op: inputs as tensors and None, attributes by ONNX name."""


def eager(case: Case) -> Results:
    """The torch ops, one after the other."""
    values = {name: None if array is None else _tensor(array) for name, array in case.inputs.items()}
    for call in case.calls:
        outputs = EAGER[call.operator]([values[name] for name in call.inputs], _attributes(case, call))
        values |= dict(zip(call.outputs, outputs, strict=True))
    return {name: _array(values[name]) for name in case.results}


def onnxruntime_body(case: Case) -> Results:
    """The universal graph as it is, its bodies included, on ONNX Runtime."""
    return _run(_session(universal(case).SerializeToString()), case)


def onnx_evaluator(case: Case) -> Results:
    """The universal graph on onnx's own reference evaluator: the letter of the standard, and bfloat16 too."""
    evaluator = _evaluator(universal(case).SerializeToString())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what overflows is compared, and found, afterwards
        return dict(zip(case.results, evaluator.run(list(case.results), _feed(case)), strict=True))


def onnxruntime_lowering(case: Case) -> Results:
    """The graph lowered to ONNX Runtime's fused operators: what a bundle serves with."""
    return _run(_session(lowered(case).SerializeToString()), case)


EXECUTIONS: dict[str, Callable[[Case], Results]] = {
    "eager": eager,
    "onnxruntime-body": onnxruntime_body,
    "onnx-evaluator": onnx_evaluator,
    "onnxruntime-lowering": onnxruntime_lowering,
}
"""One entry an execution; each needs a cell in every row of `matrix.ROWS`."""


def universal(case: Case) -> onnx.ModelProto:
    """The case as a universal graph: every marker a node of domain `zonda` with the body that fits its inputs."""
    nodes, functions = [], {}
    for call in case.calls:
        names = ["" if case.inputs.get(name, ...) is None else name for name in call.inputs]
        while not names[-1]:
            names.pop()
        if call.operator not in BY_NAME:
            nodes.append(helper.make_node(call.operator, names, call.outputs))
            continue
        overload = BY_NAME[call.operator].select([bool(name) for name in names])
        functions[call.operator, overload] = _body(call.operator, overload)
        node = helper.make_node(call.operator, names, call.outputs, domain=DOMAIN, **_attributes(case, call))
        node.overload = overload
        nodes.append(node)
    given = {name: array for name, array in case.inputs.items() if array is not None}
    floats = (array.dtype for array in given.values() if array.dtype in DTYPES.values())
    float_type = helper.np_dtype_to_tensor_dtype(next(floats))
    graph = helper.make_graph(
        nodes,
        "case",
        [_declare(case, name, array) for name, array in given.items() if name not in STORED],
        [helper.make_tensor_value_info(name, float_type, None) for name in case.results],
        [onnx.numpy_helper.from_array(array, name) for name, array in given.items() if name in STORED],
    )
    imports = [helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, opset_imports=imports, functions=list(functions.values()), ir_version=IR_VERSION)


def lowered(case: Case) -> onnx.ModelProto:
    """The universal graph after `lower`."""
    return ir.serde.serialize_model(lower(ir.serde.deserialize_model(universal(case))).model)


def operator_of(node: onnx.NodeProto) -> str:
    """The node's operator; with its domain where a runtime's operator bears a marker's name."""
    foreign = node.op_type in BY_NAME and node.domain != DOMAIN
    return f"{node.domain}.{node.op_type}" if foreign else node.op_type


def _attributes(case: Case, call: Call) -> dict[str, Any]:
    marker = BY_NAME.get(call.operator)
    return {name: case.attributes[name] for name in marker.attributes} if marker else {}


def _body(name: str, overload: str) -> onnx.FunctionProto:
    body = BY_NAME[name].bodies[overload].to_function_proto()
    body.domain, body.name, body.overload = DOMAIN, name, overload
    return body


def _declare(case: Case, name: str, array: np.ndarray) -> onnx.ValueInfoProto:
    shape = case.shapes.get(name, [f"{name}_{axis}" for axis in range(array.ndim)])
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), shape)


@functools.lru_cache(maxsize=512)
def _session(model: bytes) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what it would log as an error is an exception already
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@functools.lru_cache(maxsize=512)
def _evaluator(model: bytes) -> ReferenceEvaluator:
    return ReferenceEvaluator(onnx.load_from_string(model))


def _run(session: Any, case: Case) -> Results:
    wanted = {value.name for value in session.get_inputs()}
    feed = {name: array for name, array in _feed(case).items() if name in wanted}
    return dict(zip(case.results, session.run(list(case.results), feed), strict=True))


def _feed(case: Case) -> Results:
    return {name: array for name, array in case.inputs.items() if array is not None and name not in STORED}


def _tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(array)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().numpy().astype(DTYPES["bfloat16"]) if tensor.dtype == torch.bfloat16 else tensor.numpy()
