"""GPTQ (Frantar et al. 2022, arXiv:2210.17323) as AutoGPTQ and GPTQModel write it: codes along inputs.

The first format, `gptq`, stores zero points less one, modulo 2 ** bits; `gptq_v2` stores them as they are.
"""

from ..config import ConfigReader
from .base import Checkpoint
from .grouped import MAX_GROUP, Packing, read_grouped
from .packed import Packed

_ZERO_SHIFT = {"gptq": 1, "gptq_v2": 0}


def read_gptq(checkpoint: Checkpoint, read: ConfigReader) -> Packed:
    """Find the weights.

    Args:
        checkpoint: the folder as it is.
        read: its `quantization_config`.

    Raises:
        ConfigError: an option is not supported.
        CheckpointError: see `read_grouped`.
    """
    bits = read.integer("bits")
    if bits not in (4, 8):
        raise read.error(f"bits {bits} is not supported; supported: 4, 8")
    group_size = read.integer("group_size", minimum=-1, maximum=MAX_GROUP)
    if group_size == 0:
        raise read.error("group_size must be -1 or at least 1, found 0")
    read.choice("pack_dtype", ("int32",), "int32")
    overrides = [rule for rule in read.section("dynamic").names() if not rule.startswith("-:")]
    if overrides:
        raise read.error(f"dynamic gives {overrides[0]!r} a quantisation of its own, which is not supported")
    version = read.choice("checkpoint_format", _ZERO_SHIFT, "gptq")
    packing = Packing(
        method="GPTQ",
        bits=bits,
        group_size=group_size,
        along_inputs=True,
        order=tuple(range(32 // bits)),
        zero_shift=_ZERO_SHIFT[version],
        act_order=read.boolean("desc_act", True),
    )
    return Packed(read_grouped(checkpoint, packing))
