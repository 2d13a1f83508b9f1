"""`zonda verify`: a bundle's proof, repeated on the host that serves.

First every file is hashed, before anything of it runs. Then each target that this host can run is held to the golden
data in the bundle. A target that the build host could not run is proven here, which `records.py` remembers. Needs
neither torch nor onnx.
"""

from collections.abc import Callable

from .. import BundleError
from .bundle import Bundle
from .engines import Engine
from .golden import GOLDEN, Golden
from .manifest import Parity, Target
from .metrics import THRESHOLDS, thresholds_of
from .parity import prove


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
    thresholds = target.parity.thresholds or THRESHOLDS.get(numerics_of(target))
    if thresholds is None:
        raise BundleError(f"{bundle.path}: no thresholds are known for {numerics_of(target)}")
    return prove(engine, golden, thresholds, quick=quick, progress=progress)


def numerics_of(target: Target) -> str:
    """Name of the thresholds for a target's class of numerics: its dtype, or what says more, quality and cache."""
    rounded = target.kv_dtype == "int8"
    return (
        target.dtype if target.quality == "exact" and not rounded else thresholds_of(target.quality, int8_cache=rounded)
    )


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
