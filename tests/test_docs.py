"""README and docs tell the truth: their commands and code run, their links lead somewhere."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands() -> list[str]:
    """README's shell lines that call zonda."""
    lines = (line.split("#")[0].strip() for block in blocks(ROOT / "README.md", "sh") for line in block.splitlines())
    return [line for line in lines if line.startswith("zonda ")]


@pytest.mark.slow
def test_the_python_example_runs(smollm2_bundle):
    (code,) = blocks(ROOT / "README.md", "python")
    assert len(code.strip().splitlines()) <= 11
    run = subprocess.run(
        [sys.executable, "-c", code.replace("out/smollm2", str(smollm2_bundle))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.startswith(" Paris")
    assert len(run.stdout) > 100


@pytest.mark.parametrize("line", commands())
def test_the_shell_examples_run(line, tiny_folder, tiny_bundle, tmp_path):
    line = line.replace("MODEL", str(tiny_folder))
    line = line.replace("-o BUNDLE", f"-o {tmp_path / 'built'}").replace("BUNDLE", str(tiny_bundle))
    command = [sys.executable, "-c", "from zonda.runtime.cli import main; main()", *shlex.split(line)[1:]]
    subprocess.run(command, input="hello\n", capture_output=True, text=True, check=True)


def test_the_examples_were_found():
    assert len(commands()) == 11


def test_every_make_command_is_a_target():
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"\bmake ([a-z][a-z-]*)\b", " ".join(blocks(page, "sh"))):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_are_python(page):
    for code in blocks(page, "python"):
        ast.parse(code)


def test_the_guide_names_what_exists():
    """Every type and function that the guide tells to use is there under that name."""
    from zonda.models import architecture, cache, config, decoder, layers, ops

    rooms = (architecture, cache, config, decoder, layers, ops)
    known = {name for room in rooms for name in vars(room)}
    guide = (ROOT / "docs/adding-a-model.md").read_text()
    for name in re.findall(r"`([A-Za-z]+)\(", guide) + re.findall(r"`([A-Z][A-Za-z]+)`", guide):
        if name not in ("Cache", "B", "K", "V"):
            assert name in known or name in ("Loader",), name


def test_the_table_of_thresholds_is_the_one_in_use():
    from zonda.runtime.metrics import THRESHOLDS

    rows = re.findall(
        r"^\| ([\w-]+) \| ([\d.e+-]+) \| ([\d.e+-]+) \| ([\d.e+-]+) \| ([\d.e+-]+) \|$",
        (ROOT / "docs/parity.md").read_text(),
        re.MULTILINE,
    )
    assert {name for name, *_ in rows} == THRESHOLDS.keys()
    for name, *figures in rows:
        t = THRESHOLDS[name]
        wanted = (t.max_error, t.relative_error, t.norm_ratio, t.kv_error)
        assert [float(figure) for figure in figures] == pytest.approx(wanted, rel=0.05), name  # two digits
