"""`MoE` in ONNX. Overload `biases` has biases of both linears.

The bodies gather the chosen experts' weights for every token: no other expert runs, and any runtime can do it, but a
long prefill takes the memory of top_k experts a token. Targets with a grouped operator take that instead.
"""

from typing import Any

from onnx.defs import OpSchema
from onnxscript import script

from .marker import PLUGIN_ATTRIBUTES, STANDARD, ZONDA, Marker, like, op_overload

op = STANDARD


@script(ZONDA, default_opset=STANDARD)
def body(  # type: ignore[no-untyped-def]
    x, router_logits, gate_up, down, top_k: int, normalize: int, alpha: float, beta: float, limit: float
):
    """See `models.ops.moe`. `limit` 0 stands for the largest float."""
    chosen, ids = op.TopK(router_logits, op.Reshape(op.Constant(value_int=top_k), op.Constant(value_ints=[1])))
    over_all = op.GatherElements(op.Softmax(router_logits, axis=-1), ids, axis=2)
    among_chosen = op.Equal(op.Constant(value_int=normalize), op.Constant(value_int=1))
    weights = op.Where(among_chosen, op.Softmax(chosen, axis=-1), over_all)
    last = op.Constant(value_ints=[-1])
    column = op.Unsqueeze(x, op.Constant(value_ints=[2, 4]))  # (B, S, 1, H, 1)
    both = op.Squeeze(op.MatMul(op.Gather(gate_up, ids), column), last)  # (B, S, K, 2I)
    two, end = op.Constant(value_ints=[2]), op.Constant(value_ints=[9223372036854775807])
    bound = op.Constant(value_float=limit)
    unbound = op.Equal(bound, op.Constant(value_float=0.0))
    most = op.CastLike(op.Where(unbound, op.Constant(value_float=3.4028234e38), bound), x)
    gate = op.Min(op.Slice(both, op.Constant(value_ints=[0]), end, last, two), most)
    up = op.Max(op.Min(op.Slice(both, op.Constant(value_ints=[1]), end, last, two), most), op.Neg(most))
    sigmoid = op.Sigmoid(op.Mul(gate, op.CastLike(op.Constant(value_float=alpha), x)))
    hidden = op.Mul(op.Mul(gate, sigmoid), op.Add(up, op.CastLike(op.Constant(value_float=beta), x)))
    out = op.Squeeze(op.MatMul(op.Gather(down, ids), op.Unsqueeze(hidden, last)), last)  # (B, S, K, H)
    return op.ReduceSum(op.Mul(out, op.Unsqueeze(weights, last)), two, keepdims=0)


@script(ZONDA, default_opset=STANDARD)
def biases_body(  # type: ignore[no-untyped-def]
    x,
    router_logits,
    gate_up,
    down,
    gate_up_bias,
    down_bias,
    top_k: int,
    normalize: int,
    alpha: float,
    beta: float,
    limit: float,
):
    """The same with biases."""
    chosen, ids = op.TopK(router_logits, op.Reshape(op.Constant(value_int=top_k), op.Constant(value_ints=[1])))
    over_all = op.GatherElements(op.Softmax(router_logits, axis=-1), ids, axis=2)
    among_chosen = op.Equal(op.Constant(value_int=normalize), op.Constant(value_int=1))
    weights = op.Where(among_chosen, op.Softmax(chosen, axis=-1), over_all)
    last = op.Constant(value_ints=[-1])
    column = op.Unsqueeze(x, op.Constant(value_ints=[2, 4]))  # (B, S, 1, H, 1)
    product = op.Squeeze(op.MatMul(op.Gather(gate_up, ids), column), last)  # (B, S, K, 2I)
    both = op.Add(product, op.Gather(gate_up_bias, ids))
    two, end = op.Constant(value_ints=[2]), op.Constant(value_ints=[9223372036854775807])
    bound = op.Constant(value_float=limit)
    unbound = op.Equal(bound, op.Constant(value_float=0.0))
    most = op.CastLike(op.Where(unbound, op.Constant(value_float=3.4028234e38), bound), x)
    gate = op.Min(op.Slice(both, op.Constant(value_ints=[0]), end, last, two), most)
    up = op.Max(op.Min(op.Slice(both, op.Constant(value_ints=[1]), end, last, two), most), op.Neg(most))
    sigmoid = op.Sigmoid(op.Mul(gate, op.CastLike(op.Constant(value_float=alpha), x)))
    hidden = op.Mul(op.Mul(gate, sigmoid), op.Add(up, op.CastLike(op.Constant(value_float=beta), x)))
    out = op.Squeeze(op.MatMul(op.Gather(down, ids), op.Unsqueeze(hidden, last)), last)  # (B, S, K, H)
    biased = op.Add(out, op.Gather(down_bias, ids))
    return op.ReduceSum(op.Mul(biased, op.Unsqueeze(weights, last)), two, keepdims=0)


def _translate(
    x: Any,
    router_logits: Any,
    gate_up: Any,
    down: Any,
    gate_up_bias: Any,
    down_bias: Any,
    top_k: int,
    normalize: bool,
    alpha: float,
    beta: float,
    limit: float,
) -> Any:
    biases = () if gate_up_bias is None else (gate_up_bias, down_bias)
    routing = {"top_k": top_k, "normalize": int(normalize)}
    swiglu = {"alpha": alpha, "beta": beta, "limit": limit}
    return ZONDA.MoE(x, router_logits, gate_up, down, *biases, **routing, **swiglu, **PLUGIN_ATTRIBUTES)


MOE = Marker(
    name="MoE",
    inputs=[
        ("x", "T"),
        ("router_logits", "T"),
        ("gate_up", "T"),
        ("down", "T"),
        ("gate_up_bias?", "T"),
        ("down_bias?", "T"),
    ],
    outputs=[("y", "T")],
    attributes={
        "top_k": OpSchema.AttrType.INT,
        "normalize": OpSchema.AttrType.INT,
        "alpha": OpSchema.AttrType.FLOAT,
        "beta": OpSchema.AttrType.FLOAT,
        "limit": OpSchema.AttrType.FLOAT,
    },
    infer=like((0, 0)),
    translations={op_overload("moe"): _translate},
    bodies={"": body, "biases": biases_body},
    select=lambda present: "biases" if len(present) > 4 and present[4] else "",
)
