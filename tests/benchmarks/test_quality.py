import math
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from benchmarks import BenchmarkError
from benchmarks.process import Worker
from benchmarks.prompts import manual_ids
from benchmarks.quality import WINDOW, Quality, compare_logits

FAKE = Path(__file__).with_name("fake_worker.py")
VOCAB = 11
TEXT = [n % VOCAB for n in range(2 * WINDOW)]
SURE = -math.log(3 / (3 + VOCAB - 1))  # the surprise of a runtime that gives the right token 3 times any other's odds
LOST = math.log(VOCAB)


@pytest.fixture
def workers(tmp_path):
    started = []

    def start(**faults: str) -> list[Worker]:
        for name, fault in faults.items():
            started.append(Worker(name, [sys.executable, FAKE, fault], 1, tmp_path / f"{name}.log"))
            started[-1].request(do="load", model="m", threads=1)
        return started

    yield start
    for worker in started:
        worker.kill()


def test_every_window_is_scored_against_the_reference(workers, tmp_path):
    found = compare_logits(workers(lost="knows nothing", sure="", same=""), TEXT, "sure", tmp_path / "work")
    lost, sure, same = found
    assert [one.peer for one in found] == ["lost", "sure", "same"]
    assert sure.surprise == pytest.approx((SURE, SURE))
    assert lost.surprise == pytest.approx((LOST, LOST))
    assert (sure.kl, sure.agreement) == ((), ())
    assert (same.kl, same.agreement) == ((0.0, 0.0), (1.0, 1.0))
    p = [3 / (3 + VOCAB - 1)] + [1 / (3 + VOCAB - 1)] * (VOCAB - 1)
    assert lost.kl == pytest.approx([sum(x * math.log(x * VOCAB) for x in p)] * 2)
    assert lost.agreement == pytest.approx((1 / VOCAB, 1 / VOCAB), abs=0.01)  # its top-1 is always the first
    assert list((tmp_path / "work").iterdir()) == []


def test_without_a_reference_perplexities_are_left(workers, tmp_path):
    (found,) = compare_logits(workers(a=""), TEXT[:WINDOW], "somebody else", tmp_path)
    assert found == Quality("a", (pytest.approx(SURE),))


def test_who_gives_no_logits_has_no_quality(workers, tmp_path):
    found = compare_logits(workers(a="no logits", b=""), TEXT, "b", tmp_path)
    assert [one.peer for one in found] == ["b"]


def test_without_a_text_nothing_is_asked(tmp_path):
    assert compare_logits([], (), None, tmp_path) == ()


def test_ratios_are_paired_by_window():
    reference, worse = Quality("r", (2.0, 4.0)), Quality("w", (2.1, 4.3))
    ratio, error = worse.perplexity_ratio(reference)
    assert ratio == pytest.approx(math.exp(0.2))
    assert error == pytest.approx(math.exp(0.2) * 0.1)  # of 0.1 and 0.3: deviation 0.141, by the root of 2
    assert reference.perplexity == pytest.approx(math.exp(3))
    assert math.isnan(Quality("w", (2.1,)).perplexity_ratio(Quality("r", (2.0,)))[1])


def test_the_manual_gives_as_many_tokens_as_are_asked_for_or_says_so(tiny_bundle):
    tokenizer = Tokenizer.from_file(str(tiny_bundle / "tokenizer.json"))
    assert len(manual_ids(tokenizer, 1024)) == 1024
    assert manual_ids(tokenizer, 0) == ()
    with pytest.raises(BenchmarkError, match="manual has"):
        manual_ids(tokenizer, 10**9)
