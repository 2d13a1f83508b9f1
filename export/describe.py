"""Words and data about a build: the dry run's page and the manifest."""

import json
from collections.abc import Container, Mapping, Sequence
from importlib import metadata

from .. import BuildError, __version__
from ..models.architecture import CausalModel
from ..models.cache import KvShape
from ..models.checkpoints.base import Checkpoint
from ..models.quantize import count_weights, dequantized_types, tensor_classes
from ..runtime import contract
from ..runtime.manifest import (
    SCHEMA,
    Adapter,
    Contract,
    Graph,
    Limits,
    Manifest,
    Parity,
    Source,
    StateSpec,
    Target,
    TensorSpec,
)
from .device_plan import DevicePlan
from .lower.int8 import SHORTEST_PREFILL
from .onnx_files import CACHE_FORMS, LOWERED, PREFILL, WEIGHTS
from .plan import Plan, gigabytes, kv_bytes_per_token

_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


def plan_page(plan: Plan, checkpoint: Checkpoint, limits: Limits, devices: Sequence[DevicePlan] = ()) -> str:
    """What `--dry-run` prints; `devices` are the TensorRT targets."""
    row = plan.kv_per_token * (limits.capacity + limits.max_chunk)
    lines = [
        ("model", f"{checkpoint.source.name}: {plan.parameters:,} parameters, {checkpoint.source.format}"),
        ("bundle on disk", gigabytes(plan.bundle)),
        *([("temporary file", gigabytes(plan.scratch))] if plan.scratch else []),
        *_quantization(checkpoint).items(),
        ("build memory, peak", f"at most {gigabytes(plan.build_memory)}"),
        ("engine memory", f"at most {gigabytes(plan.engine_memory)} with one full row"),
        ("KV cache", f"{plan.kv_per_token:,} bytes a token; {gigabytes(row)} a row of {limits.capacity} tokens"),
        *(("adapter", f"{a.name}, scale {a.scale:g}") for a in checkpoint.source.adapters),
        ("limits", f"capacity {limits.capacity}, batch {limits.max_batch}, chunk {limits.max_chunk}"),
        ("proof", "here" if plan.provable else f"pending: {plan.why_not_provable}"),
        *(line for device in devices for line in device.lines(limits)),
    ]
    return "\n".join(f"{name:<20} {value}" for name, value in lines)


def make_contract(shapes: list[KvShape], vocab_size: int) -> Contract:
    """The graph contract of a model with these layers."""
    inputs = tuple(
        TensorSpec(role=role, name=role, dtype=dtype, shape=shape) for role, (dtype, shape) in contract.INPUTS.items()
    )
    states = []
    for layer, shape in enumerate(shapes):
        for kind, dim in (("key", shape.key_dim), ("value", shape.value_dim)):
            before, after = contract.state_names(layer, kind)
            dims = (contract.BATCH, shape.num_key_value_heads, contract.CAPACITY, dim)
            states.append(
                StateSpec(input=before, output=after, layer=layer, kind=kind, dtype="float32", shape=dims)  # type: ignore[arg-type]
            )
    logits = TensorSpec(
        role=contract.LOGITS,
        name=contract.LOGITS,
        dtype="float32",
        shape=(contract.BATCH, contract.NUM_LOGITS, vocab_size),
    )
    return Contract(layout=contract.LAYOUT, inputs=inputs, states=tuple(states), logits=logits)


def make_manifest(
    checkpoint: Checkpoint,
    architecture: str,
    module: CausalModel,
    limits: Limits,
    parity: Parity | None,
    universal: Parity | None,
    files: Mapping[str, int],
    others: Sequence[Target] = (),
    quality: str = "exact",
) -> Manifest:
    """The manifest of a bundle with the ONNX Runtime target (without it if `parity` is None) and `others`."""
    source = checkpoint.source
    dequantized = dequantized_types(module, checkpoint)
    targets = () if parity is None else (_onnxruntime_target(limits, parity, quality, files),)
    kv = targets[0].kv_dtype if targets and targets[0].kv_dtype else "float32"
    held = "8 bits, a scale a head and channel" if kv == "int8" else kv
    return Manifest(
        schema=SCHEMA,
        zonda_version=__version__,
        kind=checkpoint.kind,
        name=source.name,
        architecture=architecture,
        source=_source(checkpoint),
        parameters=count_weights(module),
        contract=make_contract(module.kv_shapes, limits.vocab_size),
        limits=limits,
        kv_bytes_per_token=kv_bytes_per_token(module.kv_shapes, kv),
        quantization=tensor_classes(module)
        | {"kv": held}
        | ({"dequantized": dequantized} if dequantized else {})
        | _quantization(checkpoint),
        eos_token_ids=eos_token_ids(_generation_config(checkpoint), checkpoint.config),
        targets=(*targets, *others),
        files=dict(files),
        universal=universal,
    )


def _onnxruntime_target(limits: Limits, parity: Parity, quality: str, files: Container[str]) -> Target:
    rows, last = (1, limits.max_batch), limits.max_chunk
    graphs: tuple[Graph, ...] = (Graph(role="any", file=LOWERED, batch=rows, sequence=(1, last)),)
    if PREFILL in files:
        graphs = (
            Graph(role="decode", file=LOWERED, batch=rows, sequence=(1, SHORTEST_PREFILL - 1)),
            Graph(role="prefill", file=PREFILL, batch=rows, sequence=(SHORTEST_PREFILL, last)),
        )
    return Target(
        name="onnxruntime",
        graphs=graphs,
        weights=(WEIGHTS,),
        dtype="float32",
        tool_versions={tool: metadata.version(tool) for tool in _TOOLS},
        parity=parity,
        quality=quality,
        kv_dtype="int8" if CACHE_FORMS in files else "",
        cache_forms=CACHE_FORMS if CACHE_FORMS in files else "",
    )


def _source(checkpoint: Checkpoint) -> Source:
    found = checkpoint.source
    return Source(
        name=found.name,
        format=found.format,
        revision=found.revision,
        sha256=checkpoint.sha256(),
        adapters=tuple(Adapter(name=a.name, scale=a.scale, sha256=dict(a.sha256)) for a in found.adapters),
    )


def _quantization(checkpoint: Checkpoint) -> dict[str, str]:
    """How this build quantised the weights: `{"quant": "int4", "method": …}`; nothing if it did not."""
    made = checkpoint.source.quantization
    if made is None:
        return {}
    method = f"{made.weights} weights, blocks searched for the least weighted error"
    return {"quant": made.quant, "method": method + (f", {made.raised} raised to 8 bits" if made.raised else "")}


def _generation_config(checkpoint: Checkpoint) -> dict[str, object]:
    try:
        value = json.loads(checkpoint.files.get("generation_config.json", b"{}"))
    except ValueError as error:
        raise BuildError(f"generation_config.json is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def eos_token_ids(*configs: Mapping[str, object]) -> tuple[int, ...]:
    """The ids that end a sequence: of the first of generation_config.json and config.json that names any.

    Raises:
        BuildError: what is named is not an id or a list of ids.
    """
    for config in configs:
        value = config.get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
                raise BuildError(f"eos_token_id must be a token id or a list of them, found {value!r}")
            return tuple(ids)
    return ()
