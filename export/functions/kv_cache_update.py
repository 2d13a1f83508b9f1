"""`KvCacheUpdate` in ONNX."""

from typing import Any

from onnxscript import script

from .marker import PLUGIN_ATTRIBUTES, STANDARD, ZONDA, Marker, like, op_overload

op = STANDARD


@script(ZONDA, default_opset=STANDARD)
def body(cache, new, seqlen_offsets):  # type: ignore[no-untyped-def]
    """See `models.ops.kv_cache_update`. TensorScatter takes its indices as int64."""
    heads = op.Shape(cache, start=1, end=2)
    shape = op.Concat(op.Constant(value_ints=[0, 0]), heads, op.Constant(value_ints=[-1]), axis=0)
    rows = op.Transpose(op.Reshape(new, shape), perm=[0, 2, 1, 3])
    return op.TensorScatter(cache, rows, op.Cast(seqlen_offsets, to=7), axis=2)


def _translate(cache: Any, new: Any, seqlen_offsets: Any) -> Any:
    return ZONDA.KvCacheUpdate(cache, new, seqlen_offsets, **PLUGIN_ATTRIBUTES)


KV_CACHE_UPDATE = Marker(
    name="KvCacheUpdate",
    inputs=[("cache", "T"), ("new", "T"), ("seqlen_offsets", "I32")],
    outputs=[("updated", "T")],
    attributes={},
    infer=like((0, 0)),
    translations={op_overload("kv_cache_update"): _translate},
    bodies={"": body},
)
