"""`zonda verify`: a bundle's proof, repeated on the host that serves.

First every file is hashed, before anything of it runs. Then each target that this host can run is held to the golden
data in the bundle. A target that the build host could not run is proven here; that is remembered outside the bundle,
for this bundle on this host. Needs neither torch nor onnx.
"""

import hashlib
import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import msgspec

from .. import BundleError
from .bundle import CHECKSUMS, Bundle
from .engines import Engine
from .golden import GOLDEN, Golden
from .gpu import MODULES, find_gpu, installed_version
from .manifest import Parity, Target
from .metrics import THRESHOLDS
from .parity import prove


class VerificationRecord(msgspec.Struct, frozen=True):
    """That a target of a bundle has been proven on a host: parity as measured there, versions as they were."""

    host: str
    versions: dict[str, str]
    parity: Parity


def prove_target(
    bundle: Bundle,
    target: Target,
    engine: Engine,
    *,
    quick: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Parity:
    """Hold an engine of a bundle's target to the bundle's golden data.

    Args:
        bundle: opened.
        target: one of its targets.
        engine: of that target, with the bundle's limits or less.
        quick: a few steps of one prompt, about a second.
        progress: called with the name of each schedule before it runs.

    Raises:
        BundleError: the bundle has no golden data, or they are unreadable.
        ParityError: the engine computes something else; the message says where and how much.
        CapacityError: the engine was opened for fewer tokens than the golden prompts have.
    """
    if GOLDEN not in bundle.manifest.files:
        raise BundleError(f"{bundle.path} has no golden data to verify with: it was built with --verify off")
    golden = Golden.read(bundle.file(GOLDEN))
    if golden.vocab_size != engine.limits.vocab_size:
        raise BundleError(f"{bundle.path}: the golden data are of another vocabulary than the engine")
    thresholds = target.parity.thresholds or THRESHOLDS.get(target.dtype)
    if thresholds is None:
        raise BundleError(f"{bundle.path}: no thresholds are known for {target.dtype}")
    return prove(engine, golden, thresholds, quick=quick, progress=progress)


def in_words(parity: Parity) -> str:
    """What a passed proof checked, in a sentence."""
    tokens = sum(report.tokens for report in parity.schedules)
    worst = max(report.max_error for report in parity.schedules) / parity.max_logit
    ties = sum(report.near_ties for report in parity.schedules)
    kv = max(report.kv_error or 0.0 for report in parity.schedules)
    allowed = parity.thresholds.max_error if parity.thresholds is not None else float("nan")
    ways = ", ".join(report.name for report in parity.schedules)
    choice = "the same first choice at every token" + (f" but {ties} near ties" if ties else "")
    return (
        f"proven on {tokens} tokens ({ways}): logits within {worst:.1e} of the largest ({allowed:.1e} is allowed), "
        f"{choice}, keys and values within {kv:.1e}"
    )


def remember(bundle: Bundle, target: Target, parity: Parity) -> Path:
    """Record outside the bundle that `target` passed on this host; return the file."""
    path = _record_path(bundle, target)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = VerificationRecord(_host(), _versions(target), parity)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2))
    temporary.replace(path)
    return path


def remembered(bundle: Bundle, target: Target) -> bool:
    """Whether `target` of this very bundle has passed on this host, with the runtime as it is now."""
    try:
        record = msgspec.json.decode(_record_path(bundle, target).read_bytes(), type=VerificationRecord)
    except (OSError, msgspec.MsgspecError):
        return False
    return (record.host, record.versions) == (_host(), _versions(target)) and record.parity.status == "passed"


def _record_path(bundle: Bundle, target: Target) -> Path:
    digest = hashlib.sha256((bundle.path / CHECKSUMS).read_bytes()).hexdigest()
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "zonda" / "verified" / f"{digest[:32]}-{target.graphs[0].file.replace('/', '-')}.json"


def _host() -> str:
    return f"{platform.node()} {platform.machine()} {platform.system()}"


def _versions(target: Target) -> dict[str, str]:
    """Versions of what executes the target; another version is another proof."""
    found = {}
    for name in ("zonda", target.name):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    if target.name in MODULES:
        gpu = find_gpu()
        found |= {target.name: installed_version(target.name) or "unknown", "gpu": str(gpu)}
    return found
