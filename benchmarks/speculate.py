"""Speculation against plain decoding: the same prompts, in one process, the two taking turns.

What counts is the ratio of a pair, two runs one after the other; which of them comes first changes from round to round.
A step of several tokens rounds otherwise than a step of one, so where two tokens are nearly as likely the texts may
part: then it is told how much likelier one was than the other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from .prompts import TEXT
from .summary import Spread, first_difference

PROMPTS: dict[str, str] = {
    "summarise": "{text}\n\nSummarise this text.",
    "summarise a page": "Summarise this text:\n\n{page}",
    "rewrite": "Rewrite this code so that it also handles triangles. Give the whole code.\n\n{code}",
    "explain": "Explain how a foehn wind works.",
    "story": "Tell me a story about a lighthouse keeper who finds a letter.",
}
"""Name -> the user's message."""

_SHOWN = 20  # likeliest tokens that are looked through
_CODE = """def area(shape):
    if shape.kind == "circle":
        return 3.14159 * shape.radius ** 2
    if shape.kind == "square":
        return shape.side ** 2
    raise ValueError(shape.kind)
"""


@dataclass(frozen=True, slots=True)
class Pair:
    """One round of one prompt: seconds a token without and with speculation, and what was drafted.

    first_difference: the first token at which the texts differ, None if they are equal. gap: how much likelier one of
    the two tokens there is than the other, in nats; NaN if it is more than the likeliest tokens show.
    """

    prompt: str
    plain_s: float
    drafting_s: float
    tokens: int
    drafted: int
    accepted: int
    first_difference: int | None
    gap: float = 0.0


def measure_speculation(bundle: Path, threads: int | None, tokens: int, rounds: int) -> list[Pair]:
    """Run every prompt with and without, greedily, `rounds` times after one that warms up."""
    from zonda.runtime import Pipeline, SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=tokens)
    pairs: list[Pair] = []
    with Pipeline.load(bundle, threads=threads) as pipeline:
        for turn in range(rounds + 1):
            for name, message in PROMPTS.items():
                ids = pipeline.encode(pipeline.render(_message(message)), special_tokens=False)
                results: dict[str | None, Any] = {}
                for way in (None, "ngram") if turn % 2 else ("ngram", None):
                    pipeline.speculate = way
                    results[way] = pipeline.generate(ids, params)
                if turn:
                    plain, drafting = results[None], results["ngram"]
                    place = first_difference(plain.token_ids, drafting.token_ids)
                    gap = 0.0 if place is None else _gap(pipeline, ids, plain.token_ids, drafting.token_ids, place)
                    pairs.append(_pair(name, plain, drafting, place, gap))
    return pairs


def _message(message: str) -> str:
    return message.format(text=_beginning(2200), page=_beginning(1200), code=_CODE)


def _beginning(characters: int) -> str:
    """At most so many characters of the text, to the end of a sentence."""
    text = TEXT.read_text("utf-8")[:characters]
    return text[: text.rindex(".") + 1]


def _gap(pipeline: Any, ids: list[int], a: Sequence[int], b: Sequence[int], place: int) -> float:
    """The difference of the log-probabilities of a[place] and b[place], after what both have in common."""
    from zonda.runtime import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=_SHOWN)
    (step,) = pipeline.generate([*ids, *a[:place]], params).logprobs
    likeliest = {entry.token_id: entry.logprob for entry in step.top_logprobs}
    return abs(likeliest.get(a[place], math.nan) - likeliest.get(b[place], math.nan))


def _pair(name: str, plain: Any, drafting: Any, place: int | None, gap: float) -> Pair:
    def seconds(result: Any) -> float:
        return float(result.timings.decode_s / max(len(result.token_ids) - 1, 1))

    timings = drafting.timings
    drafted, accepted = timings.drafted_tokens, timings.accepted_tokens
    return Pair(name, seconds(plain), seconds(drafting), len(drafting.token_ids), drafted, accepted, place, gap)


def table(pairs: Sequence[Pair]) -> Table:
    """For people: medians, and the ratio pair by pair."""
    shown = Table(title="Decoding with speculation against without: median (min–max) of pairs")
    shown.add_column("prompt", no_wrap=True)
    for title in ("tokens", "plain tok/s", "drafting tok/s", "×", "drafted", "accepted", "same text"):
        shown.add_column(title, justify="right")
    for name in dict.fromkeys(pair.prompt for pair in pairs):
        own = [pair for pair in pairs if pair.prompt == name]
        ratio = Spread.of(pair.plain_s / pair.drafting_s for pair in own)
        differ = {pair.first_difference: pair.gap for pair in own if pair.first_difference is not None}
        equal = sum(pair.first_difference is None for pair in own)
        gaps = "".join(f"; token {place}: {gap:.3f} nats" for place, gap in sorted(differ.items()))
        shown.add_row(
            name,
            str(own[0].tokens),
            f"{1 / Spread.of(pair.plain_s for pair in own).median:.1f}",
            f"{1 / Spread.of(pair.drafting_s for pair in own).median:.1f}",
            f"{ratio.median:.2f} ({ratio.min:.2f}–{ratio.max:.2f})",
            f"{Spread.of(pair.drafted for pair in own).median:.0f}",
            f"{Spread.of(pair.accepted for pair in own).median:.0f}",
            f"{equal} of {len(own)}{gaps}",
        )
    return shown
