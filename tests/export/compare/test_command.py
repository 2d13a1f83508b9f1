import json

import pytest
from conftest import build_quietly, write_folder
from typer.testing import CliRunner

from zonda import BundleError, RequestError, TargetUnavailableError, ZondaError
from zonda.export.compare.command import run_comparison
from zonda.export.compare.specs import Source, chain, open_sources, parse
from zonda.runtime.cli import app


def run(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.fixture(scope="session")
def other_bundle(tmp_path_factory):
    """Built from a checkpoint of the same shape with other weights in one layer's norm."""
    from safetensors.torch import load_file, save_file

    folder = write_folder(tmp_path_factory.mktemp("other") / "tiny")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.post_attention_layernorm.weight"] *= 1.01
    save_file(weights, folder / "model.safetensors")
    return build_quietly(folder, folder.parent / "bundle", max_batch=4, max_chunk=16)


def test_a_bundle_agrees_with_its_checkpoint(tiny_folder, tiny_bundle):
    result = run(f"torch:{tiny_folder}", tiny_bundle, "--layers", "--json", "-")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["agrees"]
    assert found["finding"] is None
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    assert all(layer["single"] < 1e-5 and layer["worst"] for layer in found["layers"])
    assert {step["verdict"] for step in found["steps"]} == {"pass"}
    assert found["steps"][0]["title"] == "ragged prefill"


def test_the_table_names_both_and_every_step(tiny_bundle):
    result = run(f"lowered:{tiny_bundle}", tiny_bundle)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert f"lowered:{tiny_bundle}" in "".join(lines[:4])
    assert "they agree" in lines[-1]
    assert sum("PASS" in line for line in lines) == sum(line.strip()[:1].isdigit() for line in lines)


def test_transformers_is_a_reference_like_any_other(tiny_folder):
    assert run_comparison(f"transformers:{tiny_folder}", f"torch:{tiny_folder}").agrees


def test_bundles_that_differ_exit_with_1_and_say_where(tiny_bundle, other_bundle, tmp_path):
    written = tmp_path / "found.json"
    result = run(tiny_bundle, other_bundle, "--json", written)
    assert result.exit_code == 1
    assert "they differ" in result.stdout
    finding = json.loads(written.read_text())["finding"]
    assert finding["stage"] == "model"
    assert finding["module"] == "model.layers.1.post_attention_layernorm"
    assert finding["explanation"] == (
        "its model.layers.1.post_attention_layernorm.weight differs in 64 of 64 values, first at [0], "
        "1.01 times as large"
    )
    assert finding["sentence"].startswith("model: ")


def test_the_definition_is_bisected_by_module(tiny_folder, other_bundle):
    other = other_bundle.parent / "tiny"
    found = run_comparison(f"transformers:{tiny_folder}", f"torch:{other}")
    assert found.finding.stage == "definition"
    assert (found.finding.layer, found.finding.module) == (1, "model.layers.1.post_attention_layernorm")


def test_a_picture(tiny_bundle, tmp_path):
    picture = tmp_path / "out.png"
    assert run(f"universal:{tiny_bundle}", tiny_bundle, "--plot", picture).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_own_prompts_are_fed(tiny_bundle):
    found = run_comparison(f"lowered:{tiny_bundle}", str(tiny_bundle), ["the wind", "dry"])
    assert found.agrees
    assert len(found.steps[0].kv_errors) == 4


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("nothing", RequestError, "no engine bundle; for a checkpoint write torch:nothing"),
        ("universal:nothing", BundleError, "no such directory"),
        ("torch:nothing", ZondaError, "no such file or folder"),
    ],
)
def test_what_cannot_be_opened_is_named(tiny_bundle, spec, error, words):
    with pytest.raises(error, match=words):
        run_comparison(spec, str(tiny_bundle))


def test_an_unknown_target_is_named(tiny_bundle):
    with pytest.raises(TargetUnavailableError, match="tensorrt"):
        run_comparison(f"lowered:{tiny_bundle}", f"{tiny_bundle}:tensorrt")


def test_the_chain_between_two_specs_holds_what_lies_between(tiny_folder, tiny_bundle):
    def kinds(a, b):
        specs = parse(a), parse(b)
        return [subject.kind for subject in chain(*specs, open_sources(*specs))]

    engine = str(tiny_bundle)
    assert kinds(f"torch:{tiny_folder}", engine) == ["eager", "program", "universal", "lowered", "engine"]
    assert kinds(engine, f"universal:{tiny_bundle}") == ["universal", "lowered", "engine"]
    assert kinds(engine, f"torch:{tiny_folder}")[0] == "eager"
    assert kinds(f"torch:{tiny_folder}", f"universal:{tiny_bundle}") == ["eager", "program", "universal"]


def test_a_checkpoint_without_a_bundle_takes_its_own_limits(tiny_folder):
    source = Source(parse(f"torch:{tiny_folder}"))
    assert source.limits.capacity == 128
    assert source.tokenizer() is not None
