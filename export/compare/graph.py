"""An ONNX graph of the contract on plain ONNX Runtime, without Zonda's runtime: states are passed by hand.

States that the graph holds in int8 are floats outside it, as those of every subject.

Taps are the graph's own values as extra outputs. To compute values from another subject's, the graph is cut at each of
them: the value becomes an input for whoever reads it, and what the graph computes in its place an output. The changed
graphs live in memory and read the bundle's weight file where it lies; nothing is written.
"""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ... import BundleError
from ...runtime import contract
from ...runtime.engines.cache_forms import StateForm, read_forms
from ...runtime.engines.ort import onnxruntime as ort
from ...runtime.manifest import StateSpec
from ..onnx_files import CACHE_FORMS
from .network import Network, Value, of_onnx
from .steps import Step
from .subjects import Array, Kind, Output

_THREADS = 2
_LOCAL = "local:"  # before the name of a cut value: what the graph itself computes


class GraphSubject:
    """See `Tapped`."""

    def __init__(self, path: Path, kind: Kind, name: str = "") -> None:
        """Read the graph; its weights stay in their file.

        Args:
            path: `universal.onnx` or a lowered graph, with its weight file beside it, and that of an int8 cache.
            kind: which of them it is.
            name: for messages.

        Raises:
            BundleError: the graph is not there, or is not one of the contract.
        """
        self.kind: Kind = kind
        self.name = name or {"universal": "the universal graph", "lowered": "the lowered graph"}.get(kind, path.name)
        self._path = path
        try:
            self._model = onnx.load(path, load_external_data=False)
        except Exception as error:  # protobuf and the file system raise types of their own
            raise BundleError(f"{path} is not an ONNX graph: {error}") from error
        graph = self._model.graph
        self._inputs = {value.name: value.type.tensor_type for value in graph.input}
        layers = sum(name.startswith("past_key_values.") for name in self._inputs) // 2
        pairs = [contract.state_names(layer, kind) for layer in range(layers) for kind in ("key", "value")]
        if missing := [name for name, _ in pairs if name not in self._inputs]:
            raise BundleError(f"{path} does not obey the graph contract: it has no input {missing[0]}")
        self._pairs = pairs
        self._forms = self._read_forms()
        self._states: dict[str, Array] = {}
        self._sessions: dict[tuple[str, tuple[str, ...]], ort.InferenceSession] = {}

    @cached_property
    def network(self) -> Network:
        """See `Tapped`."""
        return of_onnx(self._model.graph)

    @property
    def windows(self) -> list[int]:
        """The attention windows of the graph's layers, those that have one."""
        found = []
        for node in self._model.graph.node:
            for attribute in node.attribute:
                if attribute.name in ("window", "local_window_size") and attribute.i > 0:
                    found.append(int(attribute.i))
        return found

    def reset(self, rows: int, capacity: int) -> None:
        """See `Subject`."""
        for past, present in self._pairs:
            kind = self._inputs[past]
            dims = [
                d.dim_value or {contract.BATCH: rows, contract.CAPACITY: capacity}[d.dim_param] for d in kind.shape.dim
            ]
            dtype = np.float32 if self._forms else onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
            self._states[present] = np.zeros(dims, dtype)

    def restore(self, states: Mapping[str, Array]) -> None:
        """See `Tapped`."""
        self._states = dict(states)

    def step(self, step: Step) -> Output:
        """See `Subject`."""
        return self.tap(step, ())[0]

    def tap(self, step: Step, names: Iterable[str]) -> tuple[Output, dict[str, Array]]:
        """See `Tapped`."""
        taps = tuple(name for name in names if name not in self.network.outputs)
        outputs = [contract.LOGITS, *(present for _, present in self._pairs)]
        values = self._run("tap", taps, [*outputs, *taps], self._feed(step, self._states))
        self._states = {present: values[present] for _, present in self._pairs}
        found = {name: values[name] for name in names if name in values}
        return Output(values[contract.LOGITS].astype(np.float32), dict(self._states)), found

    def local(self, step: Step, given: Mapping[str, Array], past: Mapping[str, Array]) -> dict[str, Array]:
        """See `Tapped`."""
        cuts = tuple(name for name in self.network.values if name in given)
        feed = self._feed(step, past) | {name: given[name] for name in cuts}
        values = self._run("local", cuts, [_LOCAL + name for name in cuts], feed)
        return {name: values[_LOCAL + name] for name in cuts}

    def weight(self, name: str) -> Array | None:
        """See `Tapped`."""
        for tensor in self._model.graph.initializer:
            if tensor.name == name:
                return np.asarray(onnx.numpy_helper.to_array(tensor, base_dir=str(self._path.parent)))
        return None

    def made_by(self, node: str) -> Value | None:
        """The first value of a node, by the node's name."""
        for index, candidate in enumerate(self._model.graph.node):
            if candidate.name == node:
                return next((value for value in self.network.values.values() if value.node == index), None)
        return None

    def close(self) -> None:
        """See `Subject`."""
        self._sessions.clear()
        self._states = {}

    def _feed(self, step: Step, states: Mapping[str, Array]) -> dict[str, Any]:
        feed = {role: array for role, array in step.feed.items() if role in self._inputs}
        return feed | {past: states[present] for past, present in self._pairs}

    def _read_forms(self) -> dict[str, StateForm]:
        """Of each state, by both its names; none if states are floats.

        Raises:
            BundleError: there is no file that says how they are rounded.
        """
        if not any(self._inputs[past].elem_type == onnx.TensorProto.INT8 for past, _ in self._pairs):
            return {}
        states = []
        for past, present in self._pairs:
            _, layer, kind = past.split(".")
            shape = tuple(d.dim_value or d.dim_param for d in self._inputs[past].shape.dim)
            states.append(
                StateSpec(input=past, output=present, layer=int(layer), kind=kind, dtype="int8", shape=shape)  # type: ignore[arg-type]
            )
        forms = read_forms(self._path.with_name(Path(CACHE_FORMS).name), states)
        return {name: form for pair, form in zip(self._pairs, forms, strict=True) for name in pair}

    def _run(self, mode: str, names: tuple[str, ...], outputs: list[str], feed: dict[str, Any]) -> dict[str, Array]:
        session = self._sessions.get((mode, names))
        if session is None:
            session = self._sessions[mode, names] = self._open(mode, names)
        known = {value.name for value in session.get_inputs()}  # ONNX Runtime drops inputs that nothing reads
        given = {name: array for name, array in feed.items() if name in known}
        for name in self._forms.keys() & given.keys():
            given[name] = self._forms[name].narrow(given[name])
        found = dict(zip(outputs, session.run(outputs, given), strict=True))
        for name in outputs:
            form = self._forms.get(name.removeprefix(_LOCAL))
            if form is not None:
                found[name] = form.widen(found[name])
        return found

    def _open(self, mode: str, names: tuple[str, ...]) -> ort.InferenceSession:
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        graph = model.graph
        if mode == "local":
            _cut(graph, names)
        else:
            graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors come as exceptions
        options.intra_op_num_threads = _THREADS
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self._path.parent.absolute())
        )
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _cut(graph: onnx.GraphProto, names: tuple[str, ...]) -> None:
    """Let the readers of each named value read an input, and make what the graph computes an output."""
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    cut = set(names)
    for node in graph.node:
        for place, name in enumerate(node.output):
            if name in cut:
                node.output[place] = _LOCAL + name
    kept = [value for value in graph.output if value.name not in cut]
    del graph.output[:], graph.value_info[:]
    graph.output.extend([*kept, *(onnx.ValueInfoProto(name=_LOCAL + name) for name in names)])
    graph.input.extend(
        onnx.helper.make_tensor_value_info(name, types.get(name, onnx.TensorProto.FLOAT), None) for name in names
    )
