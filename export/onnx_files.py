"""The ONNX side of a bundle: `onnx/universal.onnx`, `onnx/onnxruntime.onnx`, and the one weight file they read.

A bundle of the quality class `fast` has `onnx/prefill.onnx` beside them, one whose KV cache is in int8 has its scales.
"""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from safetensors.numpy import save
from torch import Tensor, nn

from .. import BuildError
from ..models.checkpoints.base import Checkpoint
from ..models.loading import parameter_source
from .functions import MARKERS, register_schemas
from .lower.int8 import derived_source
from .lower.onnxruntime import Lowered
from .lower.quantized import as_written, widen
from .weights import attach, missing_data, plan_layout, write_weights

DIRECTORY = "onnx"
UNIVERSAL = f"{DIRECTORY}/universal.onnx"
LOWERED = f"{DIRECTORY}/onnxruntime.onnx"
PREFILL = f"{DIRECTORY}/prefill.onnx"
WEIGHTS = f"{DIRECTORY}/weights.bin"
CACHE_FORMS = f"{DIRECTORY}/cache.safetensors"


def tensor_source(module: nn.Module, checkpoint: Checkpoint, names: Mapping[str, str]) -> Callable[[str], Tensor]:
    """A function: initialiser name -> tensor, from the checkpoint or, for RoPE tables, from the module.

    Codes, scales and offsets of a block-quantised module come as the checkpoint stores them.

    Args:
        module: built on the meta device; its tables are real.
        checkpoint: where parameters come from.
        names: parameter name -> checkpoint tensor name.
    """
    buffers = dict(module.named_buffers(remove_duplicate=False))
    parameters = parameter_source(checkpoint, names)

    def load(name: str) -> Tensor:
        return buffers[name] if name in buffers else parameters(name)

    return load


def write(staging: Path, universal: ir.Model, lowered: Lowered | None, load: Callable[[str], Tensor]) -> None:
    """Write the weight file and the graphs; tensors go one by one, as `as_written` and `as_stored` say.

    Args:
        staging: the unfinished bundle.
        universal: changed in place: rows that `lowered` wants wide are cut for its own nodes.
        lowered: the graph for ONNX Runtime, if there is one.
        load: initialiser name -> tensor.
    """
    (staging / DIRECTORY).mkdir()
    graphs = {UNIVERSAL: universal}
    lowered = Lowered(universal) if lowered is None else lowered
    if lowered.model is not universal:
        graphs[LOWERED] = lowered.model
    derived = []
    if lowered.prefill is not None:
        graphs[PREFILL] = lowered.prefill
        derived = [lowered.prefill.graph.initializers[name] for name in lowered.derived]
    widen(universal.graph, lowered.corrections)
    layout = plan_layout(universal, lowered.packs, derived)
    read = file_source(lowered, load)
    names = [*missing_data(universal), *lowered.derived]
    write_weights(staging / WEIGHTS, layout, names, lambda name: as_stored(read(name)))
    for file, model in graphs.items():
        attach(model, layout, Path(WEIGHTS).name)
        (staging / file).write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    if lowered.cache_forms:
        (staging / CACHE_FORMS).write_bytes(save(lowered.cache_forms))


def file_source(lowered: Lowered | None, load: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """A function: initialiser name -> tensor as the weight file holds it, `load` being its source."""
    if lowered is None:
        return load
    derived = derived_source(lowered.derived, load)

    def read(name: str) -> Tensor:
        if name in lowered.derived:
            return derived(name)
        return as_written(name, load(name), load, lowered.corrections)

    return read


def as_stored(tensor: Tensor) -> np.ndarray:
    """What a weight file holds of a tensor: floating tensors as float32, integer codes as they are."""
    return np.ascontiguousarray((tensor.float() if tensor.is_floating_point() else tensor).numpy())


def check(staging: Path) -> None:
    """onnx's checker and strict shape inference on the universal graph.

    Raises:
        BuildError: the graph is not valid; a defect of the export, with onnx's words.
    """
    register_schemas(MARKERS)
    path = staging / UNIVERSAL
    try:
        onnx.checker.check_model(path, full_check=False)
        graph = onnx.load(path, load_external_data=False)
        onnx.shape_inference.infer_shapes(graph, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BuildError(f"the exported graph is not valid ONNX: {error}") from error


def write_texts(staging: Path, checkpoint: Checkpoint) -> None:
    """Write config.json, and the tokenizer, template and generation files that travel with the checkpoint."""
    import json

    config = json.dumps(checkpoint.config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    for name, data in itertools.chain([("config.json", config.encode())], sorted(checkpoint.files.items())):
        (staging / name).write_bytes(data)
