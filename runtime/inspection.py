"""The readable page of `zonda inspect`: what a bundle is, what it costs, and where it can run."""

from rich.console import Group, RenderableType
from rich.table import Table

from .bundle import Bundle
from .loader import obstacle
from .manifest import Parity

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
        files = {graph.file for graph in target.graphs} | set(target.weights)
        size = _size(sum(manifest.files[name] for name in files))
        targets.add_row(
            target.name, target.dtype, size, _proof(target.parity), obstacle(target, forced=False) or "runs"
        )
    return Group(facts, targets)


def _proof(parity: Parity) -> str:
    if parity.status != "passed":
        return f"{parity.status}: {parity.reason}"
    return (
        f"passed on {parity.tokens} tokens: logits within {parity.max_abs_error:.1e} of {parity.max_abs_logit:.0f}, "
        f"same first choice {parity.top1_agreement:.0%}"
    )


def _row_bytes(bundle: Bundle) -> int:
    limits = bundle.manifest.limits
    return bundle.manifest.kv_bytes_per_token * (limits.capacity + limits.max_chunk)


def _size(count: int) -> str:
    for unit, scale in _UNITS:
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"
