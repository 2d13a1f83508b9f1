"""The CUDA driver's calls as cuda-python sees them, against a double of `cuda.bindings.driver`."""

import enum
from types import SimpleNamespace

import pytest

from zonda import EngineError
from zonda.plugins_trt import cuda

Result = enum.Enum("CUresult", ["CUDA_SUCCESS", "CUDA_ERROR_INVALID_IMAGE"])
Attribute = enum.Enum("A", [f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}" for part in ("MAJOR", "MINOR")])
SHARED = "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"


@pytest.fixture
def calls():
    return []


@pytest.fixture
def driver(calls):
    answers = {
        "cuCtxGetCurrent": 0x77,
        "cuCtxGetDevice": "device",
        "cuModuleLoadData": "module",
        "cuModuleGetFunction": "function",
        "cuModuleUnload": None,
        "cuFuncSetAttribute": None,
        "cuLaunchKernel": None,
    }

    def method(name):
        def call(*arguments):
            calls.append((name, *arguments))
            if name == "cuDeviceGetAttribute":
                return Result.CUDA_SUCCESS, 12 if arguments[0].name.endswith("MAJOR") else 1
            return (Result.CUDA_SUCCESS,) if answers[name] is None else (Result.CUDA_SUCCESS, answers[name])

        return call

    bindings = SimpleNamespace(
        CUresult=Result,
        CUdevice_attribute=Attribute,
        CUfunction_attribute=SimpleNamespace(**{SHARED: SHARED}),
        **{name: method(name) for name in (*answers, "cuDeviceGetAttribute")},
    )
    return cuda.CudaDriver(bindings)


def test_capability_is_major_and_minor(driver):
    assert (driver.capability(), driver.context()) == (121, 0x77)


def test_a_launch_is_one_call(driver, calls):
    driver.launch("function", 7, 128, 64, 0xABC, 0x1000)
    assert calls == [("cuLaunchKernel", "function", 7, 1, 1, 128, 1, 1, 64, 0xABC, 0x1000, 0)]


@pytest.mark.parametrize(("shared", "asked"), [(48 * 1024, False), (48 * 1024 + 1, True)])
def test_much_shared_memory_is_asked_for(driver, calls, shared, asked):
    assert driver.function("module", "kernel", shared) == "function"
    assert (("cuFuncSetAttribute", "function", SHARED, shared) in calls) is asked


def test_modules_come_and_go(driver, calls):
    assert driver.load(b"image") == "module"
    driver.unload("module")
    assert calls == [("cuModuleLoadData", b"image"), ("cuModuleUnload", "module")]


def test_a_refusal_is_an_engine_error_with_cudas_words():
    bindings = SimpleNamespace(CUresult=Result, cuModuleLoadData=lambda _: (Result.CUDA_ERROR_INVALID_IMAGE, None))
    with pytest.raises(EngineError, match="cuModuleLoadData failed: CUDA_ERROR_INVALID_IMAGE"):
        cuda.CudaDriver(bindings).load(b"x")


def test_a_host_without_the_nvidia_driver_is_told_so():
    def missing():
        raise RuntimeError("cuda is an NVIDIA driver library")

    with pytest.raises(EngineError, match="cuCtxGetCurrent failed: cuda is an NVIDIA driver library"):
        cuda.CudaDriver(SimpleNamespace(CUresult=Result, cuCtxGetCurrent=missing)).context()


def test_a_host_without_cuda_python_is_told_what_to_install(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(cuda.importlib, "import_module", absent)
    with pytest.raises(EngineError, match="pip install cuda-python"):
        cuda.CudaDriver()
