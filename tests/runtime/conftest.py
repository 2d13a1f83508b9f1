"""Hosts that look as if they had a GPU, and bundles with plans for the doubles of TensorRT and CUDA."""

import shutil
import sys

import msgspec
import pytest
from cuda_double import FakeCuda
from gpu_hosts import RTX_4090, rtx_target
from tensorrt_double import fake_tensorrt, write_plan

from zonda.runtime import gpu, loader, records
from zonda.runtime.bundle import open_bundle


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def host(monkeypatch):
    """`host(gpu, modules, version)` is what this host will look like."""

    def be(found=RTX_4090, modules=("tensorrt_rtx", "tensorrt", "cuda"), version="1.7.1.116"):
        monkeypatch.setattr(gpu, "is_installed", lambda module: module in modules)
        monkeypatch.setattr(gpu, "installed_version", lambda _: version)
        for room in (gpu, records):
            monkeypatch.setattr(room, "find_gpu", lambda: found)

    be()
    return be


@pytest.fixture
def with_plans(tiny_bundle, tmp_path):
    """`with_plans(target, …)` is a sealed bundle whose first targets are these, each with a plan for the doubles."""
    from zonda.export.bundle import list_files, seal

    def make(*targets):
        path = shutil.copytree(tiny_bundle, tmp_path / "bundle")
        manifest = open_bundle(path).manifest
        (path / "tensorrt-rtx").mkdir()
        for plan in {name for target in targets for name in target.weights}:
            write_plan(path / plan, manifest.contract, manifest.limits, onnx=path / "onnx/universal.onnx")
        for name in ("manifest.json", "SHA256SUMS"):
            (path / name).unlink()
        changed = msgspec.structs.replace(manifest, targets=(*targets, *manifest.targets), files=list_files(path))
        seal(path, changed)
        return path

    return make


@pytest.fixture
def with_plan(with_plans):
    """`with_plan(**changes)` is one with a single plan."""
    return lambda **changes: with_plans(rtx_target(**changes))


@pytest.fixture
def doubles(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(loader, "load_tensorrt", lambda _: fake_tensorrt(cuda))
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", cuda)
    yield cuda
    assert cuda.live() == 0
