"""The universal ONNX: one graph a model, every marker one node with a body, dynamic batch, sequence and capacity.

The model is exported without weights (on the meta device), so its size does not matter here; `weights.py` lays the
data out afterwards. Nothing in this file knows a target.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import onnxscript.optimizer
import torch
from torch import Tensor, nn

from ..models.architecture import CausalModel
from ..models.cache import Cache
from ..runtime import contract
from .functions import DOMAIN, MARKERS, register_schemas

IR_VERSION = 11  # the first in which an IR reader must know function overloads and opset 24


class _ContractModule(nn.Module):
    """The model with its cache as flat inputs and outputs, in the order of the contract."""

    def __init__(self, model: CausalModel) -> None:
        super().__init__()
        self.inner = model

    def forward(
        self,
        input_ids: Tensor,
        seqlen_offsets: Tensor,
        start_offsets_kernel: Tensor,
        input_lens: Tensor,
        logit_positions: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        cache = Cache.of(past)
        logits = self.inner(input_ids, seqlen_offsets, start_offsets_kernel, input_lens, logit_positions, cache)
        return logits, *cache.tensors()


def export_universal(model: CausalModel) -> ir.Model:
    """Export `model` to the graph contract.

    Args:
        model: a registered architecture's module, built under `torch.device("meta")`; it has `kv_shapes` and the
            forward signature of docs/architecture.md.

    Returns:
        The graph; parameters are initialisers named as in `model.state_dict()`, without data.
    """
    register_schemas(MARKERS)
    program = _run_exporter(model).model
    graph = program.graph
    for value in graph.initializers.values():
        if value.name is not None and value.name.startswith("inner."):
            value.const_value = None
    with _quiet():
        onnxscript.optimizer.optimize_ir(program)
    for value in [v for v in graph.initializers.values() if v.const_value is None]:
        value.name = str(value.name).removeprefix("inner.")
    _attach_bodies(program)
    _forget_origins(program)
    _name_nodes(program)
    program.ir_version = IR_VERSION
    program.producer_name, program.producer_version = "zonda", None
    return program


def trace(model: CausalModel) -> torch.export.ExportedProgram:
    """The traced program that the universal graph is made of; its nodes bear the names of the graph's values.

    Args:
        model: as of `export_universal`.
    """
    register_schemas(MARKERS)
    program = _run_exporter(model).exported_program
    if program is None:
        raise AssertionError("torch.onnx.export kept no program")
    return program


def _run_exporter(model: CausalModel) -> torch.onnx.ONNXProgram:
    batch, sequence, capacity, num_logits = 2, 3, 8, 4  # distinct, so that no two dimensions are taken for one

    def example(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device="meta")

    past, states = [], []
    for layer, shape in enumerate(model.kv_shapes):
        for kind, dim in (("key", shape.key_dim), ("value", shape.value_dim)):
            past.append(example(batch, shape.num_key_value_heads, capacity, dim, dtype=torch.float32))
            states.append(contract.state_names(layer, kind))
    sizes = {
        contract.BATCH: batch,
        contract.SEQUENCE: sequence,
        contract.NUM_LOGITS: num_logits,
    }
    dims = {name: torch.export.Dim(name) for name in (*sizes, contract.CAPACITY)}
    inputs = [
        example(*(sizes[d] for d in shape), dtype=getattr(torch, dtype)) for dtype, shape in contract.INPUTS.values()
    ]
    dynamic = [{axis: dims[d] for axis, d in enumerate(shape)} for _, shape in contract.INPUTS.values()]
    with _quiet():
        program = torch.onnx.export(
            _ContractModule(model).eval(),
            (*inputs, past),
            dynamo=True,
            opset_version=24,
            optimize=False,
            verbose=False,
            dynamic_shapes=(*dynamic, [{0: dims[contract.BATCH], 2: dims[contract.CAPACITY]}] * len(past)),
            custom_translation_table={op: fn for marker in MARKERS for op, fn in marker.translations.items()},
            input_names=[*contract.INPUTS, *(name for name, _ in states)],
            output_names=[contract.LOGITS, *(name for _, name in states)],
        )
    if program is None:
        raise AssertionError("torch.onnx.export returned no program")
    return program


def _attach_bodies(program: ir.Model) -> None:
    """Give each marker node the overload that fits its inputs, and the model the bodies that are used."""
    markers = {marker.name: marker for marker in MARKERS}
    for node in program.graph:
        if node.domain == DOMAIN:
            marker = markers[node.op_type]
            overload = marker.select([value is not None for value in node.inputs])
            node.overload = overload
            if (DOMAIN, marker.name, overload) not in program.functions:
                body = ir.serde.deserialize_function(marker.bodies[overload].to_function_proto())
                body.name, body.overload = marker.name, overload
                for index, inner in enumerate(body):
                    inner.name = f"{marker.name}{overload and '_' + overload}_{index}_{inner.op_type}"
                program.functions[body.identifier()] = body


def _forget_origins(program: ir.Model) -> None:
    """Drop the exporter's notes on every node and value: they hold names and traces of the exporting process."""
    common_passes.ClearMetadataAndDocStringPass()(program)
    graph = program.graph
    outputs = (value for node in graph for value in node.outputs)
    for value in (*graph.inputs, *graph.initializers.values(), *outputs):
        value.metadata_props.clear()
        value.doc_string = None


def _name_nodes(program: ir.Model) -> None:
    """Name nodes by operator and place: short, unique, the same at every export."""
    for index, node in enumerate(program.graph):
        node.name = f"{node.op_type}_{index}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter says of its own internals; errors are exceptions and pass."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
