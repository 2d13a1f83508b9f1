"""The command as it is typed: Zonda alone on tiny bundles, for real; and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app


@pytest.fixture
def model(tmp_path) -> Path:
    """The peers' source, which nobody who takes part here reads."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return path


@pytest.fixture
def run(model, tmp_path):
    def run(*arguments: object):
        where = ["--work", tmp_path / "work", "--peers-python", tmp_path / "none"]
        return CliRunner().invoke(app, ["peers", str(model), *map(str, [*arguments, *where])])

    return run


SMALL = [
    "--new-tokens",
    "3",
    "--pairs",
    "1",
    "--threads",
    "1",
    "--loads",
    "1",
    "--prompt",
    "5",
    "--prompt",
    "20",
    "--longest-batch-prompt",
    "5",
]


def test_two_bundles_are_compared_in_one_run(run, tiny_bundle, tmp_path):
    other = shutil.copytree(tiny_bundle, tmp_path / "other")
    recorded, picture = tmp_path / "out" / "peers.json", tmp_path / "out" / "peers.png"
    small = [*SMALL, "--batch", 1, "--batch", 3, "--batch", 8, "--quality-tokens", 512]
    result = run(tiny_bundle, other, *small, "--json", recorded, "--plot", picture)
    assert result.exit_code == 0, result.output
    content = json.loads(recorded.read_text())
    assert content["titles"] == {"tiny": "Zonda tiny", "other": "Zonda other"}
    assert content["skipped"].keys() == {"llama_cpp", "ctranslate2", "openvino", "genai", "transformers"}
    runs = [run for run in content["measurement"]["runs"] if run["round"] == 0]
    seen = [(run["peer"], run["case"]["prompt_tokens"], run["case"]["batch"]) for run in runs]
    assert seen == [(peer, *case) for case in ((5, 1), (20, 1), (5, 3)) for peer in ("tiny", "other")]
    for run_ in runs:
        batch = run_["case"]["batch"]
        assert run_["prefill_s"] > 0
        assert run_["decode_s"] > 0
        assert run_["decoded_tokens"] == 2 * batch
        assert [len(row) for row in run_["token_ids"]] == [3] * batch
    for mine, others in zip(runs[::2], runs[1::2], strict=True):
        assert mine["token_ids"] == others["token_ids"]
    left_out = content["measurement"]["left_out"]
    assert [(one["peer"], one["case"]["batch"]) for one in left_out] == [("tiny", 8), ("other", 8)]
    assert left_out[0]["reason"] == "the bundle takes 4 rows"
    assert content["measurement"]["quality"] == []  # the capacity is less than a window
    assert picture.stat().st_size > 10_000

    again = CliRunner().invoke(app, ["show", str(recorded)])
    assert again.exit_code == 0
    assert "Zonda other" in again.output


def test_the_rows_of_a_batch_are_what_each_prompt_gives_alone(tiny_bundle):
    from benchmarks.peers.zonda import load
    from benchmarks.worker import Meter

    runtime = load(tiny_bundle, 1)
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12], [20, 21, 22, 23]]
    batch = Meter(3)
    runtime.generate(prompts, 4, batch)
    for row, prompt in enumerate(prompts):
        alone = Meter()
        runtime.generate([prompt], 4, alone)
        assert batch.token_ids[row] == alone.token_ids[0]
    # first tokens come one after the other, the others of a step at once
    first, *later = zip(*batch._times, strict=True)
    assert list(first) == sorted(set(first))
    assert all(len(set(step)) == 1 for step in later)
    assert later[0][0] > first[-1]


def test_logits_are_those_of_transformers(tiny_bundle, tiny_reference):
    import numpy as np
    import torch

    from benchmarks.peers.zonda import load

    model, _ = tiny_reference
    ids = [(7 * n) % 100 for n in range(40)]  # more than a chunk of 16
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(load(tiny_bundle, 1).score(ids), want, atol=3e-4, rtol=0)


def test_with_nobody_left_the_command_fails_and_says_why(run):
    result = run()
    assert result.exit_code == 1
    assert "no bundle was given" in result.stderr
    assert "genai: no interpreter at" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peer", "llamacpp"], "unknown runtime 'llamacpp'"),
        (["--peer", "zonda", "--peer", "zonda"], "two runtimes are called 'zonda'"),
        (["--quality-tokens", "100"], "whole windows of 512"),
        (["--prompt", "600", "--batch", "4"], "no prompt is as short"),
    ],
)
def test_bad_input_is_refused_with_the_reason(run, arguments, message):
    result = run(*arguments)
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_a_recording_that_is_none_is_refused(tmp_path):
    file = tmp_path / "x.json"
    file.write_text("{}")
    result = CliRunner().invoke(app, ["show", str(file)])
    assert result.exit_code == 1
    assert "not a recorded comparison" in result.stderr
