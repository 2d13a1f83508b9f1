"""From the definition to the engine: which link of the chain breaks first, and where in it.

Every subject should compute what the one before it does. The first link that does not is looked into, at the first step
that shows it.
"""

import itertools
import re
from collections.abc import Sequence

import msgspec
import numpy as np

from ... import BuildError
from ...runtime import contract
from ...runtime.metrics import Thresholds, Verdict
from . import hints
from .feeding import explain_feeding
from .finding import Finding, Stage
from .graph import GraphSubject
from .measure import Statistics, StepReport, compare_step, state_gap, token_gap, valid_part
from .network import Value
from .steps import Script, Step
from .subjects import Array, Modular, Subject, Tapped, Trace, trace
from .taps import bisect, gap_of, read_pair

_STAGES: dict[str, Stage] = {
    "eager": "definition",
    "program": "export",
    "universal": "export",
    "lowered": "lowering",
    "engine": "runtime",
}


def locate(
    chain: Sequence[Subject], script: Script, thresholds: Thresholds, *, closely: bool = False
) -> Finding | None:
    """The first place where a chain breaks, None if every subject computes what the first does.

    Args:
        chain: at least one subject; each should equal the one before.
        script: what they run.
        thresholds: what two neighbours may differ by.
        closely: if no link is beyond them, look for a single operation that is less exact than all others of its kind;
            for when it is known that something is wrong.

    Raises:
        BuildError: the first subject cannot run the script.
    """
    before = trace(chain[0], script)
    if before.error:
        raise BuildError(f"{before.subject.name} cannot run the steps of the comparison: {before.error}")
    traces = [before]
    for subject in chain[1:]:
        traces.append(trace(subject, script))
        finding = _compare(traces[-2], traces[-1], script, thresholds)
        if finding is not None:
            return finding
    if closely:
        for first, second in itertools.pairwise(traces):
            finding = _bisect_step(first, second, script, 0, thresholds)
            if finding is not None:
                return finding
    return None


def compare_traces(want: Trace, got: Trace, script: Script, thresholds: Thresholds) -> list[StepReport]:
    """Reports of the steps that both have run."""
    reports: list[StepReport] = []
    scale = 0.0
    for number, (step, w, g) in enumerate(zip(script.steps, want.outputs, got.outputs, strict=False)):
        scale = max(scale, float(np.abs(w.logits[step.valid(w.logits.shape[1])]).max(initial=0.0)))
        reports.append(compare_step(number, step, w, g, thresholds, scale))
    return reports


def stage_of(a: Subject, b: Subject) -> Stage:
    """What lies between two subjects."""
    if a.kind == b.kind:
        return "model"
    return "lowering" if (a.kind, b.kind) == ("universal", "engine") else _STAGES[b.kind]


def _compare(before: Trace, after: Trace, script: Script, thresholds: Thresholds) -> Finding | None:
    reports = compare_traces(before, after, script, thresholds)
    broken = next((report for report in reports if report.verdict is Verdict.FAIL), None)
    if broken is not None:
        return _diagnose(before, after, script, broken, thresholds)
    if not after.error:
        return None
    number = len(after.outputs)
    value = _failed_value(after)
    return Finding(
        stage=stage_of(before.subject, after.subject),
        between=(before.subject.name, after.subject.name),
        step=number,
        title=script.steps[number].title,
        layer=value.layer if value is not None else None,
        module=value.module if value is not None else "",
        marker=value.marker if value is not None else "step",
        operator=value.operator if value is not None else "",
        tensor="",
        error=float("inf"),
        allowed=0.0,
        row=0,
        token=0,
        explanation=f"it fails: {after.error}",
    )


def _failed_value(after: Trace) -> Value | None:
    """What the node that a runtime's message names would have computed."""
    named = re.search(r"Name:'([^']+)'", after.error)
    if named is None or not isinstance(after.subject, GraphSubject):
        return None
    return after.subject.made_by(named[1])


def _diagnose(before: Trace, after: Trace, script: Script, report: StepReport, thresholds: Thresholds) -> Finding:
    a, b, number = before.subject, after.subject, report.step
    step = script.steps[number]
    finding = _of_outputs(before, after, step, report, thresholds)
    if isinstance(a, Tapped) and isinstance(b, Tapped):
        every = "; ".join(part for part in (finding.explanation, "every operation agrees on the same inputs") if part)
        return _bisect_step(before, after, script, number, thresholds) or _with(finding, explanation=every)
    if isinstance(a, Modular) and isinstance(b, Modular | Tapped):
        return _of_modules(a, b, script, number, finding, thresholds)
    if isinstance(a, Tapped):
        words = explain_feeding(a, step, _past(before, number), after.outputs[number], thresholds)
        explanation = "; ".join(part for part in (words, finding.explanation) if part)
        return _with(finding, explanation=explanation)
    return finding


def _bisect_step(before: Trace, after: Trace, script: Script, number: int, thresholds: Thresholds) -> Finding | None:
    """Look into a step of a link of which every value can be read; None for other links, or if nothing stands out."""
    a, b, step = before.subject, after.subject, script.steps[number]
    if not isinstance(a, Tapped) or not isinstance(b, Tapped):
        return None
    pair = read_pair(a, b, step, _past(before, number), _past(after, number))
    return bisect(a, b, step, number, stage_of(a, b), pair, thresholds)


def _past(of: Trace, number: int) -> dict[str, Array]:
    """The cache's contents before a step."""
    if number:
        return dict(of.outputs[number - 1].states)
    return {name: np.zeros_like(state) for name, state in of.outputs[0].states.items()}


def _of_outputs(before: Trace, after: Trace, step: Step, report: StepReport, thresholds: Thresholds) -> Finding:
    """What can be said from logits and cache alone: the first layer whose keys or values differ, else the logits."""
    want, got = before.outputs[report.step], after.outputs[report.step]
    bound = thresholds.kv_error
    name = next((name for name, error in report.kv_errors.items() if not error <= bound), contract.LOGITS)
    if name == contract.LOGITS:
        w, g = want.logits, got.logits
        bound = min(thresholds.relative_error, report.relative_error)
        gap = token_gap(step, w, g, bound)
        layer, marker = None, "logits"
        words = hints.of_value(step, name, w, g, {}, None, thresholds.relative_error)
    else:
        w, g = want.states[name], got.states[name]
        w, g = w[:, :, : g.shape[2]], g[:, :, : w.shape[2]]
        gap = state_gap(step, w, g, bound)
        layer, marker = int(name.split(".")[1]), "KV cache"
        known = {n: state[:, :, : w.shape[2]] for n, state in want.states.items()}
        words = hints.of_value(step, name, w, g, known, None, bound)
    return Finding(
        stage=stage_of(before.subject, after.subject),
        between=(before.subject.name, after.subject.name),
        step=report.step,
        title=step.title,
        layer=layer,
        module="",
        marker=marker,
        operator="",
        tensor=name,
        error=gap.error,
        allowed=bound,
        row=gap.row,
        token=gap.token,
        reference=Statistics.of(valid_part(step, w)),
        found=Statistics.of(valid_part(step, g)),
        explanation=words,
    )


def _of_modules(
    a: Modular, b: Modular | Tapped, script: Script, number: int, finding: Finding, thresholds: Thresholds
) -> Finding:
    """The first module whose output differs; errors travel here, so what comes before it was within bounds."""
    for subject in (a, b):
        subject.reset(script.rows, script.capacity)
        for step in script.steps[:number]:
            subject.step(step)
    step = script.steps[number]
    _, want = a.tap_modules(step)
    got, markers = _modules_of(b, step, want)
    for name, value in want.items():
        if name not in got:
            continue
        other = got[name]
        if value.shape != other.shape and value.ndim == other.ndim == 3:
            value = np.take_along_axis(value, step.logit_positions[:, :, None], 1)
        gap = gap_of(step, value, other, thresholds.relative_error)
        if gap is not None and gap.error > thresholds.relative_error:
            layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
            return _with(
                finding,
                layer=layer,
                module=name,
                marker=markers.get(name, "module"),
                tensor=name,
                error=gap.error,
                allowed=thresholds.relative_error,
                row=gap.row,
                token=gap.token,
                reference=Statistics.of(valid_part(step, value)),
                found=Statistics.of(valid_part(step, other)),
                explanation="",
            )
    return finding


def _modules_of(b: Modular | Tapped, step: Step, wanted: dict[str, Array]) -> tuple[dict[str, Array], dict[str, str]]:
    """(outputs, markers) of modules by path."""
    if isinstance(b, Modular):
        return b.tap_modules(step)[1], {}
    last = {
        module: [v for v in b.network.values.values() if v.module == module or v.module.startswith(module + ".")]
        for module in wanted
    }
    names = {module: values[-1] for module, values in last.items() if values}
    _, found = b.tap(step, [value.name for value in names.values()])
    outputs = {module: found[value.name] for module, value in names.items() if value.name in found}
    return outputs, {module: value.marker for module, value in names.items()}


def _with(finding: Finding, **changes: object) -> Finding:
    return msgspec.structs.replace(finding, **changes)
