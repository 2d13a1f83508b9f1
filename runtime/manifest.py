"""The bundle's manifest: everything a reader must know, as typed data.

Schema policy: a reader takes the schema it was written for and every older one (there is none yet); a newer one is
refused with the version to upgrade to. Within a schema fields may be added, never changed: unknown fields pass.
"""

from typing import Literal

import msgspec

from .. import BundleError
from .metrics import Thresholds

SCHEMA = 1

Dimension = int | str
"""A fixed size, or the name of a dynamic one (`contract.BATCH`, …)."""


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter that was merged into the weights. scale: as it was asked for; sha256: of its files, by name."""

    name: str
    scale: float
    sha256: dict[str, str]


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where the weights came from; revision is the commit of a hub repository; sha256 is a weight file's, by name.

    adapters: merged into the weights, in this order.
    """

    name: str
    format: str
    revision: str | None = None
    sha256: dict[str, str] = {}
    adapters: tuple[Adapter, ...] = ()


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One token input: its role in the contract, its name in the graph."""

    role: str
    name: str
    dtype: str
    shape: tuple[Dimension, ...]


class StateSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One state tensor, bound in place: input and output are the same memory."""

    input: str
    output: str
    layer: int
    kind: Literal["key", "value"]
    dtype: str
    shape: tuple[Dimension, ...]


class Contract(msgspec.Struct, frozen=True, kw_only=True):
    """What goes into a step and what comes out (docs/architecture.md)."""

    layout: str
    inputs: tuple[TensorSpec, ...]
    states: tuple[StateSpec, ...]
    logits: TensorSpec

    def with_states(self, dtype: str) -> "Contract":
        """The same with all states of another dtype."""
        states = tuple(msgspec.structs.replace(state, dtype=dtype) for state in self.states)
        return msgspec.structs.replace(self, states=states)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """capacity: cached tokens a row. max_batch: rows a step. max_chunk: new tokens of a row in a step."""

    capacity: int
    max_batch: int
    max_chunk: int
    vocab_size: int


class Graph(msgspec.Struct, frozen=True, kw_only=True):
    """One compiled graph; role `any` serves prefill and decode. Ranges are inclusive (minimum, maximum).

    num_logits: range of K; that of S if None. profile: which of the optimisation profiles in `file`.
    activation_bytes: device memory that TensorRT says a step needs beside weights and states; 0 if unknown.
    """

    role: Literal["any", "prefill", "decode"]
    file: str
    batch: tuple[int, int]
    sequence: tuple[int, int]
    num_logits: tuple[int, int] | None = None
    profile: int = 0
    activation_bytes: int = 0


class ScheduleReport(msgspec.Struct, frozen=True, kw_only=True):
    """How far the engine was from the reference in one way of feeding it; the worst token counts.

    cosine, norm_ratio, relative_error, max_error, top1_agreement, top10_overlap: see `metrics.Deviations`.
    mean_error: None where it was measured against a digest. near_ties: other first choices that the reference holds
    for equal. kv_error: of the keys or values of a layer and row, None if the reference has no cache. kl: mean, in
    nats. perplexity_ratio: of the engine by that of the reference.
    """

    name: str
    tokens: int
    cosine: float
    norm_ratio: float
    relative_error: float
    max_error: float
    mean_error: float | None
    top1_agreement: float
    near_ties: int
    top10_overlap: float
    kv_error: float | None
    kl: float = 0.0
    perplexity_ratio: float = 1.0


class WeightReport(msgspec.Struct, frozen=True, kw_only=True):
    """Tensors of the bundle that were compared with the checkpoint, byte by byte after dequantising."""

    tensors: int
    bytes: int


class ReferenceReport(msgspec.Struct, frozen=True, kw_only=True):
    """The eager model against another implementation of the architecture."""

    name: str
    tokens: int
    cosine: float
    relative_error: float
    max_error: float
    top1_agreement: float


class Parity(msgspec.Struct, frozen=True, kw_only=True):
    """The proof that this target computes what the eager model computes.

    status: `passed`; `pending` when the build host could not run the target; `off` when the build was told not to.
    max_logit: max |logit| of the reference. weights: None if they were not compared. reference_proof: None if the
    eager model itself was not compared with another implementation.
    """

    status: Literal["passed", "pending", "off"]
    reference: str = ""
    reason: str = ""
    thresholds: Thresholds | None = None
    max_logit: float = 0.0
    schedules: tuple[ScheduleReport, ...] = ()
    weights: WeightReport | None = None
    reference_proof: ReferenceReport | None = None


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """One way to run the bundle. name: what it is called, and no other target of the bundle. kind: what runs it
    (`onnxruntime`, `tensorrt-rtx`, `tensorrt`), the name if empty: a bundle may hold several plans of one kind.

    weights: files that are mapped, not hashed, on load. dtype: of the arithmetic. kv_dtype: of the states, the
    contract's if empty. quantization: class of weights -> what they are held in, where it is blocks in the bundle.
    compute_capabilities: of the GPUs that can run it. kernels: file of the plugins' kernels, none if empty. plugins:
    operator -> nodes that became plugins. log: file of TensorRT's messages. warnings: of its build, in words.
    weight_bytes: on the device, 0 if unknown. quality: of ONNX Runtime's arithmetic, `exact`, `balanced` or `fast`.
    cache_forms: file that says how states in int8 are rounded, none if empty.
    """

    name: str
    graphs: tuple[Graph, ...]
    weights: tuple[str, ...]
    dtype: str
    tool_versions: dict[str, str]
    parity: Parity
    kind: str = ""
    kv_dtype: str = ""
    quantization: dict[str, str] = {}
    compute_capabilities: tuple[int, ...] = ()
    kernels: str = ""
    plugins: dict[str, int] = {}
    log: str = ""
    warnings: tuple[str, ...] = ()
    weight_bytes: int = 0
    quality: str = "exact"
    cache_forms: str = ""

    def __post_init__(self) -> None:
        if not self.kind:
            msgspec.structs.force_setattr(self, "kind", self.name)


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """`manifest.json`. files: every other file of the bundle but SHA256SUMS, with its size in bytes.

    universal: the proof of the universal graph on plain ONNX Runtime, which no target need run.
    """

    schema: int
    zonda_version: str
    kind: str
    name: str
    architecture: str
    source: Source
    parameters: int
    contract: Contract
    limits: Limits
    kv_bytes_per_token: int
    quantization: dict[str, str]
    eos_token_ids: tuple[int, ...]
    targets: tuple[Target, ...]
    files: dict[str, int]
    universal: Parity | None = None


class _Versioned(msgspec.Struct):
    schema: int
    zonda_version: str = "unknown"


def encode(manifest: Manifest) -> bytes:
    """manifest.json, the same bytes for the same manifest."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=2) + b"\n"


def decode(data: bytes) -> Manifest:
    """Parse manifest.json.

    Raises:
        BundleError: not JSON, a field is missing or of the wrong type, two targets have one name, or the schema is
            newer than this reader's.
    """
    try:
        version = msgspec.json.decode(data, type=_Versioned)
        if version.schema != SCHEMA:
            raise BundleError(
                f"manifest.json has schema {version.schema}, this version of zonda reads {SCHEMA}; "
                f"use zonda {version.zonda_version} or newer, or build the bundle again"
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.MsgspecError as error:
        raise BundleError(f"manifest.json is not readable: {error}") from error
    names = [target.name for target in manifest.targets]
    if len(set(names)) != len(names):
        raise BundleError(f"manifest.json gives two targets one name: {', '.join(names)}")
    return manifest
