"""The Triton kernels, one file a marker. Imported only to compile or to interpret: a serving host has no Triton."""

from . import add_rms_norm, q_rms_norm, rms_norm, rope
from .configuration import Configuration, Kernel

KERNELS: dict[str, Kernel] = {
    "rms_norm": rms_norm.KERNEL,
    "add_rms_norm": add_rms_norm.KERNEL,
    "q_rms_norm": q_rms_norm.KERNEL,
    "rope": rope.KERNEL,
}

__all__ = ["KERNELS", "Configuration", "Kernel"]
