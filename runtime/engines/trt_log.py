"""TensorRT's messages: passed on to `logging`, the last errors kept for the exceptions that quote them."""

import functools
import logging
from collections import deque
from typing import Any

_log = logging.getLogger(__name__)


@functools.cache
def logger_of(trt: Any) -> Any:
    """The one logger that a TensorRT module takes in a process; `entries` holds its last errors."""
    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.DEBUG,
    }

    class Words(trt.ILogger):  # type: ignore[misc]
        """What TensorRT calls."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.entries: deque[str] = deque(maxlen=4)

        def log(self, kind: Any, message: str) -> None:
            """One message of TensorRT; its information is for debugging, and its errors come as exceptions, too."""
            level = levels.get(kind, 0)
            if level == logging.ERROR:
                self.entries.append(" ".join(message.split()))
            if level:
                _log.log(min(level, logging.WARNING), "TensorRT: %s", message)

    return Words()
