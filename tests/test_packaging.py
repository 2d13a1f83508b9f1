"""How Zonda installs: the links, the wheel, the script in the checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOMS = ["models", "export", "plugins_trt", "runtime"]


@pytest.fixture(scope="module")
def root(request) -> Path:
    return request.config.rootpath


def test_src_holds_nothing_but_relative_links(root):
    entries = {path.name: path for path in (root / "src/zonda").iterdir() if path.name != "__pycache__"}
    assert entries.keys() == {*ROOMS, "__init__.py", "build_engine.py"}
    for path in entries.values():
        assert path.is_symlink()
        assert str(path.readlink()) == f"../../{path.name}"


def test_the_root_package_imports_nothing(root):
    script = "import sys; before = set(sys.modules); import zonda; print(sorted(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['zonda']"


def test_a_room_imported_by_its_bare_name_fails_at_once(root):
    run = subprocess.run(
        [sys.executable, "-c", "import runtime.bundle"], cwd=root, capture_output=True, text=True, check=False
    )
    assert "ImportError" in run.stderr


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "-o", folder, root], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_zonda_and_nothing_else_and_works(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"zonda", wheel.name.split("-py3")[0] + ".dist-info"}
    for room in ROOMS:
        assert f"zonda/{room}/__init__.py" in names
    assert {"zonda/build_engine.py", "zonda/export/calibration.txt"} <= {*names}
    assert not any("tests" in name or "benchmarks" in name for name in names)
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    subprocess.run(pip, check=True)
    assert {p.name for p in site.iterdir()} - {"bin", "__pycache__"} == tops
    script = "import zonda.models, zonda.runtime, zonda.export, zonda.build_engine; print(zonda.__file__)"
    environment = {"PYTHONPATH": str(site), "PATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
    )
    assert run.stdout.strip() == str(site / "zonda/__init__.py")


@pytest.mark.slow
def test_a_host_that_serves_needs_nothing_but_the_cpu_extra(wheel, tmp_path, tiny_bundle):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    binaries = tmp_path / "venv" / "bin"
    subprocess.run([binaries / "pip", "install", "--quiet", f"{wheel}[cpu]"], check=True)
    listed = subprocess.run([binaries / "pip", "list"], capture_output=True, text=True, check=True).stdout
    installed = {line.split()[0] for line in listed.splitlines()}
    assert "onnxruntime" in installed
    assert not installed & {"torch", "onnx", "onnx-ir", "transformers", "polygraphy", "triton"}
    verify = subprocess.run([binaries / "zonda", "verify", tiny_bundle], capture_output=True, text=True, check=False)
    assert verify.returncode == 0, verify.stderr
    assert "proven on" in verify.stdout
    text = subprocess.run(
        [binaries / "zonda", "generate", tiny_bundle, "the wind", "--max-tokens", "8"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert text.stdout.strip()
