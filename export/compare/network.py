"""What a graph computes, as names: its values, what each is made of, and where in the model it lies.

The traced program, the universal graph and a lowered graph are read into the same form, so that their values can be
paired. Knows no numbers.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import onnx
import torch

from ...runtime import contract
from ..functions import DOMAIN, MARKERS

_LAYER = re.compile(r"^(.*?\.(\d+))(?:\.|$)")
_OF_CACHE = re.compile(r"layer_\d+\.cache\.")  # names of the numbers by which a cache in int8 is rounded
_LINEAR = ("MatMul", "FusedMatMul", "Gemm", "QLinear", "MatMulNBits")
_LEAVES = (
    "Linear",
    "Embedding",
    "RmsNorm",
    "QRmsNorm",
    "QLinear",
    "QEmbedding",
)  # markers that are a module of their own
_SKIP_NORMS = ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")
_SETTINGS = {  # attribute -> the markers' name for it
    **{name: name for name in ("eps", "interleaved", "scale", "softcap", "window")},
    "epsilon": "eps",
    "rotary_interleaved": "interleaved",
    "local_window_size": "window",
}
_TORCH_NAMES = {"linear": "Linear", "embedding": "Embedding", "add": "Add", "mul": "Mul", "silu": "SiLU"}


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor of a graph.

    operator: what the graph runs to make it. marker: what the model's definition calls that. sources: the values and
    inputs that it is made of. weights: the parameters and tables that it reads. module: path of the module, as far as
    it can be told. node: which node makes it; values of one node share it.
    """

    name: str
    operator: str
    marker: str
    sources: tuple[str, ...]
    weights: tuple[str, ...]
    module: str
    node: int
    settings: Mapping[str, float] = field(default_factory=dict)

    @property
    def layer(self) -> int | None:
        """The number in the module's path."""
        found = _LAYER.match(self.module)
        return int(found[2]) if found else None


@dataclass(frozen=True, slots=True)
class Network:
    """The values in the order in which they are computed; outputs bear the contract's names."""

    values: dict[str, Value]
    outputs: tuple[str, ...]
    order: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.order.update({name: place for place, name in enumerate(self.values)})

    def between(self, names: Iterable[str], known: Iterable[str]) -> tuple[list[Value], set[str]]:
        """(the values from which `names` are made of `known` ones, in order and `names` included; the known ones)."""
        wanted = list(names)
        inside: set[str] = set()
        edge: set[str] = set()
        known = set(known)
        while wanted:
            name = wanted.pop()
            if name in inside or name not in self.values:
                continue
            inside.add(name)
            for source in self.values[name].sources:
                (edge.add if source in known else wanted.append)(source)
        return sorted((self.values[name] for name in inside), key=lambda v: self.order[v.name]), edge

    def computed(self, names: Iterable[str], known: Iterable[str]) -> list[Value]:
        """As `between`, without what only prepares indices: lengths, positions, shapes."""
        known = set(known)
        values, live = self.between(names, known)[0], set()
        for value in values:
            if any(source in known or source in live or source.startswith("past_") for source in value.sources):
                live.add(value.name)
        return [value for value in values if value.name in live] or values

    def readers(self, name: str) -> list[Value]:
        """The values made of `name`."""
        return [value for value in self.values.values() if name in value.sources]


def of_program(program: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]) -> Network:
    """Read a traced program.

    Args:
        program: from `universal.trace`.
        inputs: the contract's names of its user inputs, in order.
        outputs: the contract's names of its user outputs, in order.
    """
    names = program_names(program, inputs, outputs)
    signature = program.graph_signature
    weights = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    markers = {op: marker.name for marker in MARKERS for op in marker.translations}
    values: dict[str, Value] = {}
    for index, node in enumerate(program.graph.nodes):
        if node.op != "call_function":
            continue
        parents = [parent for parent in node.all_input_nodes if isinstance(parent, torch.fx.Node)]
        target: Any = node.target
        made_by = parents[0] if target.__name__ == "getitem" else node
        operator = getattr(made_by.target, "_opname", None) or str(made_by.target).rpartition(".")[2]
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = stack[-1][0] if stack and str(stack[-1][0]).startswith("inner") else ""
        values[names[node.name]] = Value(
            name=names[node.name],
            operator=operator,
            marker=markers.get(made_by.target, _TORCH_NAMES.get(operator, operator)),
            sources=tuple(names[p.name] for p in parents if p.name not in weights),
            weights=tuple(weights[p.name].removeprefix("inner.") for p in parents if p.name in weights),
            module=str(path).removeprefix("inner").removeprefix("."),
            node=index,
            settings=_settings_of_call(made_by),
        )
    return Network(values, tuple(outputs))


def program_names(
    program: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]
) -> dict[str, str]:
    """Name of a node -> the name that the contract or the universal graph has for its value."""
    signature = program.graph_signature
    names = {node.name: node.name for node in program.graph.nodes}
    names |= dict(zip(signature.user_inputs, inputs, strict=True))
    return names | dict(zip(signature.user_outputs, outputs, strict=True))


def of_onnx(graph: onnx.GraphProto) -> Network:
    """Read a universal or lowered graph."""
    weights: dict[str, tuple[str, ...]] = {i.name: (i.name,) for i in graph.initializer}
    past = {
        contract.state_names(layer, kind)[0]: layer for layer in range(len(graph.input)) for kind in ("key", "value")
    }
    values: dict[str, Value] = {}
    for index, node in enumerate(graph.node):
        branches = _branches(node)
        reads = [name for name in (*node.input, *_captured(branches)) if name]
        if all(name in weights for name in reads):  # made of weights only: a transposed or converted weight
            weights |= {name: tuple(w for read in reads for w in weights[read]) for name in node.output}
            continue
        own = tuple(w for name in reads if name in weights for w in weights[name])
        sources = tuple(name for name in reads if name not in weights)
        marker, operator = _marker(node, own), str(node.op_type)
        if branches:  # a choice between ways to compute one thing
            operator = " + ".join(dict.fromkeys(inner.op_type for inner in branches[0].node))
        parent = values.get(sources[0]) if len(sources) == 1 else None
        bias = node.op_type == "Add" and own and not any(_OF_CACHE.match(name) for name in own)
        if bias and parent is not None and parent.marker == "Linear":
            marker, own, sources = "Linear", parent.weights + own, parent.sources
            operator = f"{parent.operator} + Add"
        layers = [past[name] for name in sources if name in past]
        parents = [values[name] for name in sources if name in values]
        module = _module(marker, own, parents, layers, values)
        for place, name in enumerate(node.output):
            if name:
                value = Value(name, operator, marker, sources, own, module, index, _settings_of_node(node))
                if node.op_type in _SKIP_NORMS and place == 3:
                    value = replace(value, marker="Add", module=_module("Add", (), parents, layers, values))
                values[name] = value
    logits = values.get(contract.LOGITS)
    if logits is not None and logits.marker == "Linear":  # a tied head has one name for two modules
        values[contract.LOGITS] = replace(logits, module="lm_head")
        for value in values.values():
            if value.marker == "Embedding" and set(value.weights) & set(logits.weights):
                values[value.name] = replace(value, module="embed_tokens")
    return Network(values, tuple(output.name for output in graph.output))


def _settings_of_call(node: torch.fx.Node) -> dict[str, float]:
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return {name: float(v) for name, v in given.items() if name in _SETTINGS.values() and isinstance(v, int | float)}


def _settings_of_node(node: onnx.NodeProto) -> dict[str, float]:
    found = {}
    inner = [attribute for branch in _branches(node) for part in branch.node for attribute in part.attribute]
    for attribute in (*node.attribute, *inner):
        if attribute.name in _SETTINGS:
            value = attribute.f if attribute.type == onnx.AttributeProto.FLOAT else attribute.i
            found[_SETTINGS[attribute.name]] = max(0.0, value) if "window" in attribute.name else float(value)
    return found


def _branches(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]


def _captured(branches: Sequence[onnx.GraphProto]) -> list[str]:
    """What subgraphs read of the graph around them."""
    made = {name for branch in branches for node in branch.node for name in node.output}
    read = dict.fromkeys(name for branch in branches for node in branch.node for name in node.input)
    return [name for name in read if name not in made]


def _marker(node: onnx.NodeProto, weights: Sequence[str]) -> str:
    if node.domain == DOMAIN:
        return str(node.op_type)
    if weights and node.op_type in _LINEAR:
        return "Linear"
    if weights and node.op_type == "Gather":
        return "Embedding"
    if node.op_type in (*_SKIP_NORMS, "SimplifiedLayerNormalization"):
        return "RmsNorm"
    return str(node.op_type)


def _module(
    marker: str, weights: Sequence[str], sources: Sequence[Value], layers: Sequence[int], values: dict[str, Value]
) -> str:
    """The module of a node: of its own weights, else what the modules of its sources in the last layer share."""
    if weights and marker in _LEAVES:
        modules = sorted({weight.removesuffix(".packed").rpartition(".")[0] for weight in weights})
        return modules[0] if not weights[0].endswith(".packed") else modules[0].rpartition(".")[0]
    if layers:  # a state says the layer, but not what the layer's path is
        known = [block for value in values.values() if (block := _block(value.module))]
        same = [block for block in known if block.endswith(f".{layers[0]}")]
        sources = [value for value in sources if value.layer == layers[0]]
        if not sources:
            return same[0] if same else ""
    last = max((value.layer for value in sources if value.layer is not None), default=None)
    parents = [
        value.module.rpartition(".")[0] if value.marker in _LEAVES else value.module
        for value in sources
        if value.layer == last and value.module
    ]
    module = _shared(parents)
    return _block(module) or module if marker == "Add" else module


def _shared(paths: Sequence[str]) -> str:
    """The longest path that all begin with."""
    columns = zip(*(path.split(".") for path in paths), strict=False)
    same = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
    return ".".join(column[0] for column in same)


def _block(module: str) -> str:
    """The path up to the layer's number; "" outside the layers."""
    found = _LAYER.match(module)
    return found[1] if found else ""
