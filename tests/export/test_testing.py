"""What users write in their own tests: the assertion, the option, and the example of docs/parity.md."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from zonda.export.testing import assert_engine_matches

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
PROMPTS = ["the wind comes down", [5, 6, 7, 8, 9, 10, 11], "hot and dry"]


def test_the_engine_matches_its_checkpoint(tiny_bundle, tiny_folder):
    parity = assert_engine_matches(tiny_bundle, tiny_folder, PROMPTS)
    assert {report.name for report in parity.schedules} >= {"prefill", "decode", "ragged batch"}
    assert all(report.kv_error < 1e-5 for report in parity.schedules)


def test_the_engine_matches_transformers(tiny_bundle, tiny_folder):
    parity = assert_engine_matches(tiny_bundle, f"transformers:{tiny_folder}", PROMPTS)
    assert all(report.kv_error is None for report in parity.schedules)
    assert parity.reference == f"transformers:{tiny_folder}"


def test_any_function_may_be_the_reference_and_a_difference_is_an_assertion(tiny_bundle, tiny_reference):
    model, _ = tiny_reference

    def run(ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(ids)[None]).logits[0].numpy()

    assert_engine_matches(tiny_bundle, run, PROMPTS)
    with pytest.raises(AssertionError, match=r"schedule 'prefill', step 0 .* norm of the logits is off by"):
        assert_engine_matches(tiny_bundle, lambda ids: run(ids) * np.float32(1.01), PROMPTS)


def example() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return code


def run_pytest(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


def test_the_example_of_the_docs_runs(tiny_bundle, tiny_folder, tmp_path):
    (tmp_path / "test_engine.py").write_text(example().replace("CHECKPOINT", str(tiny_folder)))
    result = run_pytest(tmp_path, "--zonda-bundle", str(tiny_bundle))
    assert "2 passed" in result.stdout, result.stdout


def test_without_the_option_such_tests_are_skipped_with_the_reason(tmp_path):
    (tmp_path / "test_engine.py").write_text(example())
    result = run_pytest(tmp_path, "-rs")
    assert "2 skipped" in result.stdout
    assert "needs --zonda-bundle BUNDLE" in result.stdout


def test_the_plugin_costs_other_tests_nothing():
    code = "import sys, zonda.export.testing; print([m for m in ('torch', 'onnx', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
