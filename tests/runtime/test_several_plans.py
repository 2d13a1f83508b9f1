"""Plans of one kind side by side: how they are named, chosen, verified and inspected."""

import logging
import subprocess
import sys

import msgspec
import pytest
from gpu_hosts import rtx_target
from rich.console import Console

from zonda import BundleError, TargetUnavailableError
from zonda.runtime import Pipeline, loader, manifest, records
from zonda.runtime.bundle import open_bundle
from zonda.runtime.gpu import Gpu
from zonda.runtime.inspection import inspection_page
from zonda.runtime.manifest import Parity

pytestmark = pytest.mark.usefixtures("state", "host")

PROVEN = Parity(status="passed")
NAMES = ["tensorrt-rtx-plugins", "tensorrt-rtx-builtin", "onnxruntime"]


@pytest.fixture
def bundle(with_plans):
    """Two proven plans and ONNX Runtime's graph."""
    return open_bundle(with_plans(rtx_target("plugins", parity=PROVEN), rtx_target("builtin", parity=PROVEN)))


def pick(bundle, name, *others):
    target = next(target for target in bundle.manifest.targets if target.name == name)
    records.remember_pick(bundle, target, dict.fromkeys((name, *others), 1.0))


def test_they_come_in_the_order_of_the_manifest(bundle):
    assert [target.name for target in loader.targets_of(bundle, None)] == NAMES
    target, passed_over = loader.choose_target(bundle, None)
    assert (target.name, passed_over) == (NAMES[0], {})


def test_a_target_is_asked_for_by_its_name_or_its_kind(bundle):
    assert [target.name for target in loader.targets_of(bundle, "tensorrt-rtx")] == NAMES[:2]
    for name in NAMES:
        assert loader.choose_target(bundle, name)[0].name == name
    assert loader.choose_target(bundle, "tensorrt-rtx")[0].name == NAMES[0]


def test_of_a_kind_that_is_forced_a_proven_plan_comes_before_an_unproven_one(with_plans):
    bundle = open_bundle(with_plans(rtx_target("plugins"), rtx_target("builtin", parity=PROVEN)))
    assert loader.choose_target(bundle, "tensorrt-rtx")[0].name == NAMES[1]
    assert loader.choose_target(bundle, NAMES[0])[0].name == NAMES[0]


def test_the_fastest_one_is_preferred_and_the_log_says_so(bundle, doubles, caplog):
    pick(bundle, NAMES[1], NAMES[0], NAMES[2])
    with (
        caplog.at_level(logging.INFO, "zonda.runtime.loader"),
        Pipeline.load(bundle.path, verify=True) as pipeline,
    ):
        assert pipeline.target == NAMES[1]
        assert pipeline.passed_over == {NAMES[0]: f"`zonda bench` found {NAMES[1]} faster here"}
    assert f"running {NAMES[1]} (float32, the fastest here by `zonda bench`); not {NAMES[0]}: `zonda" in caplog.text
    assert loader.choose_target(bundle, "tensorrt-rtx")[0].name == NAMES[1]
    assert loader.choose_target(bundle, NAMES[0])[0].name == NAMES[0]


def test_a_pick_comes_before_what_it_was_compared_with_only(with_plans):
    full = rtx_target("x", name="tensorrt-plugins", kind="tensorrt", parity=PROVEN, compute_capabilities=(89,))
    bundle = open_bundle(with_plans(rtx_target("plugins"), rtx_target("builtin", parity=PROVEN), full))
    pick(bundle, "onnxruntime", NAMES[1])
    order = loader.with_pick(loader.targets_of(bundle, None), records.remembered_pick(bundle))
    assert [target.name for target in order] == ["tensorrt-plugins", NAMES[0], "onnxruntime", NAMES[1]]


def test_a_pick_that_cannot_run_is_passed_over_with_its_reason(with_plans):
    bundle = open_bundle(with_plans(rtx_target("plugins", parity=PROVEN), rtx_target("builtin")))
    pick(bundle, NAMES[1], NAMES[0])
    target, passed_over = loader.choose_target(bundle, None)
    assert target.name == NAMES[0]
    assert "has not been proven" in passed_over[NAMES[1]]


def test_a_pick_is_of_this_bundle_this_host_and_this_gpu(bundle, host, tiny_bundle, monkeypatch):
    pick(bundle, NAMES[1], NAMES[0])
    assert records.remembered_pick(open_bundle(tiny_bundle)) is None
    host(found=Gpu("NVIDIA A10", 86, 24 << 30))
    assert loader.choose_target(bundle, None)[0].name == NAMES[0]
    host()
    monkeypatch.setattr(records, "_host", lambda: "another host")
    assert loader.choose_target(bundle, None)[0].name == NAMES[0]
    monkeypatch.undo()


def test_a_record_that_cannot_be_read_is_none(bundle, state):
    pick(bundle, NAMES[1], NAMES[0])
    records._picked_path(bundle).write_text("{")
    assert records.remembered_pick(bundle) is None


def test_inspect_shows_both_and_the_pick(bundle):
    pick(bundle, NAMES[1], NAMES[0])
    console = Console(record=True, width=250)
    console.print(inspection_page(bundle))
    lines = console.export_text().splitlines()
    assert "runs, the fastest here by" in next(line for line in lines if NAMES[1] in line)
    assert "fastest" not in next(line for line in lines if NAMES[0] in line)


def test_a_name_that_no_target_has_is_an_error_with_the_names_that_there_are(bundle):
    with pytest.raises(TargetUnavailableError, match=f"the bundle has {', '.join(NAMES)}\n  tensorrt: the bundle was"):
        Pipeline.load(bundle.path, target="tensorrt")


def test_two_targets_of_one_name_are_no_manifest(bundle):
    target = bundle.manifest.targets[0]
    doubled = msgspec.structs.replace(bundle.manifest, targets=(target, target))
    with pytest.raises(BundleError, match="gives two targets one name: tensorrt-rtx-plugins, tensorrt-rtx-plugins"):
        manifest.decode(manifest.encode(doubled))


def test_verify_speaks_of_every_target_also_when_one_is_wrong(with_plans):
    """In a process of its own, which has no GPU: the plans are named, and what runs is proven."""
    path = with_plans(rtx_target("plugins"), rtx_target("builtin"))
    code = "from zonda.runtime.cli import main; main()"
    run = subprocess.run([sys.executable, "-c", code, "verify", path], capture_output=True, text=True, check=True)
    assert [line.split(":")[0] for line in run.stdout.splitlines()[1:]] == NAMES
    run = subprocess.run(
        [sys.executable, "-c", code, "verify", path, "--target", "tensorrt-rtx"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert [line.split(":")[0] for line in run.stdout.splitlines()[1:]] == NAMES[:2]
    assert "no target to verify on this host" in run.stderr


def test_a_plan_that_fails_its_proof_does_not_keep_the_others_from_theirs(bundle, doubles, monkeypatch, capsys):
    from zonda import ParityError
    from zonda.runtime import cli, verification

    proven = []

    def prove(_, target, engine, **options):
        if target.name == NAMES[0]:
            raise ParityError("another token is the likeliest")
        proven.append(target.name)
        return msgspec.structs.replace(bundle.manifest.targets[2].parity)

    monkeypatch.setattr(verification, "prove_target", prove)
    with pytest.raises(ParityError, match="another token"):
        cli.verify(bundle.path)
    assert proven == NAMES[1:]
    assert f"{NAMES[0]}: NOT proven" in capsys.readouterr().out
