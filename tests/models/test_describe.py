"""docs/models.md is what the registry says, and architecture files are short."""

import sys
from pathlib import Path

import pytest

from zonda.models import describe
from zonda.models.registry import ARCHITECTURES

ROOT = Path(__file__).parents[2]
MOST_LINES = 200


def test_the_committed_page_is_what_the_generator_prints():
    assert (ROOT / "docs/models.md").read_text() == describe.page(), "python -m zonda.models.describe > docs/models.md"


def test_every_architecture_has_a_row_of_its_own():
    page = describe.page()
    for architecture in ARCHITECTURES:
        rows = [line for line in page.splitlines() if f"`{architecture.names[0]}`" in line]
        assert len(rows) == 1
        assert all(f"`{name}`" in rows[0] for name in architecture.names)
    assert len({line.split("](")[1] for line in page.splitlines() if line.startswith("| [")}) == len(ARCHITECTURES)


def test_refusals_are_found_by_asking():
    (llama,) = [a for a in ARCHITECTURES if "LlamaForCausalLM" in a.names]
    assert set(describe.refusals(llama)) == {
        "`sliding_window`: Llama has no windowed attention",
        "`hidden_act` other than silu",
    }


def architecture_files() -> list[Path]:
    files = {sys.modules[a.read_config.__module__].__file__ for a in ARCHITECTURES}
    return sorted(ROOT / "models" / Path(file).name for file in files)


def test_each_architecture_has_a_file_of_its_own():
    assert len(architecture_files()) == len(ARCHITECTURES)


@pytest.mark.parametrize("file", architecture_files(), ids=lambda file: file.name)
def test_an_architecture_file_is_short(file):
    lines = len(file.read_text().splitlines())
    print(f"{lines:4} {file.name}")
    assert lines <= MOST_LINES
