"""docs/adding-a-model.md is taken at its word: its files go into a copy of the project, and its tests pass there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs/adding-a-model.md").read_text()
COPIED = [
    "models",
    "export",
    "runtime",
    "plugins_trt",
    "src",
    "tests",
    "__init__.py",
    "build_engine.py",
    "pyproject.toml",
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


ORIGINAL, FILE, TEST = blocks("python")
*CHANGES, REGISTRY = blocks("diff")


def applied(source: str, diff: str) -> str:
    """A diff without line numbers: each hunk's old lines stand in the source once."""
    for hunk in diff.split("@@\n"):
        old = "".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] in " -")
        new = "".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] in " +")
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def copy(place: Path) -> Path:
    place.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, place / name)
    return place


def contents(place: Path) -> dict[str, bytes]:
    files = [path for path in place.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(p.relative_to(place)): p.read_bytes() for p in files if "__pycache__" not in p.parts}


def test_the_diffs_lead_from_the_original_to_the_file():
    for diff in CHANGES:
        for line in diff.splitlines():
            whole = f"{line[1:]}\n"
            assert whole in (FILE if line[0] == "+" else ORIGINAL), line


def test_the_file_is_as_short_as_every_architecture():
    assert len(FILE.splitlines()) <= 200


def test_the_project_s_style_holds_in_the_file(tmp_path):
    (tmp_path / "squall.py").write_text(FILE)
    for command in (["check", "--ignore", "INP001"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", str(ROOT / "pyproject.toml"), "squall.py"]
        subprocess.run(ruff, cwd=tmp_path, check=True)


def add_squall(place: Path, file: str) -> Path:
    """A copy of the project with Squall in it, as the guide says."""
    copy(place)
    before = contents(place)
    (place / "models/squall.py").write_text(file)
    registry = place / "models/registry.py"
    registry.write_text(applied(registry.read_text(), REGISTRY))
    after = contents(place)
    assert {name for name in after if after[name] != before.get(name)} == {"models/squall.py", "models/registry.py"}
    (place / "tests/models/squall_original.py").write_text(ORIGINAL)
    (place / "tests/models/test_squall.py").write_text(TEST)
    return place


def run_its_test(place: Path, *options: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(place / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *options]
    command.append("tests/models/test_squall.py")
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False).stdout


def test_squall_is_added_with_two_files_and_builds_and_verifies(tmp_path):
    said = run_its_test(add_squall(tmp_path / "project", FILE))
    assert "7 passed" in said, said[-4000:]


@pytest.mark.slow
def test_a_wrong_line_in_the_file_is_seen(tmp_path):
    """What the guide's test compares is not blind: without the square it fails."""
    wrong = FILE.replace(".square()", "")
    assert wrong != FILE
    assert "6 failed" in run_its_test(add_squall(tmp_path / "project", wrong), "-k", "original")
