"""Weights in the form that AWQ and GPTQ share: integers of 4 or 8 bits, packed into int32, in groups along K.

    w[n, k] = (code[n, k] - zero[n, g[k]]) * scale[n, g[k]]

`qweight` holds the codes, `qzeros` (G, N * bits / 32) the zero points, `scales` (G, N) the scales, `g_idx` (K,) the
group g of each input k; without it, groups follow each other. What differs between the two formats is a `Packing`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import CheckpointError
from ..ops.blocks import pack, unpack
from ..quantization import BlockQuantized, Form
from .base import Checkpoint, TensorInfo

MAX_GROUP = 1 << 20
"""Inputs of a group, at most."""

_BLOCKS = (128, 64, 32, 16)  # sizes that the engines have kernels for, the cheapest first
_CHUNK = 1 << 20  # weights unpacked at a time: the peak is the tensor and a little
_SCALES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class Packing:
    """How int32 words hold codes.

    method: for messages. bits: of a code, 4 or 8. group_size: inputs that share a scale, -1 for all of them.
    along_inputs: a word of qweight holds codes of consecutive inputs, the first in its lowest bits, so its shape is
        (K * bits / 32, N); else of consecutive outputs, (K, N * bits / 32).
    order: which of a word's outputs each field belongs to, from the lowest bits on.
    zero_shift: what was subtracted from the zero points, modulo 2 ** bits, when they were stored.
    act_order: whether g_idx may mix the groups; if not, it may only say that they follow each other.
    """

    method: str
    bits: int
    group_size: int
    along_inputs: bool
    order: tuple[int, ...]
    zero_shift: int
    act_order: bool


def read_grouped(checkpoint: Checkpoint, packing: Packing) -> dict[str, "GroupedWeight"]:
    """Every weight that has a `qweight`, by name (`….q_proj.weight`).

    Raises:
        CheckpointError: there is none, one of its other tensors is missing, or they do not fit each other.
    """
    modules = [name.removesuffix(".qweight") for name in checkpoint.tensors if name.endswith(".qweight")]
    if not modules:
        raise CheckpointError(f"{checkpoint.source.name}: config.json says {packing.method}, but there is no qweight")
    return {f"{module}.weight": GroupedWeight(checkpoint, module, packing) for module in modules}


class GroupedWeight:
    """See `PackedWeight`; (N, K) are the outputs and inputs of the linear."""

    def __init__(self, checkpoint: Checkpoint, module: str, packing: Packing) -> None:
        self._checkpoint = checkpoint
        self._module = module
        self._packing = packing
        fields = 32 // packing.bits
        words = self._shape("qweight", (torch.int32,))
        if len(words) != 2 or 0 in words:
            raise self._error("qweight", f"has shape {list(words)}; it must be a matrix")
        inputs, outputs = (words[0] * fields, words[1]) if packing.along_inputs else (words[0], words[1] * fields)
        self._group_size = inputs if packing.group_size == -1 else packing.group_size
        groups = -(-inputs // self._group_size)
        self.sources: tuple[str, ...] = (f"{module}.qweight",)
        self._require("qzeros", (torch.int32,), (groups, outputs // fields))
        self._require("scales", _SCALES, (groups, outputs))
        if f"{module}.g_idx" in checkpoint.tensors:
            self._require("g_idx", (torch.int32, torch.int64), (inputs,))
        self._inputs, self._outputs, self._num_groups = inputs, outputs, groups
        block = _block_size(self._groups())
        form = None if block is None else Form(packing.bits, block, offsets=not self._is_centred())
        unfit = "" if form else ", groups that are no blocks (act-order): dequantised"
        self.info = TensorInfo((outputs, inputs), torch.float32, f"{packing.method} {packing.bits} bits{unfit}", form)

    def load(self) -> Tensor:
        """See `PackedWeight`; the formula in float32, exact where scales have 16 bits."""
        scales, zeros, groups = self._scales(), self._zeros(), self._groups()
        weight = torch.empty(self._outputs, self._inputs)
        for part, codes in self._codes():
            group = groups[part]
            weight[:, part] = (codes.float() - zeros[:, group]) * scales[:, group]
        return weight

    def blocks(self) -> BlockQuantized | None:
        """See `PackedWeight`; an offset is (middle - zero) * scale, exact where scales have 16 bits."""
        form = self.info.form
        if form is None:
            return None
        bits = form.bits
        packed = torch.empty(self._outputs, self._inputs * bits // 8, dtype=torch.uint8)
        for part, codes in self._codes():
            packed[:, part.start * bits // 8 : part.stop * bits // 8] = pack(codes, bits)
        of_block = self._groups()[:: form.block_size]
        scales = self._scales()[:, of_block]
        offsets = ((1 << bits - 1) - self._zeros()[:, of_block]) * scales if form.offsets else None
        return BlockQuantized(bits, form.block_size, packed, scales, offsets)

    def _codes(self) -> Iterator[tuple[slice, Tensor]]:
        """Some inputs at a time, and their codes (N, inputs) uint8."""
        words, packing = self._read("qweight"), self._packing
        a_row = 32 // packing.bits if packing.along_inputs else 1  # inputs that a row of words holds
        step = max(1, _CHUNK // self._outputs // 32) * 32
        for start in range(0, self._inputs, step):
            part = slice(start, min(start + step, self._inputs))
            fields = self._fields(words[part.start // a_row : part.stop // a_row])
            if packing.along_inputs:  # (words, N, fields)
                yield part, fields.permute(1, 0, 2).flatten(1)
            else:  # (inputs, words, fields)
                yield part, self._in_order(fields).T.contiguous()

    def _fields(self, words: Tensor) -> Tensor:
        """(R, W) int32 -> the fields of each word, from the lowest bits on: (R, W, 32 / bits) uint8."""
        return unpack(words.contiguous().view(torch.uint8), self._packing.bits).unflatten(-1, (words.shape[1], -1))

    def _in_order(self, fields: Tensor) -> Tensor:
        """(R, W, 32 / bits) fields of words along outputs -> (R, N)."""
        return fields[..., torch.tensor(self._packing.order).argsort()].flatten(1)

    def _scales(self) -> Tensor:
        """(N, G) float32."""
        scales = self._read("scales").float().T
        if not scales.isfinite().all():
            raise self._error("scales", "has a value that is not a finite number; download it again")
        return scales

    def _zeros(self) -> Tensor:
        """(N, G) float32, 0 to 2 ** bits - 1."""
        stored = self._in_order(self._fields(self._read("qzeros"))).int()
        return (stored + self._packing.zero_shift).remainder(1 << self._packing.bits).float().T

    def _is_centred(self) -> bool:
        """Whether every zero point is the middle of the codes' range; compares bytes, two 4-bit fields at once."""
        stored = (1 << self._packing.bits - 1) - self._packing.zero_shift
        byte = stored if self._packing.bits == 8 else stored << 4 | stored
        return bool((self._read("qzeros").contiguous().view(torch.uint8) == byte).all())

    def _groups(self) -> Tensor:
        """The group of each input, (K,) int64."""
        following = torch.arange(self._inputs) // self._group_size
        if f"{self._module}.g_idx" not in self.sources:
            return following
        groups = self._read("g_idx").long()
        if groups.min() < 0 or groups.max() >= self._num_groups:
            raise self._error("g_idx", f"names groups outside of 0 to {self._num_groups - 1}")
        if not self._packing.act_order and not torch.equal(groups, following):
            raise self._error("g_idx", "mixes the groups, but the configuration denies desc_act")
        return groups

    def _read(self, part: str) -> Tensor:
        return self._checkpoint.load(f"{self._module}.{part}")

    def _shape(self, part: str, types: tuple[torch.dtype, ...]) -> tuple[int, ...]:
        """Of a tensor that must be there and of one of the types."""
        info = self._checkpoint.tensors.get(f"{self._module}.{part}")
        if info is None:
            raise self._error(part, f"is missing, and {self._packing.method} needs it beside qweight")
        if info.dtype not in types:
            raise self._error(part, f"is stored as {info.stored}, which is not read for {self._packing.method}")
        return info.shape

    def _require(self, part: str, types: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
        found = self._shape(part, types)
        if found != shape:
            size = self._packing.group_size
            raise self._error(part, f"has shape {list(found)}, expected {list(shape)} with group_size {size}")
        self.sources += (f"{self._module}.{part}",)

    def _error(self, part: str, message: str) -> CheckpointError:
        return CheckpointError(f"{self._checkpoint.source.name}: {self._module}.{part} {message}")


def _block_size(groups: Tensor) -> int | None:
    """The largest block size whose blocks all lie in one group; None if there is none."""
    for size in _BLOCKS:
        if len(groups) % size == 0:
            blocks = groups.reshape(-1, size)
            if torch.equal(blocks, blocks[:, :1].expand_as(blocks)):
                return size
    return None
