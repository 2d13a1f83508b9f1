"""The comparing side of a worker process: starts it, asks it, stops it while others are measured."""

import json
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from . import BenchmarkError, UnavailableError
from .prepare import last_lines, worker_environment


class Worker:
    """A peer's process, asleep (SIGSTOP) except while it answers: threads that spin when idle disturb nobody.

    A context manager: leaving it kills the process if it still runs.
    """

    def __init__(self, name: str, command: Sequence[str | Path], threads: int, log: Path) -> None:
        """Start the process; what it writes to stderr goes to `log`."""
        self.name = name
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                command,
                env=worker_environment(threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self._statistics = psutil.Process(self._process.pid)

    def request(self, **request: Any) -> dict[str, Any]:
        """Send one request, and wait for the reply; as of `requests`.

        Raises:
            UnavailableError: the runtime cannot do this; the message is its reason.
        """
        (reply,) = self.requests(request)
        if "unavailable" in reply:
            raise UnavailableError(reply["unavailable"])
        return reply

    def requests(self, *requests: dict[str, Any]) -> list[dict[str, Any]]:
        """Wake the process, send requests, wait for the replies, and put the process to sleep again.

        Raises:
            BenchmarkError: the process died; the message ends with what it wrote to stderr.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        lines: list[str] = []
        with suppress(BrokenPipeError):
            self._process.stdin.writelines(json.dumps(request) + "\n" for request in requests)
            self._process.stdin.flush()
        for request in requests:
            lines.append(self._process.stdout.readline())
            if not lines[-1]:
                raise BenchmarkError(self._obituary(request["do"]))
        self._process.send_signal(signal.SIGSTOP)
        return [json.loads(line) for line in lines]

    def cpu_seconds(self) -> float:
        """CPU time that all threads of the process have used."""
        times = self._statistics.cpu_times()
        return float(times.user + times.system)

    def peak_rss_mb(self) -> float:
        """Peak resident memory of the process so far, in MB."""
        return float(self.request(do="memory")["peak_rss_mb"])

    def kill(self) -> None:
        """End the process at once, asleep or not."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                with suppress(BrokenPipeError):  # an unsent request may still be in the buffer
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def _obituary(self, wanted: str) -> str:
        status = self._process.wait()
        cause = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return (
            f"{self.name} died ({cause}) when asked to {wanted}:\n{last_lines(self._log.read_text(errors='replace'))}"
        )
