"""The markers: one torch custom op a file, in the namespace `zonda`, each with its true mathematics.

A marker's eager result is the reference that every engine is held to. Every op computes in float32 at least
(float64 inputs stay float64) and returns the dtype of its first floating input.
"""

from .cached_attention import cached_attention
from .kv_cache_update import kv_cache_update
from .moe import moe
from .q_embedding import q_embedding
from .q_linear import q_linear
from .q_rms_norm import q_rms_norm
from .rms_norm import rms_norm
from .rope import rope, rope_single

__all__ = [
    "cached_attention",
    "kv_cache_update",
    "moe",
    "q_embedding",
    "q_linear",
    "q_rms_norm",
    "rms_norm",
    "rope",
    "rope_single",
]
