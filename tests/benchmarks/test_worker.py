import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks import BenchmarkError, UnavailableError
from benchmarks import worker as worker_side
from benchmarks.process import Worker
from benchmarks.worker import Meter

FAKE = Path(__file__).with_name("fake_worker.py")
SETUP_S, PREFILL_S, STEP_S = 0.02, 0.04, 0.01  # as it sleeps


@pytest.fixture
def start(tmp_path):
    workers = []

    def start(fault: str = "") -> Worker:
        workers.append(Worker("fake", [sys.executable, FAKE, fault], 1, tmp_path / "fake.log"))
        return workers[-1]

    yield start
    for worker in workers:
        worker.kill()


def run(worker: Worker, *prompts: list[int], new_tokens: int = 4):
    return worker.request(do="run", prompts=prompts or ([5, 6, 7],), new_tokens=new_tokens, wake_ids=[1])


def test_a_run_reports_the_tokens_and_times_each_part_of_them(start):
    worker = start()
    assert worker.request(do="load", model="m", threads=1)["load_s"] >= 0
    reply = run(worker)
    assert reply["token_ids"] == [[8, 9, 10, 11]]
    # Sleeps take at least their time, and on a busy machine any time more.
    assert reply["setup_s"] >= SETUP_S
    assert reply["prefill_s"] >= PREFILL_S
    assert reply["decode_s"] >= 3 * STEP_S


@pytest.mark.parametrize(("says_when_ready", "setup_s", "prefill_s"), [(True, 2, 10), (False, 0, 12)])
def test_the_meter_divides_the_time_at_ready_and_first_token(monkeypatch, says_when_ready, setup_s, prefill_s):
    now = 100.0
    monkeypatch.setattr(worker_side.time, "perf_counter", lambda: now)
    meter = Meter()
    now += 2
    if says_when_ready:
        meter.ready()
    now += 10
    meter.token(7)
    for token_id in (8, 9):
        now += 3
        meter.token(token_id)
    now += 100  # whatever a runtime does after its last token is not decoding
    assert meter.reading() == {
        "setup_s": setup_s,
        "prefill_s": prefill_s,
        "decode_s": 6,
        "decoded_tokens": 2,
        "token_ids": [[7, 8, 9]],
    }


def test_decoding_a_batch_begins_when_every_row_has_its_first_token():
    meter = Meter(2)
    meter.token(1, row=0, at=meter._ready + 2)
    meter.token(2, row=0, at=meter._ready + 3)  # while the other row is still prefilled: not decoding
    meter.token(3, row=1, at=meter._ready + 5)
    for n, at in ((4, 6), (5, 9)):
        for row in range(2):
            meter.token(n, row, at=meter._ready + at)
    reading = meter.reading()
    assert reading["prefill_s"] == pytest.approx(5)
    assert reading["decode_s"] == pytest.approx(4)
    assert reading["decoded_tokens"] == 4
    assert reading["token_ids"] == [[1, 2, 4, 5], [3, 4, 5]]


def test_a_batch_has_tokens_and_one_reading(start):
    worker = start()
    worker.request(do="load", model="m", threads=1)
    reply = run(worker, [5, 6], [7, 8], [1, 2])
    assert reply["token_ids"] == [[7, 8, 9, 10], [9, 10, 11, 12], [3, 4, 5, 6]]
    assert reply["decoded_tokens"] == 9


def test_several_requests_go_without_a_pause_and_are_answered_in_order(start):
    worker = start()
    loaded, first = worker.requests({"do": "load", "model": "m", "threads": 1}, {"do": "first", "prompt_ids": [3, 4]})
    assert loaded["load_s"] >= 0
    assert first["token_ids"] == [5]


def test_peak_memory_is_that_of_the_process(start):
    worker = start()
    worker.request(do="load", model="m", threads=1)
    assert 1 < worker.peak_rss_mb() < 1000  # MB of an interpreter with numpy: units are right


def test_what_a_runtime_cannot_do_is_told_with_its_reason_and_it_lives_on(start):
    worker = start("one row")
    worker.request(do="load", model="m", threads=1)
    with pytest.raises(UnavailableError, match="it takes one row"):
        run(worker, [1], [2])
    assert run(worker)["token_ids"]


def test_logits_come_in_a_file(start, tmp_path):
    worker = start()
    worker.request(do="load", model="m", threads=1)
    file = tmp_path / "logits"
    assert worker.request(do="score", token_ids=[1, 2, 3], file=str(file))["shape"] == [3, 11]
    assert np.fromfile(file, np.float32).reshape(3, 11).argmax(1).tolist() == [2, 3, 0]


def test_a_runtime_without_logits_says_so(start, tmp_path):
    worker = start("no logits")
    worker.request(do="load", model="m", threads=1)
    with pytest.raises(UnavailableError, match="last token only"):
        worker.request(do="score", token_ids=[1], file=str(tmp_path / "logits"))


def test_killing_ends_the_process(start):
    worker = start()
    worker.kill()
    with pytest.raises(psutil.NoSuchProcess):
        worker.cpu_seconds()


def test_a_worker_sleeps_between_requests(start):
    worker = start()
    worker.request(do="load", model="m", threads=1)
    deadline = time.monotonic() + 10  # the signal is sent when request returns, and takes effect soon after
    while worker._statistics.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
        time.sleep(0.001)
    assert worker._statistics.status() == psutil.STATUS_STOPPED
    assert run(worker)["token_ids"]


def test_what_libraries_print_does_not_disturb_the_protocol(start):
    worker = start("prints")
    worker.request(do="load", model="m", threads=1)
    assert run(worker)["token_ids"] == [[8, 9, 10, 11]]


def test_a_worker_that_fails_is_reported_with_its_stderr(start):
    worker = start("cannot load")
    with pytest.raises(BenchmarkError, match=r"(?s)fake died \(exit status 1\) when asked to load:.*m is not a model"):
        worker.request(do="load", model="m", threads=1)


def test_a_worker_that_crashes_is_reported_with_its_signal(start):
    worker = start("crashes")
    worker.request(do="load", model="m", threads=1)
    with pytest.raises(BenchmarkError, match=r"fake died \(signal SIGABRT\) when asked to run"):
        run(worker)


def test_a_runtime_that_stops_at_an_end_token_is_refused(start):
    worker = start("stops at eos")
    worker.request(do="load", model="m", threads=1)
    with pytest.raises(BenchmarkError, match="asked for 4 tokens, got 1"):
        run(worker)


def test_leaving_the_context_kills_a_sleeping_worker(tmp_path):
    with Worker("fake", [sys.executable, FAKE], 1, tmp_path / "fake.log") as worker:
        worker.request(do="load", model="m", threads=1)
        process = worker._statistics
    assert not process.is_running()
