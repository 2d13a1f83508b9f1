"""What the plugin tests share: a compile cache, the interpreter's process, a recording CUDA driver, a small graph."""

import ctypes
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import pytest
import torch
from support import export_graphs, randomise

from zonda.export.onnx_files import UNIVERSAL
from zonda.models import layers
from zonda.models.llama import Llama, LlamaConfig
from zonda.plugins_trt import PLUGINS

CAPACITY = 64
CONFIG = LlamaConfig.read(
    {
        "vocab_size": 61,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
)


def pytest_collection_modifyitems(items):
    """Skip what needs a package that is not installed, saying which extra brings it."""
    needs = {"triton": "triton", "interpret": "triton", "rtx": "tensorrt_rtx"}
    extras = {"triton": "plugins", "tensorrt_rtx": "rtx"}
    here = Path(__file__).parent
    for item in (item for item in items if here in item.path.parents):
        for fixture, module in needs.items():
            if fixture in getattr(item, "fixturenames", ()) and find_spec(module) is None:
                item.add_marker(
                    pytest.mark.skip(reason=f"{module} is not installed: pip install -e '.[{extras[module]}]'")
                )


@pytest.fixture(scope="session")
def triton(tmp_path_factory):
    """Triton is installed; the value is a cache directory for `compile_kernels`."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="session")
def interpret():
    """`interpret(node, tensors)` of `kernels/interpreter.py`, in a process that never compiles."""
    from zonda.plugins_trt.kernels import interpreter

    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
    ):
        yield lambda node, tensors: pool.submit(interpreter.interpret, node, tensors).result()


@pytest.fixture(scope="session")
def rtx():
    """The module `tensorrt_rtx`, ready for plugins."""
    from zonda.plugins_trt import load

    return load("tensorrt_rtx")


@dataclass
class RecordingDriver:
    """A CUDA driver that notes every call, and reads launch parameters as a GPU would: through the addresses."""

    device: int = 80
    calls: list[tuple] = field(default_factory=list)
    kinds: dict[str, tuple[str, ...]] = field(default_factory=dict)
    contexts: int = 1

    def context(self):
        return self.contexts

    def capability(self):
        return self.device

    def load(self, image):
        self.calls.append(("load", image))
        return f"module of {image.decode()}"

    def unload(self, module):
        self.calls.append(("unload", module))

    def function(self, module, name, shared):
        self.calls.append(("function", module, name, shared))
        return name

    def launch(self, function, grid, block, shared, stream, parameters):
        kinds = (*self.kinds[function], "*", "*")
        addresses = (ctypes.c_void_p * len(kinds)).from_address(parameters)
        types = {"fp32": ctypes.c_float, "i32": ctypes.c_int32}
        values = tuple(
            types.get(kind, ctypes.c_uint64).from_address(address).value
            for kind, address in zip(kinds, addresses, strict=True)
        )
        self.calls.append(("launch", function, grid, block, shared, stream, values))


@pytest.fixture
def driver():
    return RecordingDriver()


def build(rows: int) -> Llama:
    """Two layers with every marker that has a plugin."""
    model = Llama(CONFIG, rows)
    for block in model.model.layers:
        block.input_layernorm = layers.QRmsNorm(CONFIG.hidden_size, 1e-6)
    return model


def with_plugin_nodes(directory) -> ir.Model:
    """The exported graph as TensorRT can take it: fp16, a static cache, other markers inlined, one add fused."""
    model = build(CAPACITY).eval()
    randomise(model)
    generator = torch.Generator().manual_seed(0)
    for name, buffer in model.named_buffers():
        if name.endswith("codes"):
            buffer.random_(-127, 128, generator=generator)
        elif name.endswith("scales"):
            buffer.uniform_(0.001, 0.02, generator=generator)
    export_graphs(directory, build, dict(model.state_dict()).__getitem__, CAPACITY)
    graph = ir.external_data.load_to_model(ir.load(directory / UNIVERSAL))
    common_passes.InlinePass(lambda function: function.name not in PLUGINS)(graph)
    values = {v for node in graph.graph for v in (*node.inputs, *node.outputs) if v is not None} | {*graph.graph.inputs}
    for value in values:
        if value.dtype == ir.DataType.FLOAT and not str(value.name).endswith((".cos", ".sin")):
            value.dtype = ir.DataType.FLOAT16
            if value.const_value is not None:
                value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=value.name)
        if value.shape is not None:
            value.shape = ir.Shape([CAPACITY if str(d) == "capacity" else d for d in value.shape])
    fuse_first_add(graph)
    for index, node in enumerate(graph.graph):
        node.name = f"{node.op_type}_{index}"
    return graph


def fuse_first_add(model: ir.Model) -> None:
    norm = next(n for n in model.graph if n.op_type == "RmsNorm" and n.inputs[0].producer().op_type == "Add")
    add = norm.inputs[0].producer()
    fused = ir.node("AddRmsNorm", [*add.inputs, norm.inputs[1]], dict(norm.attributes), domain="zonda", num_outputs=2)
    for new, old in zip(fused.outputs, (norm.outputs[0], add.outputs[0]), strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
    model.graph.insert_before(norm, fused)
    for new, old in zip(fused.outputs, (norm.outputs[0], add.outputs[0]), strict=True):
        ir.convenience.replace_all_uses_with(old, new)
    model.graph.remove([norm, add], safe=True)


@pytest.fixture(scope="session")
def graph(tmp_path_factory) -> ir.Model:
    return with_plugin_nodes(tmp_path_factory.mktemp("graph"))
