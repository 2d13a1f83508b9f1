"""Both measurements on the tiny bundle: what they report is what happened; no figure is judged."""

import pytest

from benchmarks import host_time, speculate
from benchmarks.speculate import Pair


def test_a_pair_has_times_drafts_and_the_first_difference(tiny_bundle, monkeypatch):
    monkeypatch.setattr(speculate, "PROMPTS", {"repeats": "the wind the wind"})
    pairs = speculate.measure_speculation(tiny_bundle, 1, 12, 2)
    assert len(pairs) == 2
    for pair in pairs:
        assert pair.first_difference is None
        assert pair.plain_s > 0
        assert pair.drafting_s > 0
        assert 0 <= pair.accepted <= pair.drafted
        assert 0 < pair.tokens <= 12


def test_the_ratio_is_that_of_pairs_and_differences_are_shown():
    pairs = [
        Pair("x", 0.2, 0.1, 9, 4, 3, None),
        Pair("x", 0.3, 0.1, 9, 4, 3, 5, 0.0123),
        Pair("x", 0.1, 0.1, 9, 4, 3, None),
    ]
    (row,) = zip(*(column.cells for column in speculate.table(pairs).columns), strict=True)
    assert row[4] == "2.00 (1.00–3.00)"
    assert row[-1] == "2 of 3; token 5: 0.012 nats"


def test_the_gap_is_between_the_two_tokens_after_what_is_common(tiny_bundle):
    from zonda.runtime import Pipeline, SamplingParams

    with Pipeline.load(tiny_bundle, threads=1) as pipeline:
        ids = pipeline.encode("the wind")
        greedy = SamplingParams(temperature=0.0, max_tokens=3, logprobs=20, ignore_eos=True)
        result = pipeline.generate(ids, greedy)
        first, second = result.logprobs[2].top_logprobs[:2]
        other = [*result.token_ids[:2], second.token_id]
        gap = speculate._gap(pipeline, ids, result.token_ids, other, 2)
        assert gap == pytest.approx(first.logprob - second.logprob, abs=1e-3)


def test_host_times_are_of_decode_steps_only(tiny_bundle, monkeypatch):
    monkeypatch.setattr(host_time, "CASES", {"one": (1, {"temperature": 0.0}), "four": (4, {"seed": 1})})
    found = {one.case: one for one in host_time.measure_host_time(tiny_bundle, 1, 10, 2)}
    # 10 tokens are 9 steps; the first follows prefill, whose time is another.
    assert {name: one.steps for name, one in found.items()} == {"one": 2 * 8, "four": 2 * 8}
    for one in found.values():
        assert 0 < one.quiet_s <= one.median_s


def test_a_timed_session_is_the_session_and_notes_each_run():
    class Session:
        name = "session"
        ran = 0

        def run_with_iobinding(self, _):
            self.ran += 1

    timed = host_time.TimedSession(Session())
    timed.run_with_iobinding(None)
    timed.run_with_iobinding(None)
    assert (timed.name, timed.session.ran, len(timed.host_s), len(timed.run_s)) == ("session", 2, 2, 2)


@pytest.mark.parametrize("command", ["host-time", "speculate"])
def test_the_commands_print_a_table(tiny_bundle, monkeypatch, command):
    from typer.testing import CliRunner

    from benchmarks.__main__ import app

    monkeypatch.setattr(speculate, "PROMPTS", {"short": "the wind"})
    count = "4" if command == "host-time" else "2"
    result = CliRunner().invoke(app, [command, str(tiny_bundle), "--threads", "1", "--tokens", count, "--rounds", "1"])
    assert result.exit_code == 0, result.output
    assert "median" in result.output
