"""The command `zonda compare A B`: run both, say how far they are apart, and where they part if they do."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER
from rich.console import Console

from ... import RequestError
from ...runtime.manifest import Limits
from ...runtime.metrics import THRESHOLDS
from .chain import locate
from .graph import GraphSubject
from .layers import by_layer, with_taps
from .polygraphy_runners import CompareSteps, SubjectRunner, feeds_of
from .report import Comparison, show, to_json
from .specs import Source, Spec, chain, open_sources, parse, tapped_kind
from .steps import TEXTS, make_script, pseudo_random_prompts, tokens_for
from .subjects import Tapped

_WIDTH = 112
"""Columns of the tables, on a narrow terminal or in a file too."""


def compare(
    a: Annotated[
        str,
        typer.Argument(
            help="The reference: torch:CHECKPOINT, transformers:CHECKPOINT, universal:BUNDLE, lowered:BUNDLE, "
            "BUNDLE or BUNDLE:target."
        ),
    ],
    b: Annotated[str, typer.Argument(help="What is held to it, written the same way.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Text for a row instead of ours; up to three times.")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Add a table by layer.")] = False,
    json: Annotated[
        str | None, typer.Option(help="Write the comparison as JSON to this file; - is the output.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the error by layer and by step.")] = None,
) -> None:
    """Compare two ways to run a model, step by step; where they part, find the first layer and marker."""
    found = run_comparison(a, b, prompt or (), layers=layers)
    if plot is not None:
        from .plot import draw

        draw(found, plot)
    console = Console(stderr=json == "-")
    console.width = max(console.width, _WIDTH)
    show(found, console, layers=layers)
    if json == "-":
        sys.stdout.write(to_json(found).decode())
    elif json is not None:
        try:
            Path(json).write_bytes(to_json(found))
        except OSError as error:
            raise RequestError(f"--json {json}: it cannot be written: {error}") from error
    if not found.agrees:
        raise typer.Exit(1)


def run_comparison(a: str, b: str, prompts: Sequence[str] = (), *, layers: bool = False) -> Comparison:
    """What the command does, for callers.

    Args:
        a: the reference, as on the command line.
        b: what is held to it.
        prompts: texts; ours if there are none.
        layers: read the values between as well.

    Raises:
        ZondaError: one of the two cannot be opened or run.
    """
    specs = parse(a), parse(b)
    sources = open_sources(*specs)
    limits = _shared([source.limits for source in sources])
    script = make_script(_prompts(prompts, sources, limits), limits, tokens_for(_windows(specs, sources)))
    thresholds = max((THRESHOLDS[source.dtype] for source in sources), key=lambda t: t.relative_error)
    judge = CompareSteps(thresholds, script.steps)
    runners = [
        SubjectRunner(partial(source.subject, spec.kind), f"{side} {spec.text}", capacity=script.capacity, states=True)
        for side, spec, source in zip("AB", specs, sources, strict=True)
    ]
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            results = Comparator.run(runners, data_loader=feeds_of(script), use_subprocess=False)
            agree = bool(Comparator.compare_accuracy(results, compare_func=judge))
    except Exception:  # one of the two fails in a step; a finding says which and where
        finding = locate(chain(*specs, sources), script, thresholds)
        if finding is None:
            raise
        return Comparison(a=a, b=b, thresholds=thresholds, steps=(), layers=(), finding=finding)
    table = by_layer(judge.reports)
    if layers:
        kinds = [tapped_kind(spec, source) for spec, source in zip(specs, sources, strict=True)]
        pair = [source.subject(kind) for source, kind in zip(sources, kinds, strict=True) if kind is not None]
        if len(pair) == 2 and all(isinstance(subject, Tapped) for subject in pair):
            table = with_taps(table, pair[0], pair[1], script, thresholds)  # type: ignore[arg-type]
    finding = None if agree else locate(chain(*specs, sources), script, thresholds, closely=True)
    return Comparison(a=a, b=b, thresholds=thresholds, steps=tuple(judge.reports), layers=tuple(table), finding=finding)


def _shared(limits: Sequence[Limits]) -> Limits:
    """What both sides take."""
    smallest = {name: min(getattr(one, name) for one in limits) for name in Limits.__struct_fields__}
    return Limits(**smallest)


def _prompts(texts: Sequence[str], sources: Sequence[Source], limits: Limits) -> list[list[int]]:
    tokenizer = next((found for source in sources if (found := source.tokenizer()) is not None), None)
    if tokenizer is not None:
        return [list(tokenizer.encode(text).ids) for text in (texts or TEXTS)]
    if texts:
        raise RequestError("--prompt needs a tokenizer, and neither side has a tokenizer.json")
    return pseudo_random_prompts(limits.vocab_size)


def _windows(specs: Sequence[Spec], sources: Sequence[Source]) -> list[int]:
    """The attention windows of a bundle among the two."""
    for _, source in zip(specs, sources, strict=True):
        if source.is_bundle and "universal" in source.kinds():
            universal = source.subject("universal")
            assert isinstance(universal, GraphSubject)
            return universal.windows
    return []
