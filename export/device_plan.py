"""What a TensorRT target will take, before it is built: bytes on the device, the plan's size, the build itself.

Upper bounds from the tensors' sizes, and constants measured on TensorRT-RTX 1.7 (each said below). After a build
TensorRT's own figures stand in the manifest.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from .. import BuildError
from ..models.architecture import CausalModel
from ..models.layers import QEmbedding
from ..runtime import contract
from ..runtime.manifest import Limits
from .plan import gigabytes, kv_bytes_per_token
from .tensorrt_build import make_profiles

_ITEM = 2  # bytes of an element in 16 bits
_WIDE = 4
_OVERHEAD = 32 << 20  # of a plan beside its weights: 14 MB in SmolLM2's
_WORKER = 700 << 20  # TensorRT's libraries and compiler, resident: 520 MB for a model of 100 kB
_COPIES = 4  # of the weights, in the process that builds: parsed, rewritten, serialised, on the way to the file
_SCRATCH = 8 << 20  # TensorRT asks for it even in the smallest model


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """Bytes, unless said otherwise.

    target: name of the plan's target. weights: on the device. kv_per_token: of one row. activations: role of a profile
    -> most that a step needs. plan: the file. build_memory: of the process that builds. build_disk: the plan and the
    weights it is made from.
    """

    target: str
    weights: int
    kv_per_token: int
    activations: dict[str, int]
    plan: int
    build_memory: int
    build_disk: int

    @property
    def build_time(self) -> str:
        """The class of time that a build takes on two cores: 270 MB of weights take 20 s."""
        for limit, words in ((100e6, "seconds"), (1e9, "about a minute"), (10e9, "minutes")):
            if self.weights < limit:
                return words
        return "tens of minutes"

    def lines(self, limits: Limits) -> list[tuple[str, str]]:
        """For the page of `--dry-run`."""
        row = self.kv_per_token * (limits.capacity + limits.max_chunk)
        steps = ", ".join(f"{role} {gigabytes(size)}" for role, size in self.activations.items())
        total = self.weights + row * limits.max_batch + max(self.activations.values())
        return [
            (f"{self.target} device", f"at most {gigabytes(total)} with {limits.max_batch} full rows"),
            ("  weights", gigabytes(self.weights)),
            ("  KV cache", f"{self.kv_per_token:,} bytes a token; {gigabytes(row)} a full row"),
            ("  activations", f"at most {steps}"),
            ("  plan on disk", f"about {gigabytes(self.plan)}"),
            ("  build", f"{self.build_time}, at most {gigabytes(self.build_memory)} of memory"),
        ]

    def require(self, destination: Path, bundle: int) -> None:
        """Raise `BuildError` if the disk (with `bundle` bytes more) or this host's memory is too small."""
        parent = next(p for p in (destination, *destination.parents) if p.exists())
        free = shutil.disk_usage(parent).free
        if self.build_disk + bundle > free:
            needed = gigabytes(self.build_disk + bundle)
            raise BuildError(f"building for {self.target} needs {needed}, the disk of {parent} has {gigabytes(free)}")
        available = psutil.virtual_memory().available
        if self.build_memory > available:
            raise BuildError(
                f"building for {self.target} needs {gigabytes(self.build_memory)} of memory, "
                f"{gigabytes(available)} are available"
            )


def make_device_plan(model: CausalModel, limits: Limits, target: str) -> DevicePlan:
    """Predict from the model's shapes (on the meta device) and the limits asked for."""
    parameters = {id(tensor): tensor for tensor in model.parameters()}.values()
    tables = {id(tensor): tensor.numel() for tensor in model.buffers()}
    weights = sum(p.numel() * (_ITEM if p.is_floating_point() else p.itemsize) for p in parameters)
    weights += sum(tables.values()) * _WIDE
    weights += sum(math.prod(m.shape) * _ITEM for m in model.modules() if isinstance(m, QEmbedding))  # dequantised
    widest = max((max(p.shape) for p in parameters if p.ndim == 2 and limits.vocab_size not in p.shape), default=1)
    kv = kv_bytes_per_token(model.kv_shapes) // _WIDE * _ITEM
    activations: dict[str, int] = {}
    for profile in make_profiles(limits):
        rows, tokens, logits = (
            profile.dimensions[name][2] for name in (contract.BATCH, contract.SEQUENCE, contract.NUM_LOGITS)
        )
        hidden = 6 * rows * tokens * widest * _ITEM  # residual, q, k, v, and both halves of the MLP
        head = rows * logits * limits.vocab_size * _ITEM
        mask = rows * tokens * (limits.capacity + limits.max_chunk)
        activations[profile.role] = hidden + head + mask + _SCRATCH
    return DevicePlan(
        target=target,
        weights=weights,
        kv_per_token=kv,
        activations=activations,
        plan=weights + _OVERHEAD,
        build_memory=_WORKER + _COPIES * weights,
        build_disk=2 * weights + _OVERHEAD,
    )
