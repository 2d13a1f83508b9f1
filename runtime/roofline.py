"""`zonda inspect --roofline`: the least time that a bundle's tokens can take on some GPUs, by arithmetic.

A decode step of one row must read every weight once and the row's keys and values; a prompt must be multiplied with
every weight. Divided by a GPU's datasheet figures that is a floor no engine gets under. Nothing here is measured.
"""

import math
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table

from .. import RequestError
from .bundle import Bundle
from .gpu import MODULES
from .manifest import Target

CONTEXT = 1024
"""Cached tokens of the decode step, and tokens of the prompt, as far as the capacity allows."""

_ITEM_SIZES = {"int8": 1, "float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Datasheet:
    """capability: major * 10 + minor. bandwidth: bytes/s. half, single: FLOP/s, 16-bit tensor cores (dense, float32
    accumulation) and float32 outside of them."""

    name: str
    capability: int
    bandwidth: float
    half: float
    single: float


GPUS = (
    Datasheet("T4", 75, 320e9, 65e12, 8.1e12),  # NVIDIA T4 Tensor Core GPU, datasheet
    Datasheet("A10", 86, 600e9, 125e12, 31.2e12),  # NVIDIA A10 Tensor Core GPU, datasheet
    Datasheet("L4", 89, 300e9, 121e12, 30.3e12),  # NVIDIA L4 Tensor Core GPU, datasheet: half of the 242 with sparsity
    Datasheet("RTX 3090", 86, 936e9, 71e12, 35.6e12),  # NVIDIA Ampere GA102 GPU architecture, whitepaper, appendix A
    Datasheet("RTX 4090", 89, 1008e9, 165.2e12, 82.6e12),  # NVIDIA Ada GPU architecture, whitepaper, appendix A
    Datasheet("RTX 5090", 120, 1792e9, 209.5e12, 104.8e12),  # NVIDIA RTX Blackwell GPU architecture, whitepaper, app. A
    Datasheet("A100 80GB SXM", 80, 2039e9, 312e12, 19.5e12),  # NVIDIA A100 Tensor Core GPU, datasheet, 80GB SXM
    Datasheet(
        "H100 SXM", 90, 3350e9, 989e12, 67e12
    ),  # NVIDIA H100 Tensor Core GPU, datasheet: half of 1,979 with sparsity
)


@dataclass(frozen=True, slots=True)
class Work:
    """What a target must move and compute.

    weight_bytes: read in a decode step. kv_bytes: of `context` cached tokens of one row. prompt_flops: of a prompt of
    `context` tokens, its logits computed once.
    """

    context: int
    weight_bytes: int
    kv_bytes: int
    prompt_flops: float

    @property
    def decode_bytes(self) -> int:
        """Read for one token of one row."""
        return self.weight_bytes + self.kv_bytes

    def decode_seconds(self, gpu: Datasheet) -> float:
        """The floor of a decode step of one row."""
        return self.decode_bytes / gpu.bandwidth

    def prefill_seconds(self, gpu: Datasheet, dtype: str) -> float:
        """The floor of the prompt: compute, or reading the weights once."""
        peak = gpu.single if dtype == "float32" else gpu.half
        return max(self.prompt_flops / peak, self.weight_bytes / gpu.bandwidth)


def work_of(bundle: Bundle, target: Target) -> Work:
    """The work of a target of a dense decoder.

    A plan's weights are what TensorRT says they take, else its size. An embedding table is not read but for one row,
    unless it is the head as well; a plan that dequantised it has both.

    Raises:
        RequestError: the model has experts, so what a token reads depends on its routing.
    """
    manifest, config = bundle.manifest, bundle.read_json("config.json")
    if any("expert" in key and config[key] for key in config):
        raise RequestError("--roofline counts dense models; this one has experts, and a token reads only some of them")
    context = min(CONTEXT, manifest.limits.capacity)
    plan = target.kind in MODULES
    weights = target.weight_bytes or sum(manifest.files[name] for name in target.weights)
    table = manifest.limits.vocab_size * int(config.get("hidden_size", 0))
    tied = bool(config.get("tie_word_embeddings", False))
    dense = manifest.parameters - (table if tied else 2 * table)
    if not tied or "embedding" in target.quantization:
        weights -= table * _ITEM_SIZES.get(target.dtype if plan else manifest.quantization.get("embedding", ""), 0)
    states = manifest.contract.states
    elements = sum(math.prod(d for d in state.shape if isinstance(d, int)) for state in states)
    item = _ITEM_SIZES.get(target.kv_dtype or states[0].dtype, 4)
    heads = int(config.get("num_attention_heads", 0))
    keys = sum(int(state.shape[-1]) for state in states)  # of keys and values, of one head, all layers
    attention = 2.0 * heads * keys * context * context / 2  # causal: half of the square
    return Work(context, weights, elements * item * context, 2.0 * dense * context + attention + 2.0 * table)


def roofline_page(bundle: Bundle) -> RenderableType:
    """The floors of every target, as something `rich` prints."""
    parts: list[RenderableType] = []
    for target in bundle.manifest.targets:
        work = work_of(bundle, target)
        table = Table("GPU", "decode, ms a token", "tokens/s", f"prefill of {work.context}, ms", "plan")
        for gpu in GPUS:
            decode, prefill = work.decode_seconds(gpu), work.prefill_seconds(gpu, target.dtype)
            built = "-" if not target.compute_capabilities else "no"
            if gpu.capability in target.compute_capabilities:
                built = "yes"
            table.add_row(gpu.name, f"{decode * 1e3:.3f}", f"{1 / decode:,.0f}", f"{prefill * 1e3:.2f}", built)
        parts.append(
            f"\n{target.name}, {target.dtype}: a decode step reads {work.weight_bytes / 1e6:,.1f} MB of weights and "
            f"{work.kv_bytes / 1e6:,.1f} MB of keys and values ({work.context} cached tokens, one row); prefill "
            f"computes {work.prompt_flops / work.context / 1e9:,.2f} GFLOP a token"
        )
        parts.append(table)
    parts.append(
        "Arithmetic, not measurement: bytes and FLOPs divided by datasheet bandwidth and peak (16-bit tensor cores, "
        "dense; float32 without them). An engine is slower, unless weights stay in the GPU's cache between tokens. "
        "plan: whether it was built for that GPU."
    )
    return Group(*parts)
