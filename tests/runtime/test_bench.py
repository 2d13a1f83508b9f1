"""`zonda bench`: what is measured, how the rounds go, and what is picked. Nothing here depends on how fast a host is."""

import json
import subprocess
import sys

import pytest
from gpu_hosts import rtx_target
from rich.console import Console

from zonda import EngineError, RequestError
from zonda.runtime import bench, bench_worker, loader, records
from zonda.runtime.bench import bench as run_bench
from zonda.runtime.bench import make_plan, measure_elsewhere
from zonda.runtime.bench_page import bench_page
from zonda.runtime.bench_worker import Case, Reading, Request, Timing
from zonda.runtime.bundle import open_bundle
from zonda.runtime.manifest import Limits, Parity

PROVEN = Parity(status="passed")
PLUGINS, BUILTIN, ORT = "tensorrt-rtx-plugins", "tensorrt-rtx-builtin", "onnxruntime"
LIMITS = Limits(capacity=2048, max_batch=8, max_chunk=512, vocab_size=100)


def zonda(*arguments):
    command = [sys.executable, "-c", "from zonda.runtime.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


class Double:
    """A reading of each target in turn: a step of a target takes `step` seconds, a prompt a hundredth of it a token."""

    def __init__(self, steps, dying=()):
        self.steps, self.dying, self.requests = steps, dying, []

    def __call__(self, request):
        self.requests.append(request)
        if request.target in self.dying:
            raise EngineError("the GPU fell off the bus")
        step = self.steps[request.target]
        timings = (
            Timing(case.batch * case.prompt_tokens * step / 100, (request.new_tokens - 1) * step)
            for case in request.cases
        )
        return Reading(2.0 + step, 1000, tuple(timings))


def measured(path, double, wanted=None, **options):
    bundle = open_bundle(path)
    plan = make_plan(bundle.manifest.limits, batch=2, new_tokens=11, repeat=3)
    return run_bench(bundle, loader.targets_of(bundle, wanted), plan, measure=double, **options)


def page(report):
    console = Console(record=True, width=250)
    console.print(bench_page(report), markup=False)
    return console.export_text()


def test_the_command_measures_and_writes_what_it_measured(tiny_bundle, tmp_path):
    out = tmp_path / "bench.json"
    result = zonda("bench", tiny_bundle, "--repeat", 1, "--tokens", 4, "--batch", 2, "--json", out)
    assert result.returncode == 0, result.stderr
    assert "onnxruntime" in result.stdout
    assert "prompts of at most 124 tokens: the capacity is 128" in result.stdout
    (target,) = json.loads(out.read_text())["targets"]
    assert (target["name"], target["proven"], target["failure"]) == ("onnxruntime", True, "")
    assert [(f["prompt_tokens"], f["batch"]) for f in target["figures"]] == [(32, 1), (124, 1), (32, 2), (124, 2)]
    assert min(min(f.values()) for f in target["figures"]) > 0
    assert target["peak_rss"] > 10_000_000
    assert target["load_s"] > 0
    assert len(target["readings"]) == 1


def test_json_goes_to_standard_output_alone(tiny_bundle):
    result = zonda("bench", tiny_bundle, "--repeat", 1, "--tokens", 2, "--batch", 1, "--json", "-")
    assert json.loads(result.stdout)["picked"] == ""


def test_a_target_that_cannot_run_is_said_and_alone_it_is_an_error(tiny_bundle):
    result = zonda("bench", tiny_bundle, "--target", "tensorrt")
    assert result.returncode == 1
    assert "no target to measure on this host" in result.stderr


@pytest.mark.parametrize(
    ("limits", "options", "found"),
    [
        (LIMITS, {}, ((32, 512, 1500), 4, 64, ())),
        (
            Limits(capacity=600, max_batch=2, max_chunk=512, vocab_size=100),
            {"batch": 4, "new_tokens": 100},
            (
                (32, 500),
                2,
                100,
                (
                    "prompts of at most 500 tokens: the capacity is 600",
                    "2 rows instead of 4: the bundle was built for no more",
                ),
            ),
        ),
        (
            Limits(capacity=20, max_batch=1, max_chunk=20, vocab_size=100),
            {"batch": 1},
            (
                (10,),
                1,
                10,
                (
                    "10 new tokens instead of 64: the capacity is 20",
                    "prompts of at most 10 tokens: the capacity is 20",
                ),
            ),
        ),
    ],
)
def test_what_does_not_fit_is_cut_and_said(limits, options, found):
    plan = make_plan(limits, **options)
    assert (plan.prompts, plan.batch, plan.new_tokens, plan.notes) == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "--batch must be at least 1, found 0"),
        ({"new_tokens": 1}, "--tokens must be at least 2, found 1"),
        ({"repeat": 0}, "--repeat must be at least 1, found 0"),
    ],
)
def test_numbers_that_measure_nothing_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        make_plan(LIMITS, **options)


def test_a_capacity_in_which_nothing_fits_is_refused():
    with pytest.raises(RequestError, match="a capacity of 3 tokens is too small to measure"):
        make_plan(Limits(capacity=3, max_batch=1, max_chunk=3, vocab_size=100))


@pytest.mark.usefixtures("state", "host")
class TestRounds:
    @pytest.fixture
    def path(self, with_plans):
        return with_plans(rtx_target("plugins", parity=PROVEN), rtx_target("builtin", parity=PROVEN))

    def test_targets_take_turns_in_an_order_that_moves_on_each_round_with_its_own_prompts(self, path):
        double = Double({PLUGINS: 3, BUILTIN: 2, ORT: 5})
        measured(path, double)
        assert [(request.target, request.seed) for request in double.requests] == [
            *((name, 0) for name in (PLUGINS, BUILTIN, ORT)),
            *((name, 1) for name in (BUILTIN, ORT, PLUGINS)),
            *((name, 2) for name in (ORT, PLUGINS, BUILTIN)),
        ]
        assert set(double.requests[0].cases) == {Case(prompt, batch) for prompt in (32, 117) for batch in (1, 2)}

    def test_figures_are_medians_and_the_time_of_a_request_is_their_sum(self, path):
        steps = iter((9.0, 1.0, 2.0))
        report = measured(path, lambda request: Double({PLUGINS: next(steps)})(request), PLUGINS)
        (target,) = report.targets
        assert [f.first_token_s for f in target.figures] == pytest.approx([0.64, 2.34, 1.28, 4.68])
        assert [f.prefill_tokens_per_s for f in target.figures] == pytest.approx([50.0] * 4)
        assert [f.decode_tokens_per_s for f in target.figures] == pytest.approx([0.5, 0.5, 1.0, 1.0])
        assert (target.load_s, target.peak_rss) == (4.0, 1000)
        assert target.request_s == pytest.approx((0.64 + 2.34) / 2 + 128 * 2)

    def test_the_fastest_proven_target_is_what_this_host_then_loads(self, path, doubles):
        report = measured(path, Double({PLUGINS: 3, BUILTIN: 2, ORT: 5}))
        assert report.picked == BUILTIN
        assert f"picked: {BUILTIN}" in page(report)
        record = records.remembered_pick(open_bundle(path))
        assert list(record.request_s) == [PLUGINS, BUILTIN, ORT]
        target, passed_over = loader.choose_target(open_bundle(path), None)
        assert (target.name, passed_over) == (BUILTIN, {PLUGINS: f"`zonda bench` found {BUILTIN} faster here"})
        assert measured(path, Double({PLUGINS: 1, BUILTIN: 2, ORT: 5})).picked == PLUGINS
        assert loader.choose_target(open_bundle(path), None)[0].name == PLUGINS

    def test_a_single_target_and_no_pick_leave_no_record(self, path):
        assert measured(path, Double({PLUGINS: 3}), PLUGINS).picked == ""
        assert measured(path, Double({PLUGINS: 3, BUILTIN: 2, ORT: 5}), pick=False).picked == ""
        assert records.remembered_pick(open_bundle(path)) is None

    def test_an_unproven_target_is_measured_but_not_picked(self, with_plans):
        path = with_plans(rtx_target("plugins", parity=PROVEN), rtx_target("builtin"))
        report = measured(path, Double({PLUGINS: 3, BUILTIN: 2, ORT: 5}))
        assert report.picked == PLUGINS
        assert list(records.remembered_pick(open_bundle(path)).request_s) == [PLUGINS, ORT]
        assert f"{BUILTIN} is not proven, so it is not picked: `zonda verify`" in page(report)

    def test_a_target_that_fails_is_reported_and_the_others_go_on(self, path):
        double = Double({BUILTIN: 2, ORT: 5}, dying=(PLUGINS,))
        report = measured(path, double)
        assert [request.target for request in double.requests].count(PLUGINS) == 1
        assert f"{PLUGINS}: not measured: the GPU fell off the bus" in page(report)
        assert report.picked == BUILTIN
        assert len(report.targets[2].readings) == 3

    def test_what_this_host_cannot_run_is_not_tried(self, path, host):
        host(modules=("cuda",))
        double = Double({ORT: 5})
        report = measured(path, double)
        assert {request.target for request in double.requests} == {ORT}
        assert f"{PLUGINS}: not measured: tensorrt_rtx is not installed" in page(report)
        assert report.picked == ""

    def test_a_plan_is_measured_as_it_is_served(self, path, doubles):
        """The worker's own code, in this process, on the doubles of TensorRT and CUDA."""
        report = measured(path, bench_worker.measure, PLUGINS, pick=False)
        assert min(f.decode_tokens_per_s for f in report.targets[0].figures) > 0
        assert doubles.count("cuGraphLaunch") > 0


def test_a_worker_that_cannot_load_says_why(tiny_bundle):
    request = Request(
        bundle=str(tiny_bundle), target="tensorrt", threads=None, cases=(Case(2, 1),), new_tokens=2, seed=0
    )
    with pytest.raises(EngineError, match=r"tensorrt: the bundle was not built for it"):
        measure_elsewhere(request)


def test_a_worker_that_dies_is_an_error(tiny_bundle, monkeypatch):
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], -9, b"", b"words"))
    with pytest.raises(EngineError, match=r"it died \(exit status -9\): words"):
        measure_elsewhere(Request(bundle="", target="", threads=None, cases=(), new_tokens=2, seed=0))


def test_it_needs_neither_torch_nor_onnx():
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnx_ir', 'transformers', 'triton'): sys.modules[name] = None\n"
        "import zonda.runtime.bench_page, zonda.runtime.bench_worker\n"
        "assert 'onnxruntime' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
