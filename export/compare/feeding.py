"""How a graph has to be fed to give what an engine gave: the mistakes that a runtime can make with a step's inputs."""

from dataclasses import replace

import numpy as np

from ...runtime.metrics import Thresholds
from .measure import compare_step
from .steps import Step
from .subjects import Array, Output, Tapped


def explain_feeding(a: Tapped, step: Step, past: dict[str, Array], got: Output, thresholds: Thresholds) -> str:
    """How the graph has to be fed to give what the engine gave, if it is a simple mistake."""
    for words, fed in _mistakes(step):
        a.restore(past)
        try:
            output = a.step(fed)
        except Exception:  # a mistake that the graph itself refuses is not the one
            continue
        lengths = np.minimum(step.lengths, fed.lengths)
        both = replace(step, seqlen_offsets=lengths - step.input_lens)  # beyond, the graph leaves the cache undefined
        if compare_step(0, both, output, got, thresholds, 0.0):
            return f"the graph gives the same if {words}"
    return ""


def _mistakes(step: Step) -> list[tuple[str, Step]]:
    width = step.input_ids.shape[1]
    last = np.maximum(step.input_lens - 1, 0)[:, None].astype(np.int64)
    offsets, starts, lens, wanted = (
        step.seqlen_offsets,
        step.start_offsets_kernel,
        step.input_lens,
        step.logit_positions,
    )
    tries = [
        (
            "logit_positions are those of the last padded token",
            replace(step, logit_positions=np.full_like(wanted, width - 1)),
        ),
        (
            "the logits of a row's last token are those of the last padded token",
            replace(step, logit_positions=np.where(wanted == last, width - 1, wanted)),
        ),
        (
            "padding counts as tokens (input_lens are the padded length)",
            replace(step, input_lens=np.full_like(lens, width)),
        ),
        ("the rows are in reverse order", replace(step, input_ids=step.input_ids[::-1])),
    ]
    for by, words in ((1, "one too large"), (-1, "one too small")):
        moved, begun = np.maximum(offsets + by, 0).astype(np.int32), np.maximum(starts + by, 0)
        both = replace(step, seqlen_offsets=moved, start_offsets_kernel=begun)
        tries += [
            (f"seqlen_offsets and with them start_offsets_kernel are {words}", both),
            (f"seqlen_offsets are {words}", replace(step, seqlen_offsets=moved)),
            (f"start_offsets_kernel is {words}", replace(step, start_offsets_kernel=begun)),
            (f"input_lens are {words}", replace(step, input_lens=np.clip(lens + by, 0, width).astype(np.int32))),
            (
                f"logit_positions are {words}: the logits are those of the neighbouring token",
                replace(step, logit_positions=np.clip(wanted + by, 0, width - 1)),
            ),
        ]
    return [(words, fed) for words, fed in tries if not _same_feed(step, fed)]


def _same_feed(one: Step, other: Step) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one.feed.values(), other.feed.values(), strict=True))
