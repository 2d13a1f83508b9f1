"""The readable page of `zonda inspect`: what a bundle is, what it costs, and where it can run."""

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from .bundle import Bundle
from .loader import obstacle
from .manifest import Parity, Target
from .records import remembered_pick

_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def inspection_page(bundle: Bundle) -> RenderableType:
    """The page, as something `rich` prints."""
    manifest = bundle.manifest
    limits, contract = manifest.limits, manifest.contract
    facts = Table.grid(padding=(0, 2))
    rows = [
        ("bundle", str(bundle.path)),
        ("model", f"{manifest.name}, {manifest.architecture}, {manifest.parameters:,} parameters"),
        ("source", f"{manifest.source.format}, revision {manifest.source.revision or 'none'}"),
        ("built by", f"zonda {manifest.zonda_version}, schema {manifest.schema}"),
        ("size", _size(sum(manifest.files.values()))),
        ("weights", ", ".join(f"{kind} {form}" for kind, form in manifest.quantization.items())),
        ("limits", f"{limits.capacity} tokens a row, {limits.max_batch} rows, {limits.max_chunk} new tokens a step"),
        ("KV cache", f"{_size(manifest.kv_bytes_per_token)} a token, {_size(_row_bytes(bundle))} a full row"),
        ("contract", f"{contract.layout}: {len(contract.inputs)} inputs, {len(contract.states)} state tensors"),
    ]
    for name, value in rows:
        facts.add_row(f"[bold]{name}[/bold]", value)
    targets = Table("target", "dtype", "size", "proof", "on this host")
    for target in manifest.targets:
        files = {graph.file for graph in target.graphs} | set(target.weights) | ({target.kernels} - {""})
        size = _size(sum(manifest.files[name] for name in files))
        targets.add_row(target.name, _form(target), size, _proof(target.parity), escape(on_this_host(bundle, target)))
    proofs = [_parity_table(t.name, t.parity) for t in manifest.targets if t.parity.schedules]
    return Group(facts, targets, *proofs)


def on_this_host(bundle: Bundle, target: Target) -> str:
    """`runs`, or why not and the nearest fix."""
    reason = obstacle(bundle, target, forced=False)
    if reason is not None:
        return f"cannot run: {reason}"
    pick = remembered_pick(bundle)
    return "runs" if pick is None or pick.target != target.name else "runs, the fastest here by `zonda bench`"


def _form(target: Target) -> str:
    """The dtype and class of quality, which steps each graph runs if there are several, and what a plan is for."""
    words = [target.dtype if target.quality == "exact" else f"{target.dtype}, {target.quality}"]
    if len({graph.file for graph in target.graphs}) > 1:
        words += [f"{g.role}: {g.sequence[0]} to {g.sequence[1]} tokens a row" for g in target.graphs]
    words += [f"{kind} {form}" for kind, form in target.quantization.items()]
    if target.compute_capabilities:
        words.append("for SM " + ", ".join(map(str, target.compute_capabilities)))
    if target.plugins:
        words.append("plugins " + ", ".join(f"{name} ×{count}" for name, count in target.plugins.items()))
    return "\n".join(words)


def _proof(parity: Parity) -> str:
    if parity.status != "passed" or not parity.schedules:
        return f"{parity.status}: {parity.reason}"
    worst = max(report.max_error for report in parity.schedules)
    return (
        f"passed on {sum(report.tokens for report in parity.schedules)} tokens, {len(parity.schedules)} schedules: "
        f"logits within {worst:.1e} of {parity.max_logit:.0f}"
    )


def _parity_table(target: str, parity: Parity) -> RenderableType:
    """The numbers of a passed proof, and what it does not say."""
    table = Table("schedule", "tokens", "logits", "norm", "top-1", "ties", "top-10", "KV", box=SIMPLE)
    for report in parity.schedules:
        table.add_row(
            report.name,
            str(report.tokens),
            f"{report.relative_error:.0e}",
            f"{report.norm_ratio - 1:+.0e}",
            f"{report.top1_agreement:.1%}",
            str(report.near_ties),
            f"{report.top10_overlap:.1%}",
            "-" if report.kv_error is None else f"{report.kv_error:.0e}",
        )
    title = f"\n{target} against {parity.reference}: relative errors, the worst of each schedule"
    lines = []
    if parity.weights is not None:
        lines.append(f"weights: {parity.weights.tensors} tensors, equal to the checkpoint's byte for byte")
    other = parity.reference_proof
    lines.append(
        f"the eager model: within {other.relative_error:.1e} of {other.name}"
        if other is not None
        else "the eager model itself was not compared with another implementation (--reference transformers does)"
    )
    return Group(title, table, *lines)


def _row_bytes(bundle: Bundle) -> int:
    limits = bundle.manifest.limits
    return bundle.manifest.kv_bytes_per_token * (limits.capacity + limits.max_chunk)


def _size(count: int) -> str:
    for unit, scale in _UNITS:
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"
