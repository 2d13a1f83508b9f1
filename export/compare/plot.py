"""The picture of a comparison: error by layer, one line a step, and error by step."""

from pathlib import Path

import numpy as np

from ... import RequestError
from .measure import largest_by_layer
from .report import Comparison

_LEAST = 1e-9  # what is drawn for an error of 0 on a logarithmic axis


def draw(found: Comparison, path: Path) -> None:
    """Write a picture; the suffix says the format.

    Raises:
        RequestError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise RequestError("--plot needs matplotlib: pip install 'zonda[plot]'") from error
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for report in found.steps:
        layers = largest_by_layer(report.kv_errors)
        errors = [_shown(max(layers[n].values())) for n in sorted(layers)]
        left.plot(sorted(layers), errors, marker=".", label=f"{report.step} {report.title}")
    left.axhline(found.thresholds.kv_error, color="grey", linestyle="--", label="allowed")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set(yscale="log", xlabel="layer", ylabel="error of keys and values, relative", title="by layer")
    left.legend(fontsize="x-small")
    numbers = np.array([report.step for report in found.steps])
    series = {
        "logits": [_shown(report.relative_error) for report in found.steps],
        "norm of the logits": [_shown(abs(report.norm_ratio - 1)) for report in found.steps],
        "keys and values": [_shown(report.kv_error or 0.0) for report in found.steps],
    }
    for name, errors in series.items():
        right.plot(numbers, errors, marker="o", label=name)
    right.axhline(found.thresholds.relative_error, color="grey", linestyle="--", label="allowed of logits")
    right.set(yscale="log", xlabel="step", ylabel="error, relative", title="by step")
    right.set_xticks(numbers)
    right.legend(fontsize="x-small")
    figure.suptitle(f"{found.b} against {found.a}", fontsize="small")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise RequestError(f"--plot {path}: the picture cannot be written: {error}") from error
    finally:
        plt.close(figure)


def _shown(error: float) -> float:
    return max(error, _LEAST)
