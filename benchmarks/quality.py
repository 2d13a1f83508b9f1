"""What a runtime's numerics cost: perplexity, and the distance of its distributions from the reference's.

The text is cut into windows that each start anew; in each, every runtime gives the logits after every token, and the
same positions count for all. Logits pass through a file a window, which is read at once and deleted.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import UnavailableError
from .process import Worker

WINDOW = 512
"""Tokens of a window; its last has no token that follows, so it does not count."""


@dataclass(frozen=True, slots=True)
class Quality:
    """Of one runtime, a figure a window; all are means over the window's tokens.

    surprise: -log p of the token that follows, in nats. kl: KL(reference ‖ runtime) in nats. agreement: share of tokens
    with the reference's top-1. The last two are empty without a reference, and for the reference itself.
    """

    peer: str
    surprise: tuple[float, ...]
    kl: tuple[float, ...] = ()
    agreement: tuple[float, ...] = ()

    @property
    def perplexity(self) -> float:
        """exp of the mean surprise."""
        return math.exp(fmean(self.surprise))

    def perplexity_ratio(self, reference: "Quality") -> tuple[float, float]:
        """Perplexity by that of the reference, window by window paired, and the ratio's standard error over windows."""
        differences = [ours - theirs for ours, theirs in zip(self.surprise, reference.surprise, strict=True)]
        ratio = math.exp(fmean(differences))
        error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else math.nan
        return ratio, ratio * error


def compare_logits(
    workers: Sequence[Worker],
    token_ids: Sequence[int],
    reference: str | None,
    work: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Quality, ...]:
    """Score a text with all workers that can.

    Args:
        workers: with their models loaded.
        token_ids: whole windows; with none nothing is done.
        reference: name of the worker whose distributions the others are held to; None, or the name of none of them,
            for perplexities alone.
        work: where the files of logits lie while they are needed.
        progress: told what happens next.
    """
    if not token_ids:
        return ()
    found: dict[str, list[tuple[float, ...]]] = {}
    ordered = sorted(workers, key=lambda worker: worker.name != reference)
    unable: set[str] = set()
    work.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=work) as folder:
        for start in range(0, len(token_ids), WINDOW):
            window = list(token_ids[start : start + WINDOW])
            wanted = None
            for worker in ordered:
                if worker.name in unable:
                    continue
                progress(f"logits of tokens {start} to {start + len(window)}: {worker.name}")
                try:
                    logits = _logits(worker, window, Path(folder, "logits"))
                except UnavailableError:
                    unable.add(worker.name)
                    continue
                found.setdefault(worker.name, []).append(_scores(logits, window, wanted))
                if worker.name == reference:
                    wanted = logits
    names = [worker.name for worker in workers if worker.name in found]
    return tuple(Quality(name, *zip(*found[name], strict=True)) for name in names)


def _logits(worker: Worker, window: list[int], file: Path) -> NDArray[np.float32]:
    """(N - 1, V): those of the tokens that are followed by one."""
    shape = worker.request(do="score", token_ids=window, file=str(file))["shape"]
    logits = np.fromfile(file, np.float32).reshape(shape)
    file.unlink()
    return logits[:-1]


def _scores(logits: NDArray[Any], window: list[int], wanted: NDArray[Any] | None) -> tuple[float, ...]:
    """(surprise,) or (surprise, kl, agreement), means over the window."""
    from zonda.runtime.metrics import kl_divergence, perplexity

    surprise = math.log(perplexity(logits, np.array(window[1:])))
    if wanted is None:
        return (surprise,)
    kl = kl_divergence(wanted, logits).mean()
    return surprise, float(kl), float((logits.argmax(1) == wanted.argmax(1)).mean())
