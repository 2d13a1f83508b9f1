"""Targets of TensorRT-RTX for the doubles, and a GPU that could run them."""

from zonda.runtime.gpu import Gpu
from zonda.runtime.manifest import Graph, Parity, Target

RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", 89, 24 << 30)


def rtx_target(form: str = "", **changes) -> Target:
    """An unproven plan: `plugins` or `builtin`, as builds call them; without a form as in a manifest without kinds."""
    plan = f"tensorrt-rtx/{form or 'float16'}.plan"
    graphs = tuple(
        Graph(role=role, file=plan, batch=(1, 4), sequence=sequence)
        for role, sequence in (("prefill", (1, 16)), ("decode", (1, 1)))
    )
    values = {
        "name": f"tensorrt-rtx-{form}" if form else "tensorrt-rtx",
        "kind": "tensorrt-rtx" if form else "",
        "graphs": graphs,
        "weights": (plan,),
        "dtype": "float32",
        "tool_versions": {"tensorrt-rtx": "1.7.1.116"},
        "parity": Parity(status="pending", reason="the build host has no GPU"),
        "compute_capabilities": (80, 86, 89, 120),
    }
    return Target(**(values | changes))
