"""AWQ (Lin et al. 2023, arXiv:2306.00978) as AutoAWQ writes it for its GEMM kernels: codes along outputs, interleaved.

A word's fields hold the even outputs first: 0, 2, 4, 6, 1, 3, 5, 7 of 4 bits, 0, 2, 1, 3 of 8.
"""

from ..config import ConfigReader
from .base import Checkpoint
from .grouped import MAX_GROUP, Packing, read_grouped
from .packed import Packed


def read_awq(checkpoint: Checkpoint, read: ConfigReader) -> Packed:
    """Find the weights.

    Args:
        checkpoint: the folder as it is.
        read: its `quantization_config`.

    Raises:
        ConfigError: an option is not supported.
        CheckpointError: see `read_grouped`.
    """
    bits = read.integer("bits" if read.has("bits") else "w_bit")
    if bits not in (4, 8):
        raise read.error(f"bits {bits} is not supported; supported: 4, 8")
    group_size = read.integer("group_size" if read.has("group_size") else "q_group_size", minimum=-1, maximum=MAX_GROUP)
    if group_size == 0:
        raise read.error("group_size must be -1 or at least 1, found 0")
    version = read.text("version", "gemm").lower()
    if version != "gemm":
        raise read.error(f"version {version!r} packs its codes in another way; supported: gemm")
    if not read.boolean("zero_point", True):
        raise read.error("zero_point false is not supported: the gemm format has zero points")
    fields = range(32 // bits)
    packing = Packing(
        method="AWQ",
        bits=bits,
        group_size=group_size,
        along_inputs=False,
        order=(*fields[0::2], *fields[1::2]),
        zero_shift=0,
        act_order=False,
    )
    return Packed(read_grouped(checkpoint, packing))
