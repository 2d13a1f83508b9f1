"""The markers in ONNX: domain `zonda`, version 1, one file a marker.

Each file gives the marker's schema, its translation from the torch op, and its body: an ONNX function over
standard operators that any runtime can execute. The node carries `plugin_namespace` and `plugin_version`, so
TensorRT takes our plugin when it is registered and the body when it is not.
"""

from .add_rms_norm import ADD_RMS_NORM
from .cached_attention import CACHED_ATTENTION
from .kv_cache_update import KV_CACHE_UPDATE
from .marker import DOMAIN, VERSION, Marker, register_schemas
from .moe import MOE
from .q_embedding import Q_EMBEDDING
from .q_linear import Q_LINEAR
from .q_rms_norm import Q_RMS_NORM
from .rms_norm import RMS_NORM
from .rope import ROPE

MARKERS: tuple[Marker, ...] = (
    RMS_NORM,
    Q_RMS_NORM,
    ROPE,
    KV_CACHE_UPDATE,
    CACHED_ATTENTION,
    Q_LINEAR,
    Q_EMBEDDING,
    MOE,
)

LOWERED_MARKERS: tuple[Marker, ...] = (ADD_RMS_NORM,)
"""What only a lowering makes: no model and no universal graph holds them."""

__all__ = ["DOMAIN", "LOWERED_MARKERS", "MARKERS", "VERSION", "Marker", "register_schemas"]
