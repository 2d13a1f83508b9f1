"""Make the name `libtensorrt_rtx.so` resolvable in this process.

The wheels of TensorRT-RTX ship `libtensorrt_rtx.so.1` only. When its ONNX parser adds the first plugin layer it
opens `libtensorrt_rtx.so`, and the process aborts if that name is unknown. The dynamic linker knows a name as soon
as an object with that SONAME is loaded, so a shared object is written into memory that holds nothing but this
SONAME and a dependency on `libtensorrt_rtx.so.1`, through which every symbol is found. No file is written.
"""

import ctypes
import os
import platform
import struct
import sys

NAME, REAL = "libtensorrt_rtx.so", "libtensorrt_rtx.so.1"

_MACHINES = {"x86_64": 62, "aarch64": 183}  # e_machine of the ELF specification


def provide() -> bool:
    """Load the stand-in, if this platform needs it; call after the real library is loaded.

    Returns:
        Whether it was needed and loaded.

    Raises:
        OSError: it was needed, and the linker refuses it.
    """
    machine = _MACHINES.get(platform.machine())
    if sys.platform != "linux" or machine is None or _resolvable():
        return False
    file = os.memfd_create(NAME)
    try:
        os.write(file, stand_in(machine))
        # Never unloaded: ctypes keeps what it loads for the life of the process.
        ctypes.CDLL(f"/proc/self/fd/{file}", mode=ctypes.RTLD_GLOBAL)
    finally:
        os.close(file)
    return True


def stand_in(machine: int) -> bytes:
    """A 64-bit little-endian shared object: SONAME `libtensorrt_rtx.so`, NEEDED `libtensorrt_rtx.so.1`, no symbols.

    The layout is header, two program headers (LOAD, DYNAMIC), dynamic section, one empty hash bucket, the null
    symbol, strings; see the ELF-64 object file format, version 1.5.
    """
    names = b"\0" + NAME.encode() + b"\0" + REAL.encode() + b"\0"
    headers = 64 + 2 * 56
    hash_table = headers + 8 * 16
    symbols = hash_table + 4 * 4
    strings = symbols + 24
    size = strings + len(names)
    dynamic = struct.pack(
        "<16Q",
        *(14, 1),  # DT_SONAME: offset in the strings
        *(1, 1 + len(NAME) + 1),  # DT_NEEDED
        *(4, hash_table),  # DT_HASH
        *(5, strings),  # DT_STRTAB
        *(6, symbols),  # DT_SYMTAB
        *(10, len(names)),  # DT_STRSZ
        *(11, 24),  # DT_SYMENT
        *(0, 0),  # DT_NULL
    )
    identity = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)
    header = struct.pack("<16sHHIQQQIHHHHHH", identity, 3, machine, 1, 0, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 6, 0, 0, 0, size, size, 0x10000)
    where = struct.pack("<IIQQQQQQ", 2, 6, headers, headers, headers, len(dynamic), len(dynamic), 8)
    buckets = struct.pack("<4I", 1, 1, 0, 0)
    return header + load + where + dynamic + buckets + bytes(24) + names


def _resolvable() -> bool:
    try:
        ctypes.CDLL(NAME)
    except OSError:
        return False
    return True
