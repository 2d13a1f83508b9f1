import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks import BenchmarkError
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


def run(worker: Worker, new_tokens: int = 4):
    return worker.request(do="run", prompt_ids=[5, 6, 7], new_tokens=new_tokens, wake_ids=[1])


def test_a_run_reports_the_tokens_and_times_each_part_of_them(start):
    worker = start()
    assert worker.request(do="load", model="m", threads=1)["load_s"] >= 0
    reply = run(worker)
    assert reply["token_ids"] == [8, 9, 10, 11]
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
        "token_ids": [7, 8, 9],
    }


def test_close_ends_the_process_and_reports_its_peak_memory(start):
    worker = start()
    assert 1 < worker.close() < 1000  # MB of a bare interpreter: units are right
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
    assert run(worker)["token_ids"] == [8, 9, 10, 11]


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
