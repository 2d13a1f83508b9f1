"""`CachedAttention` in ONNX. Overload `sinks` has attention sinks.

The mask is explicit and boolean: `nonpad_kv_seqlen` and `is_causal` mean different things to different runtimes.
"""

from typing import Any

import onnx
from onnx.defs import OpSchema
from onnxscript import script

from .marker import PLUGIN_ATTRIBUTES, STANDARD, ZONDA, Marker, op_overload

op = STANDARD


@script(ZONDA, default_opset=STANDARD)
def body(q, key_cache, value_cache, positions, num_heads: int, scale: float, window: int, softcap: float):  # type: ignore[no-untyped-def]
    """See `models.ops.cached_attention`. `window` 0 stands for the whole past."""
    capacity = op.Squeeze(op.Shape(key_cache, start=2, end=3), op.Constant(value_ints=[0]))
    slots = op.Range(op.Constant(value_int=0), capacity, op.Constant(value_int=1))
    position = op.Unsqueeze(positions, op.Constant(value_ints=[1, 3]))
    size = op.Constant(value_int=window)
    unlimited = op.Equal(size, op.Constant(value_int=0))
    recent = op.Or(op.Greater(slots, op.Sub(position, size)), unlimited)
    mask = op.And(op.LessOrEqual(slots, position), recent)  # (B, 1, S, C)
    heads = op.Reshape(op.Constant(value_int=num_heads), op.Constant(value_ints=[1]))
    split = op.Concat(op.Constant(value_ints=[0, 0]), heads, op.Constant(value_ints=[-1]), axis=0)
    query = op.Transpose(op.Reshape(q, split), perm=[0, 2, 1, 3])
    attended = op.Attention(query, key_cache, value_cache, mask, scale=scale, softcap=softcap)
    return op.Reshape(op.Transpose(attended, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))


@script(ZONDA, default_opset=STANDARD)
def sinks_body(  # type: ignore[no-untyped-def]
    q, key_cache, value_cache, positions, sinks, num_heads: int, scale: float, window: int, softcap: float
):
    """The same with a sink logit a head, in basic operators: no standard operator knows sinks.

    Softcap is `softcap * tanh(logits / softcap)`; 0 divides to infinity, and `Where` keeps the plain logits.
    """
    capacity = op.Squeeze(op.Shape(key_cache, start=2, end=3), op.Constant(value_ints=[0]))
    slots = op.Range(op.Constant(value_int=0), capacity, op.Constant(value_int=1))
    position = op.Unsqueeze(positions, op.Constant(value_ints=[1, 2, 4]))
    size = op.Constant(value_int=window)
    unlimited = op.Equal(size, op.Constant(value_int=0))
    recent = op.Or(op.Greater(slots, op.Sub(position, size)), unlimited)
    mask = op.And(op.LessOrEqual(slots, position), recent)  # (B, 1, 1, S, C)
    heads = op.Reshape(op.Constant(value_int=num_heads), op.Constant(value_ints=[1]))
    kv_heads = op.Shape(key_cache, start=1, end=2)
    groups = op.Div(heads, kv_heads)
    split = op.Concat(op.Constant(value_ints=[0, 0]), kv_heads, groups, op.Constant(value_ints=[-1]), axis=0)
    query = op.Transpose(op.Reshape(q, split), perm=[0, 2, 3, 1, 4])  # (B, Hkv, G, S, D)
    key = op.Transpose(op.Unsqueeze(key_cache, op.Constant(value_ints=[2])), perm=[0, 1, 2, 4, 3])
    factor = op.CastLike(op.Constant(value_float=scale), q)
    plain = op.Mul(op.MatMul(query, key), factor)
    cap = op.CastLike(op.Constant(value_float=softcap), q)
    capped = op.Mul(op.Tanh(op.Div(plain, cap)), cap)
    logits = op.Where(op.Greater(op.Abs(cap), op.CastLike(op.Constant(value_float=0.0), q)), capped, plain)
    masked = op.Where(mask, logits, op.CastLike(op.Constant(value_float=float("-inf")), q))
    column = op.Reshape(
        sinks, op.Concat(op.Constant(value_ints=[1]), kv_heads, groups, op.Constant(value_ints=[1, 1]), axis=0)
    )
    batch = op.Shape(q, start=0, end=1)
    length = op.Shape(q, start=1, end=2)
    one = op.Constant(value_ints=[1])
    columns = op.Expand(op.CastLike(column, q), op.Concat(batch, one, one, length, one, axis=0))
    weights = op.Softmax(op.Concat(masked, columns, axis=-1), axis=-1)
    kept = op.Slice(weights, op.Constant(value_ints=[0]), op.Constant(value_ints=[-1]), op.Constant(value_ints=[-1]))
    attended = op.MatMul(kept, op.Unsqueeze(value_cache, op.Constant(value_ints=[2])))
    return op.Reshape(op.Transpose(attended, perm=[0, 3, 1, 2, 4]), op.Constant(value_ints=[0, 0, -1]))


def _translate(
    q: Any,
    key_cache: Any,
    value_cache: Any,
    positions: Any,
    sinks: Any,
    num_heads: int,
    scale: float,
    window: int,
    softcap: float,
) -> Any:
    inputs = (q, key_cache, value_cache, positions) if sinks is None else (q, key_cache, value_cache, positions, sinks)
    return ZONDA.CachedAttention(
        *inputs, num_heads=num_heads, scale=scale, window=window, softcap=softcap, **PLUGIN_ATTRIBUTES
    )


def _infer(context: Any) -> None:
    """(B, S, Hq*Dv): B and S of q, Hq the attribute, Dv of the value cache."""
    q, value = context.get_input_type(0).tensor_type, context.get_input_type(2).tensor_type
    result = onnx.TypeProto()
    result.tensor_type.elem_type = q.elem_type
    if q.HasField("shape") and value.HasField("shape"):
        result.tensor_type.shape.dim.extend(q.shape.dim[:2])
        width = result.tensor_type.shape.dim.add()
        if value.shape.dim[3].HasField("dim_value"):
            width.dim_value = context.get_attribute("num_heads").i * value.shape.dim[3].dim_value
    context.set_output_type(0, result)


CACHED_ATTENTION = Marker(
    name="CachedAttention",
    inputs=[("q", "T"), ("key_cache", "T"), ("value_cache", "T"), ("start_offsets_kernel", "I64"), ("sinks?", "T")],
    outputs=[("attended", "T")],
    attributes={
        "num_heads": OpSchema.AttrType.INT,
        "scale": OpSchema.AttrType.FLOAT,
        "window": OpSchema.AttrType.INT,
        "softcap": OpSchema.AttrType.FLOAT,
    },
    infer=_infer,
    translations={op_overload("cached_attention"): _translate},
    bodies={"": body, "sinks": sinks_body},
    select=lambda present: "sinks" if len(present) > 4 and present[4] else "",
)
