"""`RoPE` in ONNX. Overload `single` has no k."""

from typing import Any

from onnx.defs import OpSchema
from onnxscript import script

from .marker import PLUGIN_ATTRIBUTES, STANDARD, ZONDA, Marker, like, op_overload

op = STANDARD


@script(ZONDA, default_opset=STANDARD)
def body(q, k, cos, sin, positions, num_heads: int, num_key_value_heads: int, interleaved: int, rotary_dim: int):  # type: ignore[no-untyped-def]
    """See `models.ops.rope`. The tables are float32 whatever q is; the rotation happens in the type of q."""
    c = op.CastLike(cos, q)
    s = op.CastLike(sin, q)
    turned_q = op.RotaryEmbedding(
        q, c, s, positions, interleaved=interleaved, num_heads=num_heads, rotary_embedding_dim=rotary_dim
    )
    turned_k = op.RotaryEmbedding(
        k, c, s, positions, interleaved=interleaved, num_heads=num_key_value_heads, rotary_embedding_dim=rotary_dim
    )
    return turned_q, turned_k


@script(ZONDA, default_opset=STANDARD)
def single(q, k, cos, sin, positions, num_heads: int, interleaved: int, rotary_dim: int):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """The same without k (an absent input)."""
    return op.RotaryEmbedding(
        q,
        op.CastLike(cos, q),
        op.CastLike(sin, q),
        positions,
        interleaved=interleaved,
        num_heads=num_heads,
        rotary_embedding_dim=rotary_dim,
    )


def _translate(
    q: Any,
    k: Any,
    cos: Any,
    sin: Any,
    positions: Any,
    num_heads: int,
    num_key_value_heads: int,
    interleaved: bool,
) -> Any:
    return ZONDA.RoPE(
        q,
        k,
        cos,
        sin,
        positions,
        num_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        interleaved=int(interleaved),
        rotary_dim=2 * cos.shape[-1],
        **PLUGIN_ATTRIBUTES,
    )


def _translate_single(q: Any, cos: Any, sin: Any, positions: Any, num_heads: int, interleaved: bool) -> Any:
    turned, _ = ZONDA.RoPE(
        q,
        None,
        cos,
        sin,
        positions,
        num_heads=num_heads,
        num_key_value_heads=0,
        interleaved=int(interleaved),
        rotary_dim=2 * cos.shape[-1],
        **PLUGIN_ATTRIBUTES,
    )
    return turned  # both outputs of the schema would be taken for a sequence and concatenated


ROPE = Marker(
    name="RoPE",
    inputs=[("q", "T"), ("k?", "T"), ("cos", "TP"), ("sin", "TP"), ("start_offsets_kernel", "I64")],
    outputs=[("q_out", "T"), ("k_out?", "T")],
    attributes={
        "num_heads": OpSchema.AttrType.INT,
        "num_key_value_heads": OpSchema.AttrType.INT,
        "interleaved": OpSchema.AttrType.INT,
        "rotary_dim": OpSchema.AttrType.INT,
    },
    infer=like((0, 0), (1, 1)),
    translations={op_overload("rope"): _translate, op_overload("rope_single"): _translate_single},
    bodies={"": body, "single": single},
    select=lambda present: "" if present[1] else "single",
)
