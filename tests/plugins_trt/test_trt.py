"""The import shim, and the stand-in for the library name that TensorRT-RTX's wheels lack."""

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from zonda import BuildError, ZondaError
from zonda.plugins_trt import soname, trt

FRESH = """
import ctypes, sys
def known():
    try:
        ctypes.CDLL("libtensorrt_rtx.so")
    except OSError:
        return False
    return True
before = known()
from zonda.plugins_trt import load, soname
module = load("tensorrt_rtx")
library = ctypes.CDLL("libtensorrt_rtx.so")
print(before, known(), library.getInferLibVersion() > 0, module.__name__, soname.provide())
"""


@pytest.mark.parametrize("machine", [62, 183])
def test_the_stand_in_is_a_shared_object_that_names_one_library_and_needs_another(machine):
    data = soname.stand_in(machine)
    assert len(data) < 400
    assert data[:6] == b"\x7fELF\x02\x01"
    assert struct.unpack_from("<HH", data, 16) == (3, machine)
    offset, count = struct.unpack_from("<Q", data, 32)[0], struct.unpack_from("<H", data, 56)[0]
    segments = [struct.unpack_from("<IIQQQQQQ", data, offset + 56 * i) for i in range(count)]
    ((_, _, start, _, _, size, _, _),) = [s for s in segments if s[0] == 2]
    entries = dict(struct.iter_unpack("<QQ", data[start : start + size]))
    names = data[entries[5] : entries[5] + entries[10]]
    assert names[entries[14] :].split(b"\0")[0] == b"libtensorrt_rtx.so"
    assert names[entries[1] :].split(b"\0")[0] == b"libtensorrt_rtx.so.1"


@pytest.mark.skipif(sys.platform != "linux", reason="the name is looked up by the ELF linker")
def test_the_name_is_found_after_loading_and_nothing_was_written(rtx):
    folder = Path(sys.modules["tensorrt_rtx_libs"].__file__).parent if "tensorrt_rtx_libs" in sys.modules else None
    listed = sorted(folder.iterdir()) if folder else None
    run = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True", "True", "tensorrt_rtx", "False"]
    assert listed == (sorted(folder.iterdir()) if folder else None)


def test_a_missing_tensorrt_is_told_with_its_extra(monkeypatch):
    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(trt.importlib, "import_module", absent)
    with pytest.raises(ZondaError, match=r"tensorrt_rtx cannot be loaded.*zonda\[rtx\]"):
        trt.load("tensorrt_rtx")
    with pytest.raises(ZondaError, match=r"zonda\[tensorrt\]"):
        trt.load("tensorrt")


def test_another_name_is_refused():
    with pytest.raises(BuildError, match="choose one of"):
        trt.load("tensorrt_lean")


def test_importing_the_room_imports_no_tensorrt_no_compiler_and_no_cuda():
    heavy = ("triton", "torch", "tensorrt", "tensorrt_rtx", "cuda", "onnx", "onnx_ir")
    script = f"import sys, zonda.plugins_trt; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
